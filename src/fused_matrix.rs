//! Sizes of the fused kernel on cooperative matrices: a pure function of widths and device, priced in
//! bytes of workgroup memory and registers of a thread.

use crate::caps::Caps;
use crate::dtype::Dtype;
use crate::problem::AttentionProblem;
use crate::tile::{Tile, check};

/// Most registers of a thread that fragments may take; a GPU has 255 or 256, and the softmax between the
/// products wants some of them.
const MOST_REGISTERS: u32 = 176;

/// The same on a processor, which spills for free but takes its time to compile.
const MOST_ON_CPU: u32 = 224;

/// Most subgroups of a workgroup: four warps of a multiprocessor.
const MOST_SUBGROUPS: u32 = 4;

/// The kernel's sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct FusedMatrix {
    /// Rows and columns of a fragment.
    pub(crate) edge: u32,
    /// Threads of a subgroup.
    pub(crate) subgroup: u32,
    /// Subgroups of a workgroup.
    pub(crate) subgroups: u32,
    /// Fragments of query rows of a subgroup.
    pub(crate) bands: u32,
    /// Keys of a step.
    pub(crate) tile_kv: u32,
    /// Fragments of head_dim and head_dim_v.
    pub(crate) frags: u32,
    pub(crate) frags_v: u32,
    /// f16 numbers that make up an element of q.
    pub(crate) parts: u32,
}

impl FusedMatrix {
    /// Of kernels that are none.
    pub(crate) const NONE: Self =
        Self { edge: 0, subgroup: 0, subgroups: 0, bands: 0, tile_kv: 0, frags: 0, frags_v: 0, parts: 0 };

    /// The same with sizes of a caller's choice; or why those make no kernel. Whether it fits is asked
    /// afterwards.
    pub(crate) fn sized(self, tile: &Tile) -> Result<Self, String> {
        if self == Self::NONE {
            return Ok(self);
        }
        let rows = tile.rows.unwrap_or(self.edge * self.bands);
        let fits = rows > 0 && rows.is_multiple_of(self.edge) && self.subgroup.is_multiple_of(rows);
        let need = format!("a multiple of {} that divides the subgroup's {}", self.edge, self.subgroup);
        check("rows", rows, fits, &need)?;
        let threads = tile.threads.unwrap_or(self.threads());
        let fits = threads > 0 && threads.is_multiple_of(self.subgroup) && threads <= 1024;
        check("threads", threads, fits, &format!("whole subgroups of {}, at most 1024", self.subgroup))?;
        let keys = tile.keys.unwrap_or(self.tile_kv);
        let quads = 4 * (self.subgroup / rows);
        let fits =
            keys.is_power_of_two() && keys >= 2 * self.edge && keys.is_multiple_of(quads) && keys <= 256;
        let need = format!("a power of two from {} to 256, a multiple of {quads}", 2 * self.edge);
        check("keys", keys, fits, &need)?;
        Ok(Self { bands: rows / self.edge, subgroups: threads / self.subgroup, tile_kv: keys, ..self })
    }

    /// Fragments of keys of a step.
    pub(crate) fn key_frags(self) -> u32 {
        self.tile_kv / self.edge.max(1)
    }

    /// Query rows of a workgroup.
    pub(crate) fn tile_q(self) -> u32 {
        self.edge * self.bands * self.subgroups
    }

    pub(crate) fn threads(self) -> u32 {
        self.subgroup * self.subgroups
    }

    /// Threads of a query row.
    pub(crate) fn lanes(self) -> u32 {
        self.threads() / self.tile_q().max(1)
    }

    /// Workgroup memory: K or V (or, at first, Q), the scores and the weights, rows skewed by 16 bytes;
    /// and two flags.
    pub(crate) fn workgroup_bytes(self) -> u32 {
        let width = self.frags.max(self.frags_v) * self.edge;
        let staged = self.tile_q().max(self.tile_kv) * (2 * width + 16);
        staged + self.tile_q() * ((4 * self.tile_kv + 16) + (2 * self.tile_kv + 16)) + 8
    }

    /// Registers of a thread for the fragments that live through a step: Q (two f16 in one), O, and one
    /// of S or of K and V.
    pub(crate) fn registers(self) -> u32 {
        let of_a_fragment = (self.edge * self.edge).div_ceil(self.subgroup.max(1));
        of_a_fragment * self.bands * ((self.parts * self.frags).div_ceil(2) + self.frags_v + 2)
    }

    /// Why a problem or a device does not suit; `None` when both do.
    pub(crate) fn unfit(self, problem: &AttentionProblem, caps: &Caps) -> Option<String> {
        if let Some(why) = lacks(caps) {
            return Some(why);
        }
        for dtype in [problem.dtype, problem.stored_kv()] {
            // Codes become f16; f32 and bf16 reach further than that.
            if dtype.is_float() && dtype != Dtype::F16 {
                return Some(format!("matrix units take f16, not {dtype}"));
            }
        }
        if self == Self::NONE {
            return Some(format!(
                "no tile for head_dim {} and head_dim_v {} fits {} B of workgroup memory, {} threads and {} \
                 registers a thread",
                problem.head_dim,
                problem.head_dim_v,
                caps.max_workgroup_bytes,
                caps.max_invocations,
                most_registers(caps)
            ));
        }
        if self.registers() > most_registers(caps) {
            let most = most_registers(caps);
            return Some(format!("it needs {} registers a thread, {most} is the most", self.registers()));
        }
        None
    }
}

fn most_registers(caps: &Caps) -> u32 {
    if caps.on_cpu() { MOST_ON_CPU } else { MOST_REGISTERS }
}

/// What a device lacks whatever the problem; `None` where it lacks nothing.
pub(crate) fn lacks(caps: &Caps) -> Option<String> {
    let Some(matrix) = &caps.matrix else {
        return Some(
            "it needs cooperative matrices of f16 with f32 sums (EXPERIMENTAL_COOPERATIVE_MATRIX)".into(),
        );
    };
    if !caps.shader_f16 {
        return Some("it needs SHADER_F16".into());
    }
    match caps.subgroup {
        Some((least, most)) if least == most && least.is_multiple_of(matrix.edge) => None,
        Some((least, most)) => Some(format!(
            "it needs subgroups of one size, a multiple of {}, the device has {least} to {most}",
            matrix.edge
        )),
        None => Some("it needs subgroup operations (SUBGROUP)".into()),
    }
}

/// The sizes for a problem: as many subgroups as there are rows for, then the widest step of keys (each
/// step costs four barriers) that fits.
pub(crate) fn sizes(problem: &AttentionProblem, caps: &Caps) -> FusedMatrix {
    let (Some(matrix), Some((subgroup, _))) = (&caps.matrix, caps.subgroup) else {
        return FusedMatrix::NONE;
    };
    let edge = matrix.edge;
    let frags = |width: usize| (width as u32).div_ceil(edge);
    let wanted = (problem.owned_rows() as u32).div_ceil(edge).next_power_of_two().clamp(1, MOST_SUBGROUPS);
    let mut all = [4, 2, 1].into_iter().filter(|&subgroups| subgroups <= wanted).flat_map(|subgroups| {
        // A row's quads of keys are dealt out to its lanes.
        [64, 32, 16].map(|tile_kv| FusedMatrix {
            edge,
            subgroup,
            subgroups,
            bands: 1,
            tile_kv,
            frags: frags(problem.head_dim),
            frags_v: frags(problem.head_dim_v),
            parts: if problem.projects() { 2 } else { 1 },
        })
    });
    all.find(|tile| {
        tile.workgroup_bytes() <= caps.max_workgroup_bytes
            && tile.threads() <= caps.max_invocations.min(caps.max_workgroup_size[0])
            && tile.registers() <= most_registers(caps)
            && tile.tile_kv >= 2 * edge
            && tile.lanes() > 0
            && (tile.tile_kv / 4).is_multiple_of(tile.lanes())
    })
    .unwrap_or(FusedMatrix::NONE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caps::MatrixUnits;

    /// Subgroups of 32 and matrices of 16, as a large card has them.
    fn card() -> Caps {
        Caps {
            shader_f16: true,
            subgroup: Some((32, 32)),
            matrix: Some(MatrixUnits { edge: 16, tested: Some(Ok(())) }),
            max_workgroup_bytes: 48 << 10,
            max_invocations: 1024,
            ..Caps::minimal()
        }
    }

    fn problem(seq_q: usize, head_dim: usize, head_dim_v: usize) -> AttentionProblem {
        AttentionProblem::new(1, 1, 1, seq_q, 4096, head_dim, head_dim_v).with_dtype(Dtype::F16)
    }

    #[test]
    fn usual_widths_get_four_subgroups_and_long_steps() {
        for (head_dim, keys) in [(32, 64), (64, 64), (80, 64), (96, 64), (128, 64)] {
            let tile = sizes(&problem(4096, head_dim, head_dim), &card());
            assert_eq!((tile.tile_q(), tile.tile_kv, tile.lanes()), (64, keys, 2), "{head_dim}: {tile:?}");
            assert_eq!(tile.unfit(&problem(4096, head_dim, head_dim), &card()), None);
        }
        assert_eq!(sizes(&problem(17, 64, 64), &card()).tile_q(), 32);
    }

    #[test]
    fn what_does_not_fit_says_why() {
        let wide = problem(64, 512, 512);
        let why = sizes(&wide, &card()).unfit(&wide, &card()).unwrap_or_default();
        assert!(why.contains("512") && why.contains("registers"), "{why}");
        let two_sizes = Caps { subgroup: Some((32, 64)), ..card() };
        assert!(lacks(&two_sizes).is_some_and(|why| why.contains("32 to 64")));
        let f32 = problem(64, 64, 64).with_dtype(Dtype::F32);
        assert!(sizes(&f32, &card()).unfit(&f32, &card()).is_some_and(|why| why.contains("f32")));
    }
}
