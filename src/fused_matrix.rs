//! Sizes of the fused kernel on cooperative matrices: a pure function of widths and device, priced in
//! bytes of workgroup memory and registers of a thread.

use crate::caps::{Caps, MatrixUnits, NO_SUBGROUPS};
use crate::dtype::Dtype;
use crate::problem::AttentionProblem;
use crate::tile::{Tile, check};

/// Most registers of a thread that fragments may take; a GPU has 255 or 256, and the softmax between the
/// products wants some of them.
const MOST_REGISTERS: u32 = 176;

/// The same where subgroups may have 64 threads. (RADV copies what it reads: with 144 it spills nothing, with 168 it does.)
const MOST_REGISTERS_OF_64: u32 = 152;

/// Widest rows that are priced: none that is wider fits.
const MOST_WIDTH: usize = 1 << 14;

/// Most bands of rows of a workgroup: four warps of a multiprocessor.
const MOST_BANDS: u32 = 4;

/// Most fragments of O, and of Q, that have names of their own on a processor, whose compiler takes a tenth of a
/// second for each operation on fragments in the text.
const NAMED_ON_CPU: u32 = 4;

/// The kernel's sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct FusedMatrix {
    /// Rows and columns of a fragment.
    pub(crate) edge: u32,
    /// Threads of a subgroup, at most.
    pub(crate) subgroup: u32,
    /// Subgroups of a workgroup, by the rows of Q and O and by the columns of O. Of smaller subgroups there are more,
    /// which do the same as the first.
    pub(crate) row_subgroups: u32,
    pub(crate) columns: u32,
    /// Fragments of query rows of a subgroup.
    pub(crate) bands: u32,
    /// Keys of a step.
    pub(crate) tile_kv: u32,
    /// Fragments of head_dim and head_dim_v.
    pub(crate) frags: u32,
    pub(crate) frags_v: u32,
    /// Whether those are whole.
    pub(crate) whole: bool,
    pub(crate) whole_v: bool,
    /// Whether K and V are f16 whose rows are contiguous multiples of eight elements: they are read so many at a time.
    pub(crate) eights: bool,
    /// f16 numbers that make up an element of q.
    pub(crate) parts: u32,
    /// Whether Q stays in fragments; else in workgroup memory.
    pub(crate) kept_q: bool,
    /// Workgroup memory is of scalars.
    pub(crate) scalars: bool,
    /// Whether compilers are kept from unrolling loops.
    pub(crate) rolled: bool,
}

impl FusedMatrix {
    /// Of kernels that are none.
    pub(crate) const NONE: Self = Self {
        edge: 0,
        subgroup: 0,
        row_subgroups: 0,
        columns: 0,
        bands: 0,
        tile_kv: 0,
        frags: 0,
        frags_v: 0,
        whole: false,
        whole_v: false,
        eights: false,
        parts: 0,
        kept_q: false,
        scalars: false,
        rolled: false,
    };

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
        // Subgroups that share a row: one more for each subgroup's worth of lanes.
        let a_column = self.subgroup / rows;
        let lanes = tile.lanes.unwrap_or((self.columns * a_column).min(self.subgroup));
        let columns = lanes / a_column;
        let fits = lanes.is_multiple_of(a_column) && columns.is_power_of_two() && lanes <= self.subgroup;
        check("lanes", lanes, fits, &format!("{a_column} times a power of two, at most {}", self.subgroup))?;
        let whole = self.subgroup * columns;
        let threads = tile.threads.unwrap_or(self.row_subgroups * whole);
        let fits = threads > 0 && threads.is_multiple_of(whole) && threads <= 1024;
        check("threads", threads, fits, &format!("a multiple of {whole}, at most 1024"))?;
        let keys = tile.keys.unwrap_or(self.tile_kv);
        let least = self.edge * columns.max(2);
        let fits = keys.is_power_of_two() && keys >= least && keys.is_multiple_of(4 * lanes) && keys <= 256;
        let need = format!("a power of two from {least} to 256, a multiple of {}", 4 * lanes);
        check("keys", keys, fits, &need)?;
        let (bands, row_subgroups) = (rows / self.edge, threads / whole);
        Ok(Self { bands, row_subgroups, columns, tile_kv: keys, ..self })
    }

    /// Fragments of keys of a step.
    pub(crate) fn key_frags(self) -> u32 {
        self.tile_kv / self.edge.max(1)
    }

    /// Fragments of S of a band that are summed side by side: four chains of products, which do not wait for one
    /// another. (Each product is text, on a processor.)
    pub(crate) fn side(self) -> u32 {
        let most = if self.rolled { NAMED_ON_CPU / self.frags.clamp(1, NAMED_ON_CPU) } else { 4 };
        let most = (most / self.bands.max(1)).max(1);
        1 << most.min(self.key_frags() / self.columns.max(1)).max(1).ilog2()
    }

    /// Fragments of a subgroup's columns of O.
    pub(crate) fn own_frags(self) -> u32 {
        self.frags_v.div_ceil(self.columns.max(1))
    }

    /// Whether all columns of all subgroups are columns of v.
    pub(crate) fn fills_v(self) -> bool {
        self.whole_v && self.frags_v.is_multiple_of(self.columns)
    }

    /// Of those, as many as S has room for at a time.
    pub(crate) fn round_frags(self) -> u32 {
        (self.key_frags() / self.columns.max(1)).max(1)
    }

    /// Query rows of a workgroup.
    pub(crate) fn tile_q(self) -> u32 {
        self.edge * self.bands * self.row_subgroups
    }

    pub(crate) fn threads(self) -> u32 {
        self.subgroup * self.row_subgroups * self.columns
    }

    /// Threads of a query row.
    pub(crate) fn lanes(self) -> u32 {
        self.threads() / self.tile_q().max(1)
    }

    /// Workgroup memory: K or V turned over (and, at first or for good, Q), the scores and the weights, rows skewed by
    /// 16 bytes, of the scores by 32; and two flags.
    pub(crate) fn workgroup_bytes(self) -> u32 {
        let of_k = 2 * self.frags * self.edge + 16;
        let of_p = 2 * self.tile_kv + 16;
        let v = self.columns * self.own_frags() * self.edge * of_p;
        let staged = match self.kept_q {
            true => (self.tile_q().max(self.tile_kv) * of_k).max(v),
            false => (self.tile_kv * of_k).max(v) + self.parts * self.tile_q() * of_k,
        };
        staged + self.tile_q() * (4 * self.tile_kv + 32 + of_p) + 8
    }

    /// Registers of a thread for the fragments that live through a step: Q (two f16 in one) if it is kept, O, and
    /// those of S that lie side by side, each with one of K.
    pub(crate) fn registers(self) -> u32 {
        let of_a_fragment = (self.edge * self.edge).div_ceil(self.subgroup.max(1));
        // Of an f16 factor: two elements in one. Those whose subgroups may have 64 threads give a lane a whole row of
        // it (RDNA 3; and RADV loads it so for RDNA 4).
        let of_a_factor = if self.subgroup > 32 { self.edge / 2 } else { of_a_fragment.div_ceil(2) };
        let q = if self.kept_q { self.parts * self.frags * of_a_factor } else { 0 };
        self.bands * (q + of_a_fragment * (self.own_frags() + self.side())) + self.side() * of_a_factor
    }

    fn most_registers(self) -> u32 {
        if self.subgroup > 32 { MOST_REGISTERS_OF_64 } else { MOST_REGISTERS }
    }

    /// Why a problem or a device does not suit; `None` when both do.
    pub(crate) fn unfit(self, problem: &AttentionProblem, caps: &Caps) -> Option<String> {
        if let Some(why) = lacks(caps) {
            return Some(why);
        }
        for dtype in [problem.dtype, problem.stored_kv()] {
            // Codes become f16: of keys the nearest one, and values that f16 does not reach are added in f32.
            // f32 and bf16 are not rounded so.
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
                MOST_REGISTERS
            ));
        }
        let least = caps.subgroup.map_or(0, |(least, _)| least);
        if self.lanes() > least {
            return Some(format!(
                "its {} threads of a row are no neighbours in subgroups of {least}",
                self.lanes()
            ));
        }
        let (need, most) = (self.registers(), self.most_registers());
        if need > most {
            return Some(format!("it needs {need} registers a thread, {most} is the most"));
        }
        None
    }
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
    if ![8, 16].contains(&matrix.edge) {
        return Some(format!("it needs matrices of 8 x 8 or 16 x 16, not of {0} x {0}", matrix.edge));
    }
    match caps.subgroup {
        Some((_, most)) if matrix.subgroup < most => Some(format!(
            "its matrix units are said to run in subgroups of up to {}, the device has up to {most}",
            matrix.subgroup
        )),
        Some((least, most)) if !least.is_multiple_of(matrix.edge) => Some(format!(
            "it needs subgroups of a multiple of {}, the device has {least} to {most}",
            matrix.edge
        )),
        Some(_) => None,
        None => Some(NO_SUBGROUPS.into()),
    }
}

/// The sizes for a problem: Q in fragments and one column of subgroups where registers allow that (not on a
/// processor), then as many bands as there are rows for, then the widest step of keys (each costs four barriers)
/// that fits.
pub(crate) fn sizes(problem: &AttentionProblem, caps: &Caps) -> FusedMatrix {
    let (Some(&MatrixUnits { edge, subgroup, scalars, .. }), Some((least, _))) =
        (caps.matrix.as_ref(), caps.subgroup)
    else {
        return FusedMatrix::NONE;
    };
    if lacks(caps).is_some() || problem.head_dim.max(problem.head_dim_v) > MOST_WIDTH {
        return FusedMatrix::NONE;
    }
    let parts = if problem.projects() { 2 } else { 1 };
    let frags = (problem.head_dim as u32).div_ceil(edge);
    let frags_v = (problem.head_dim_v as u32).div_ceil(edge);
    let eights = problem.stored_kv() == Dtype::F16
        && problem.k.is_vec(8, problem.head_dim)
        && problem.v.is_vec(8, problem.head_dim_v);
    let wanted = (problem.owned_rows() as u32).div_ceil(edge).next_power_of_two().clamp(1, MOST_BANDS);
    let shapes = if caps.on_cpu() {
        // At least two: each of a lane's scores is text, too.
        let columns = frags_v.div_ceil(NAMED_ON_CPU).next_power_of_two().clamp(2, edge);
        [1, 2, 4, 8].map(|fewer| (parts * frags <= NAMED_ON_CPU, (columns / fewer).max(1), true))
    } else {
        [(true, 1, false), (false, 1, false), (false, 2, false), (false, 4, false)]
    };
    let mut all = shapes.into_iter().flat_map(|(kept_q, columns, rolled)| {
        [4, 2, 1].into_iter().filter(|&rows| rows <= wanted).flat_map(move |row_subgroups| {
            [64, 32, 16].map(|tile_kv| FusedMatrix {
                edge,
                subgroup,
                row_subgroups,
                columns,
                bands: 1,
                tile_kv,
                frags,
                frags_v,
                whole: (problem.head_dim as u32).is_multiple_of(edge),
                whole_v: (problem.head_dim_v as u32).is_multiple_of(edge),
                eights,
                parts,
                kept_q,
                scalars,
                rolled,
            })
        })
    });
    all.find(|tile| {
        tile.workgroup_bytes() <= caps.max_workgroup_bytes
            && tile.threads() <= caps.max_invocations.min(caps.max_workgroup_size[0])
            && tile.registers() <= tile.most_registers()
            && tile.tile_kv >= edge * tile.columns.max(2)
            // A row's lanes are neighbours in a subgroup.
            && (1..=least).contains(&tile.lanes())
            // A row's quads of keys are dealt out to its lanes.
            && (tile.tile_kv / 4).is_multiple_of(tile.lanes())
    })
    .unwrap_or(FusedMatrix::NONE)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Subgroups of 32 and matrices of 16, as a large card has them.
    fn card() -> Caps {
        Caps {
            shader_f16: true,
            subgroup: Some((32, 32)),
            matrix: Some(MatrixUnits { edge: 16, subgroup: 32, scalars: false, tested: Some(Ok(())) }),
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

    /// Where a driver has subgroups of two sizes, the larger are counted on, and a row's lanes lie in the smaller.
    #[test]
    fn subgroups_may_have_two_sizes() {
        let matrix = Some(MatrixUnits { edge: 16, subgroup: 64, scalars: false, tested: Some(Ok(())) });
        let caps = Caps { subgroup: Some((32, 64)), matrix, ..card() };
        let tile = sizes(&problem(4096, 128, 128), &caps);
        assert_eq!((tile.tile_q(), tile.threads(), tile.lanes()), (64, 256, 4), "{tile:?}");
        assert_eq!(tile.unfit(&problem(4096, 128, 128), &caps), None);
        // Wider rows of q are more than registers there hold.
        assert!(sizes(&problem(4096, 160, 160), &caps).kept_q);
        for width in [192, 256] {
            let tile = sizes(&problem(4096, width, width), &caps);
            assert!(!tile.kept_q && tile.registers() <= MOST_REGISTERS_OF_64, "{width}: {tile:?}");
        }
    }

    /// Units made by hand that are none, or of smaller subgroups than there are.
    #[test]
    fn units_that_no_device_has() {
        for (edge, subgroup) in [(0, 32), (7, 32), (32, 32), (16, 0), (16, 16), (u32::MAX, u32::MAX)] {
            let matrix = Some(MatrixUnits { edge, subgroup, scalars: false, tested: Some(Ok(())) });
            let caps = Caps { matrix, ..card() };
            assert!(lacks(&caps).is_some(), "{edge} {subgroup}");
            assert_eq!(sizes(&problem(40, 64, 64), &caps), FusedMatrix::NONE);
            let linear = crate::linear::LinearProblem::new(40, 64, 64);
            assert_ne!(linear.kernel_on(&caps), crate::linear::LinearKernel::Matrix);
        }
    }

    /// O of one subgroup and Q beside it are more registers than there are: Q leaves them first.
    #[test]
    fn wide_heads_move_q_out_and_share_o() {
        let tile = sizes(&problem(4096, 256, 256), &card());
        assert!(!tile.kept_q && tile.columns == 1, "{tile:?}");
        let narrow_q = sizes(&problem(4096, 64, 512), &card());
        assert!(narrow_q.columns == 2 && narrow_q.own_frags() == 16, "{narrow_q:?}");
    }

    #[test]
    fn a_processor_gets_few_fragments_with_names() {
        let edge = 8;
        let matrix = Some(MatrixUnits { edge, subgroup: 8, scalars: false, tested: Some(Ok(())) });
        let caps = Caps { matrix, subgroup: Some((8, 8)), max_workgroup_bytes: 32 << 10, ..card() };
        let caps = Caps { device_type: wgpu::DeviceType::Cpu, ..caps };
        for width in [1, 8, 64, 100, 128] {
            let tile = sizes(&problem(4096, width, width), &caps);
            assert!(tile.own_frags() <= NAMED_ON_CPU && tile.lanes() == tile.columns, "{width}: {tile:?}");
        }
    }

    #[test]
    fn what_does_not_fit_says_why() {
        let wide = problem(64, 512, 512);
        let why = sizes(&wide, &card()).unfit(&wide, &card()).unwrap_or_default();
        assert!(why.contains("512") && why.contains("registers"), "{why}");
        let narrow = Caps { subgroup: Some((8, 32)), ..card() };
        assert!(lacks(&narrow).is_some_and(|why| why.contains("8 to 32")));
        let f32 = problem(64, 64, 64).with_dtype(Dtype::F32);
        assert!(sizes(&f32, &card()).unfit(&f32, &card()).is_some_and(|why| why.contains("f32")));
    }
}
