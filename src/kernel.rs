//! The table of kernels, and the blueprint of one: everything that is compiled in.

use crate::caps::Caps;
use crate::dtype::Dtype;
use crate::error::Operand;
use crate::problem::AttentionProblem;

/// How the staged products reach their operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// Tiles of both operands in workgroup memory: for GPUs.
    Tile,
    /// Registers fed straight from storage, one operand at workgroup-uniform addresses and no
    /// barrier: for adapters that run on a CPU.
    Direct,
}

impl Family {
    /// Every family.
    pub const ALL: [Self; 2] = [Self::Tile, Self::Direct];
}

impl std::fmt::Display for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tile => "tile",
            Self::Direct => "direct",
        })
    }
}

impl std::str::FromStr for Family {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|family| family.to_string() == s)
            .ok_or_else(|| format!("{s:?} is no kernel family; there are tile and direct"))
    }
}

/// A kernel; each has a WGSL file of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kernel {
    Project,
    ScoresTile,
    ScoresDirect,
    SoftmaxRow,
    ValuesTile,
    ValuesDirect,
    Weights,
}

impl Kernel {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Project => "project",
            Self::ScoresTile => "scores_tile",
            Self::ScoresDirect => "scores_direct",
            Self::SoftmaxRow => "softmax_row",
            Self::ValuesTile => "values_tile",
            Self::ValuesDirect => "values_direct",
            Self::Weights => "weights",
        }
    }

    pub(crate) fn is_scores(self) -> bool {
        matches!(self, Self::ScoresTile | Self::ScoresDirect)
    }

    pub(crate) fn is_values(self) -> bool {
        matches!(self, Self::ValuesTile | Self::ValuesDirect)
    }
}

/// Tile sizes of the staged kernels, chosen in [`tiles`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Tiles {
    pub(crate) family: Family,
    /// Queries and keys of a score workgroup.
    pub(crate) scores_rows: u32,
    pub(crate) scores_keys: u32,
    /// Threads along a side (tile), or in a row (direct) of a score workgroup.
    pub(crate) scores_lanes: u32,
    /// Quads of head_dim staged at a time (tile).
    pub(crate) scores_step: u32,
    /// Threads that share a softmax row, and rows of a workgroup.
    pub(crate) softmax_lanes: u32,
    pub(crate) softmax_rows: u32,
    /// Queries, threads along the quads of head_dim_v, and keys a step of a value workgroup.
    pub(crate) values_rows: u32,
    pub(crate) values_lanes: u32,
    pub(crate) values_step: u32,
}

/// Keys of a part of the value kernels' work, a multiple of every value step. A thread of either
/// family loops fewer than 40000 times for it even where a driver unrolls nothing; lavapipe ends a
/// thread's loops after 65535 iterations in all.
pub(crate) const PART_KEYS: usize = 8192;

/// Parts of the keys that the value kernels take one after the other.
pub(crate) fn key_parts(problem: &AttentionProblem) -> usize {
    problem.seq_kv.div_ceil(PART_KEYS).max(1)
}

/// Threads of the element-wise kernels (project, weights).
const ELEMENT_LANES: u32 = 64;

/// The one place where tile sizes are chosen.
pub(crate) fn tiles(family: Family, problem: &AttentionProblem, caps: &Caps) -> Tiles {
    let quads_v = (problem.head_dim_v as u32).div_ceil(4);
    match family {
        // 16 x 16 threads, 4 x 4 results each: 64 x 64 tiles, the classic shape that feeds each
        // multiplication-add from two quarter loads; 10 KiB (scores) and 9 KiB (values), inside the
        // default 16 KiB, so that at least one workgroup fits everywhere.
        Family::Tile => {
            // The reduction halves the lanes: a power of two.
            let widest = 1 << caps.max_invocations.min(caps.max_workgroup_size[0]).clamp(1, 256).ilog2();
            // A lane walks four keys at a time: more lanes than quads would idle.
            let quads = (problem.seq_kv as u32).div_ceil(4).max(1).next_power_of_two();
            let softmax_lanes = quads.min(widest);
            Tiles {
                family,
                scores_rows: 64,
                scores_keys: 64,
                scores_lanes: 16,
                scores_step: 4,
                softmax_lanes,
                softmax_rows: (64 / softmax_lanes).max(1),
                values_rows: 64,
                values_lanes: 16,
                values_step: 16,
            }
        }
        // 16 x 4 scores or 16 quads of output a lane: fewer leave too many loads for each
        // multiplication-addition, more no longer compile to registers. A score workgroup of 8 lanes
        // wastes least at the edges. One lane walks a whole softmax row, since every barrier costs
        // more there than sharing a row saves.
        Family::Direct => {
            // Long rows of few queries still want several lanes: the cores would idle.
            let wanted = if problem.rows() < 64 && problem.seq_kv > 4096 { 16 } else { 1 };
            // And no lane may pass the 65535 iterations: two for every four keys.
            let needed = problem.seq_kv.div_ceil(65536).next_power_of_two().min(256) as u32;
            let widest = 1 << caps.max_invocations.min(caps.max_workgroup_size[0]).clamp(1, 256).ilog2();
            let softmax_lanes = needed.max(wanted).min(widest);
            Tiles {
                family,
                scores_rows: 16,
                scores_keys: 32,
                scores_lanes: 8,
                scores_step: 1,
                softmax_lanes,
                softmax_rows: (16 / softmax_lanes).max(1),
                values_rows: 16,
                values_lanes: quads_v.next_power_of_two().clamp(1, 32),
                values_step: 4,
            }
        }
    }
}

/// How a kernel reads or writes a tensor operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Io {
    pub(crate) dtype: Dtype,
    /// Rows are contiguous multiples of four elements.
    pub(crate) vec4: bool,
    /// f16 as the shader's own type rather than pairs in a u32.
    pub(crate) native: bool,
}

impl Io {
    fn of(problem: &AttentionProblem, caps: &Caps, operand: Operand) -> Option<Self> {
        let layout = problem.layout(operand)?;
        let dtype = match operand {
            Operand::O => problem.out_dtype,
            Operand::Bias => problem.bias?.dtype,
            _ => problem.dtype,
        };
        // The bias is read element by element, whatever its layout.
        let vec4 = operand != Operand::Bias && layout.is_vec4(problem.shape(operand)[3]);
        Some(Self { dtype, vec4, native: dtype == Dtype::F16 && caps.shader_f16 })
    }
}

/// Everything that is compiled into one pipeline: its cache key, and (by
/// [`compose`](crate::shader)) its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Blueprint {
    pub(crate) kernel: Kernel,
    pub(crate) tiles: Tiles,
    pub(crate) q: Option<Io>,
    pub(crate) k: Option<Io>,
    pub(crate) v: Option<Io>,
    pub(crate) o: Option<Io>,
    pub(crate) bias: Option<Io>,
    /// Scores read queries that [`Kernel::Project`] has multiplied by W.
    pub(crate) projected: bool,
    pub(crate) softcap: bool,
    pub(crate) alibi: bool,
    pub(crate) mask: bool,
    pub(crate) kv_lens: bool,
    pub(crate) sinks: bool,
    pub(crate) lse: bool,
    /// Values come in several parts of the keys.
    pub(crate) parts: bool,
}

impl Blueprint {
    /// The blueprint of `kernel`, with only what that kernel depends on filled in: problems that
    /// differ elsewhere share the pipeline.
    pub(crate) fn new(kernel: Kernel, tiles: Tiles, problem: &AttentionProblem, caps: &Caps) -> Self {
        let bilinear = problem.layout(Operand::W).is_some();
        let io = |wanted: bool, operand| if wanted { Io::of(problem, caps, operand) } else { None };
        let scores = kernel.is_scores();
        let softmax = kernel == Kernel::SoftmaxRow;
        Self {
            kernel,
            tiles,
            q: io(kernel == Kernel::Project || (scores && !bilinear), Operand::Q),
            k: io(scores, Operand::K),
            v: io(kernel.is_values(), Operand::V),
            o: io(kernel.is_values(), Operand::O),
            bias: io(scores, Operand::Bias),
            projected: scores && bilinear,
            softcap: scores && problem.softcap.is_some(),
            alibi: scores && problem.alibi,
            mask: scores && problem.mask.is_some(),
            kv_lens: kernel != Kernel::Project && problem.kv_lens,
            sinks: softmax && problem.sinks,
            lse: softmax && problem.lse,
            parts: kernel.is_values() && key_parts(problem) > 1,
        }
    }

    /// Threads of a workgroup.
    pub(crate) fn threads(&self) -> u32 {
        let t = &self.tiles;
        match self.kernel {
            Kernel::Project | Kernel::Weights => ELEMENT_LANES,
            Kernel::ScoresTile => t.scores_lanes * t.scores_lanes,
            Kernel::ScoresDirect => t.scores_lanes,
            Kernel::SoftmaxRow => t.softmax_lanes * t.softmax_rows,
            Kernel::ValuesTile => t.values_lanes * t.values_lanes,
            Kernel::ValuesDirect => t.values_lanes,
        }
    }

    /// Bytes of workgroup memory.
    pub(crate) fn workgroup_bytes(&self) -> u32 {
        let t = &self.tiles;
        match self.kernel {
            Kernel::ScoresTile => 16 * 2 * t.scores_rows * (t.scores_step + 1),
            Kernel::SoftmaxRow => 4 * self.threads(),
            Kernel::ValuesTile => {
                16 * (t.values_rows * (t.values_step / 4 + 1) + t.values_step * t.values_lanes)
            }
            _ => 0,
        }
    }

    /// Workgroups for `heads` heads of `rows` rows.
    pub(crate) fn groups(&self, problem: &AttentionProblem, heads: u64, rows: u64) -> u64 {
        let t = &self.tiles;
        let keys = problem.seq_kv as u64;
        let tiles = |n: u64, tile: u32| n.div_ceil(u64::from(tile));
        match self.kernel {
            Kernel::Project => tiles(heads * rows * (problem.head_dim as u64).div_ceil(4), ELEMENT_LANES),
            Kernel::ScoresTile | Kernel::ScoresDirect => {
                heads * tiles(rows, t.scores_rows) * tiles(keys, t.scores_keys)
            }
            Kernel::SoftmaxRow => tiles(heads * rows, t.softmax_rows),
            Kernel::ValuesTile | Kernel::ValuesDirect => {
                heads * tiles(rows, t.values_rows) * tiles(problem.head_dim_v as u64, 4 * t.values_lanes)
            }
            Kernel::Weights => heads * rows * tiles(keys, ELEMENT_LANES),
        }
    }

    /// Why this kernel cannot run on a device; `None` when it can.
    pub(crate) fn unfit(&self, caps: &Caps) -> Option<String> {
        let [x, y, _] = self.workgroup_size();
        let buffers = self.bindings().iter().filter(|b| b.slot != Slot::Params).count() as u32;
        for (what, need, got) in [
            ("threads a workgroup", self.threads(), caps.max_invocations),
            ("threads along x", x, caps.max_workgroup_size[0]),
            ("threads along y", y, caps.max_workgroup_size[1]),
            ("bytes of workgroup memory", self.workgroup_bytes(), caps.max_workgroup_bytes),
            ("storage buffers", buffers, caps.max_storage_buffers),
        ] {
            if need > got {
                return Some(format!("{} needs {need} {what}, the device has {got}", self.kernel.name()));
            }
        }
        None
    }

    fn workgroup_size(&self) -> [u32; 3] {
        match self.kernel {
            Kernel::ScoresTile => [self.tiles.scores_lanes, self.tiles.scores_lanes, 1],
            Kernel::ValuesTile => [self.tiles.values_lanes, self.tiles.values_lanes, 1],
            _ => [self.threads(), 1, 1],
        }
    }

    /// The kernel's bindings, in order of their numbers.
    pub(crate) fn bindings(&self) -> Vec<Binding> {
        let read = |slot| Binding { slot, writes: false };
        let write = |slot| Binding { slot, writes: true };
        let mut all = vec![read(Slot::Params)];
        for (present, operand) in [
            (self.q.is_some(), Operand::Q),
            (self.k.is_some(), Operand::K),
            (self.v.is_some(), Operand::V),
            (self.bias.is_some(), Operand::Bias),
            (self.mask, Operand::Mask),
            (self.alibi, Operand::AlibiSlopes),
            (self.sinks, Operand::Sinks),
            (self.kv_lens, Operand::KvLens),
            (self.kernel == Kernel::Project, Operand::W),
        ] {
            if present {
                all.push(read(Slot::Operand(operand)));
            }
        }
        match self.kernel {
            Kernel::Project => all.push(write(Slot::Projected)),
            Kernel::ScoresTile | Kernel::ScoresDirect => {
                all.push(write(Slot::Scores));
                if self.projected {
                    all.push(read(Slot::Projected));
                }
            }
            Kernel::SoftmaxRow => {
                all.extend([write(Slot::Scores), write(Slot::InverseSums)]);
                if self.lse {
                    all.push(write(Slot::Operand(Operand::Lse)));
                }
            }
            Kernel::ValuesTile | Kernel::ValuesDirect => {
                let out = Slot::Operand(Operand::O);
                all.extend([read(Slot::Scores), read(Slot::InverseSums), write(out)]);
                if self.parts {
                    all.push(write(Slot::Carried));
                }
            }
            Kernel::Weights => all.extend([
                read(Slot::Scores),
                read(Slot::InverseSums),
                write(Slot::Operand(Operand::Weights)),
            ]),
        }
        all.sort_by_key(|binding| binding.slot.number());
        all
    }
}

/// What is bound, always under the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Slot {
    Params,
    Operand(Operand),
    Scores,
    InverseSums,
    Projected,
    Carried,
}

impl Slot {
    pub(crate) fn number(self) -> u32 {
        match self {
            Self::Params => 0,
            Self::Operand(operand) => match operand {
                Operand::Q => 1,
                Operand::K => 2,
                Operand::V => 3,
                Operand::O => 4,
                Operand::Bias => 5,
                Operand::Mask => 6,
                Operand::KvLens => 7,
                Operand::AlibiSlopes => 8,
                Operand::Sinks => 9,
                Operand::Lse => 10,
                Operand::W => 12,
                Operand::Weights => 13,
            },
            Self::Scores => 11,
            Self::InverseSums => 14,
            Self::Projected => 15,
            Self::Carried => 16,
        }
    }
}

/// A binding of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Binding {
    pub(crate) slot: Slot,
    pub(crate) writes: bool,
}
