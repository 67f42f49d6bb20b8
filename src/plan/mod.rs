//! [`Plan`]: which kernels, tiles, chunks and dispatches serve a problem on a device. A pure
//! function; no device is touched.

mod choice;
mod explain;
mod memory;
mod split;

use std::sync::Arc;

use crate::blueprint::Blueprint;
use crate::caps::Caps;
use crate::error::{Error, Operand, Result, named};
use crate::family::Family;
use crate::kernel::Tiles;
use crate::layout::Layout;
use crate::problem::AttentionProblem;
use crate::shader::compose;
use crate::slot::Slot;
use crate::tile::Tile;
use crate::tuning::Tuning;
use choice::{preference, stages, untrusted, wasteful};

/// Scratch that a plan takes unless told otherwise, where the device's limits allow it.
pub(crate) const DEFAULT_BUDGET: u64 = 64 << 20;

/// Most floating-point operations of a fused dispatch for any GPU: a second where 0.3 TFLOP/s are done.
pub(crate) const DISPATCH_FLOP: u64 = 300_000_000_000;

/// The same for a device, a second on the slowest of its kind. For a large card more is better: wgpu has one dispatch wait
/// for the one before, and of 512 workgroups (16k x 16k at head_dim 128, two heads) one that runs 400 at a time runs
/// 112 by themselves.
pub(crate) fn dispatch_flop(caps: &Caps, family: Family) -> u64 {
    let discrete = caps.device_type == wgpu::DeviceType::DiscreteGpu;
    let matrices = caps.matrix.as_ref().is_some_and(|units| units.tested == Some(Ok(())));
    let times = match (discrete, matrices) {
        _ if caps.on_cpu() => 1,
        (true, true) if family == Family::FusedMatrix => 8,
        (true, true) => 4,
        (false, true) if family == Family::FusedMatrix => 2,
        // With f16 they are not the slowest.
        (true, false) if caps.shader_f16 => 2,
        _ => 1,
    };
    times * DISPATCH_FLOP
}

/// What a tile of the tuning table is for.
const TUNED: &str = "the fastest by the tuning table";

/// How attention is computed on the GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Path {
    /// Scores, softmax and values as three kernels, the scores in scratch memory.
    Staged,
    /// All in one kernel by online softmax: no score leaves it (FlashAttention, Dao 2022).
    Fused,
}

impl Path {
    /// Every path.
    pub const ALL: &'static [Self] = &[Self::Staged, Self::Fused];
}

impl std::fmt::Display for Path {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Staged => "staged",
            Self::Fused => "fused",
        })
    }
}

impl std::str::FromStr for Path {
    type Err = Error;

    /// Reads what `Display` writes.
    ///
    /// # Errors
    /// [`Error::Name`].
    fn from_str(s: &str) -> Result<Self> {
        named(Self::ALL, s, "GPU path")
    }
}

/// What a caller may impose on a plan; the default leaves every choice to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlanOptions {
    /// Force a path.
    pub path: Option<Path>,
    /// Most bytes of scratch memory. The result does not depend on it, except in its rounding where so
    /// few rows fit that they fill no tile of the kernel.
    pub scratch_budget: Option<u64>,
    /// Force a family of kernels.
    pub family: Option<Family>,
    /// Force a family of kernels with some of its sizes.
    pub tile: Option<Tile>,
    /// Force how many splits of the keys are worked on side by side, or at most so many where the keys are
    /// too few (Flash-Decoding); 1 forbids it. Fused kernels alone can.
    pub splits: Option<usize>,
    /// Launch no split without keys, where their lengths lie on the GPU: a small kernel counts the splits, and
    /// an indirect dispatch takes its size from there. Without it the surplus of splits ends at once, which is
    /// cheaper as long as there are few: the plan's own choice is never more than fill the device, however
    /// long a cache may grow. The device must be capable of indirect dispatches.
    pub indirect: bool,
    /// What was measured on the caller's adapter; counts where neither a family nor a tile is forced.
    pub tuning: Option<Arc<Tuning>>,
}

/// One dispatch of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Dispatch {
    /// The kernel's name.
    pub kernel: &'static str,
    /// Workgroups along x, y and z.
    pub groups: [u32; 3],
    /// Those are the most: the GPU counts how many of them there are.
    pub indirect: bool,
    pub(crate) stage: usize,
    /// Its uniform block.
    pub(crate) block: usize,
}

/// A kernel's composed text, for reading and validating.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Shader {
    /// The kernel's name.
    pub name: &'static str,
    /// The WGSL.
    pub wgsl: String,
    /// Bytes of workgroup memory that it declares.
    pub workgroup_bytes: u32,
    /// Threads of a workgroup.
    pub threads: u32,
    /// Binding numbers, ascending.
    pub bindings: Vec<u32>,
}

/// Heads `[head, head + heads)` of batch x heads, and query rows `[row, row + rows)` of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) head: usize,
    pub(crate) heads: usize,
    pub(crate) row: usize,
    pub(crate) rows: usize,
}

/// The part of a caller's buffer that is bound, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

impl Window {
    /// Of an operand without elements.
    pub(crate) const NONE: Self = Self { start: 0, end: 0 };

    /// From a layout's first element, rounded down to what bindings must be aligned to, to its last, rounded
    /// up to a whole word. The extent has been validated.
    pub(crate) fn of(layout: Layout, shape: [usize; 4], bytes: usize, caps: &Caps) -> Self {
        Self::between(layout.offset, layout.extent(shape), bytes, caps)
    }

    /// The same from element `offset` to before element `extent`; nothing where that is 0.
    pub(crate) fn between(offset: usize, extent: u128, bytes: usize, caps: &Caps) -> Self {
        let (bytes, extent) = (bytes as u64, extent as u64);
        if extent == 0 {
            return Self::NONE;
        }
        let first = offset as u64 * bytes;
        // 16 keeps the parity of vec4 reads whatever the device asks for.
        let align = u64::from(caps.storage_alignment).max(16);
        Self { start: first / align * align, end: (extent * bytes).next_multiple_of(4) }
    }

    /// The window of what begins so many bytes into its buffer.
    pub(crate) fn behind(self, bytes: u64) -> Self {
        if self.end == self.start {
            return self;
        }
        Self { start: self.start.saturating_add(bytes), end: self.end.saturating_add(bytes) }
    }

    /// Whether two windows of one buffer have a byte in common.
    pub(crate) fn meets(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }
}

/// How one problem is served on one kind of device. `Display` explains it.
///
/// ```
/// use wgpu_attention::{AttentionProblem, Caps, Plan, PlanOptions};
/// let problem = AttentionProblem::new(1, 32, 8, 4096, 4096, 128, 128);
/// let plan = Plan::new(&problem, &Caps::minimal(), &PlanOptions::default())?;
/// assert!(plan.scratch_bytes() <= 128 << 20);
/// assert!(plan.dispatches().all(|dispatch| dispatch.groups.iter().all(|&n| n <= 65535)));
/// # Ok::<(), wgpu_attention::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    problem: AttentionProblem,
    caps: Caps,
    tiles: Tiles,
    stages: Vec<Blueprint>,
    heads_per_chunk: usize,
    rows_per_chunk: usize,
    /// Splits of the keys and fewest keys of one; 0 splits where the keys are not split.
    splits: usize,
    split_least: usize,
    budget: u64,
    reasons: Vec<String>,
}

impl Plan {
    /// Plans a problem for a device.
    ///
    /// # Errors
    /// Those of [`AttentionProblem::validate`]; [`Error::KernelUnfit`] for an option that cannot be
    /// met; [`Error::LimitExceeded`] where an operand is larger than one binding may be, or the
    /// scratch budget smaller than one row of scores.
    pub fn new(problem: &AttentionProblem, caps: &Caps, options: &PlanOptions) -> Result<Self> {
        problem.validate()?;
        let mut chosen: Option<(Tiles, Vec<Blueprint>)> = None;
        let mut reasons = Vec::new();
        let mut unfit = None;
        let forced = options.tile.map(|tile| tile.family).or(options.family);
        let tuned = options.tuning.as_ref().filter(|_| forced.is_none()).and_then(|t| t.get(problem, caps));
        let tuned = tuned.map(|tile| (tile, TUNED));
        let own = preference(caps).into_iter().map(|(family, what_for)| (Tile::of(family), what_for));
        for (mut tile, what_for) in tuned.into_iter().chain(own) {
            let family = tile.family;
            let asked = forced.is_none_or(|asked| asked == family)
                && options.family.is_none_or(|asked| asked == family)
                && options.path.is_none_or(|path| path == family.path());
            if !asked {
                reasons.push(format!("{family} kernels: not what the caller asks for"));
                continue;
            }
            tile = options.tile.unwrap_or(tile);
            let fits = tile.resolve(problem, caps).and_then(|tiles| {
                if family.path() == Path::Staged && options.splits.is_some_and(|n| n > 1) {
                    return Err("it does not split the keys".into());
                }
                let stages = stages(tiles, problem, caps)?;
                let forced = forced == Some(family);
                match untrusted(family, caps, forced)
                    .or_else(|| wasteful(tiles, problem, forced || what_for == TUNED))
                {
                    Some(why) => Err(why),
                    None => Ok((tiles, stages)),
                }
            });
            match (fits, &chosen) {
                (Ok((tiles, stages)), None) => {
                    reasons.push(format!("{tile} kernels, {what_for}: taken"));
                    chosen = Some((tiles, stages));
                }
                (Ok(_), Some(_)) => {
                    reasons.push(format!("{family} kernels, {what_for}: they would fit, too"))
                }
                (Err(why), _) => {
                    let source = if what_for == TUNED { " from the tuning table" } else { "" };
                    reasons.push(format!("{tile} kernels{source} do not fit: {why}"));
                    // What a device can mend, or the caller, is better to hear than what no driver has.
                    if unfit.as_ref().is_none_or(|(of, _): &(Family, _)| of.lacks(caps).is_some()) {
                        unfit = Some((family, why));
                    }
                }
            }
        }
        let Some((tiles, stages)) = chosen else {
            let (kernel, why) = match (unfit, forced) {
                (Some((family, why)), _) => (family.to_string(), why),
                (None, Some(family)) => {
                    (family.to_string(), "it belongs to another path than the one asked for".into())
                }
                (None, None) => ("any kernel".into(), "the path has none".into()),
            };
            return Err(Error::KernelUnfit { kernel, why });
        };
        let mut plan = Self {
            problem: problem.clone(),
            caps: caps.clone(),
            tiles,
            stages,
            heads_per_chunk: 1,
            rows_per_chunk: 1,
            splits: 0,
            split_least: 0,
            budget: options.scratch_budget.unwrap_or(DEFAULT_BUDGET),
            reasons,
        };
        plan.check_windows()?;
        plan.unpack()?;
        plan.split(options.splits);
        plan.map_mask();
        plan.choose_chunks()?;
        plan.check_groups()?;
        if options.indirect {
            plan.count_splits();
        }
        Ok(plan)
    }

    /// The problem that this plan serves.
    pub fn problem(&self) -> &AttentionProblem {
        &self.problem
    }

    /// How attention is computed.
    pub fn path(&self) -> Path {
        self.family().path()
    }

    /// The family of kernels.
    pub fn family(&self) -> Family {
        self.tiles.family
    }

    /// The family with the sizes that were chosen, as [`PlanOptions::tile`] would force them.
    pub fn tile(&self) -> Tile {
        Tile::chosen(&self.tiles)
    }

    /// The kernels' names, in the order of their dispatches.
    pub fn kernels(&self) -> Vec<&'static str> {
        self.stages.iter().map(|stage| stage.kernel.name()).collect()
    }

    /// Bytes of scratch memory: exactly what is allocated for this plan alone.
    pub fn scratch_bytes(&self) -> u64 {
        let slots = [
            Slot::Scores,
            Slot::InverseSums,
            Slot::Projected,
            Slot::KeyTerms,
            Slot::UnpackedK,
            Slot::UnpackedV,
            Slot::Carried,
            Slot::Bundle,
            Slot::MaskMap,
            Slot::Lengths,
            Slot::Launch,
        ];
        slots.map(|slot| self.scratch_of(slot)).iter().sum()
    }

    /// Query rows and keys of the tiles in which the boolean mask is mapped: a tile that it drops as a
    /// whole costs nothing, one that it keeps costs what it would without a mask. `None` where no map
    /// is made.
    ///
    /// ```
    /// use wgpu_attention::{AttentionProblem, Caps, Layout, Plan, PlanOptions};
    /// let mask = Some(Layout::broadcast([1, 1, 4096, 4096]));
    /// let problem = AttentionProblem { mask, ..AttentionProblem::new(1, 32, 8, 4096, 4096, 128, 128) };
    /// let plan = Plan::new(&problem, &Caps::minimal(), &PlanOptions::default())?;
    /// assert!(plan.mask_tile().is_some_and(|[rows, keys]| rows * keys <= 64 * 64));
    /// # Ok::<(), wgpu_attention::Error>(())
    /// ```
    pub fn mask_tile(&self) -> Option<[usize; 2]> {
        let mapped = self.stages.iter().any(|stage| stage.mapped);
        self.tiles.map().filter(|_| mapped).map(|tile| [tile.rows as usize, tile.keys as usize])
    }

    /// Splits of the keys that workgroups take side by side, to be joined by a dispatch more
    /// (Flash-Decoding); 1 where the keys are not split.
    ///
    /// ```
    /// use wgpu_attention::{AttentionProblem, Caps, Plan, PlanOptions};
    /// // A step of decoding against a cache of 8192 keys.
    /// let problem = AttentionProblem::new(1, 32, 8, 1, 8192, 128, 128);
    /// assert!(Plan::new(&problem, &Caps::minimal(), &PlanOptions::default())?.splits() > 8);
    /// # Ok::<(), wgpu_attention::Error>(())
    /// ```
    pub fn splits(&self) -> usize {
        self.splits.max(1)
    }

    /// Bytes of o, lse and weights.
    pub fn output_bytes(&self) -> u64 {
        [Operand::O, Operand::Lse, Operand::Weights]
            .into_iter()
            .filter(|&operand| self.problem.layout(operand).is_some())
            .map(|operand| {
                let elements: u64 = self.problem.shape(operand).iter().map(|&n| n as u64).product();
                elements * self.problem.element_bytes(operand) as u64
            })
            .sum()
    }

    /// Into how many chunks of batch x heads x rows the work is cut to stay inside the budget.
    pub fn chunks(&self) -> usize {
        if self.problem.rows() == 0 {
            return 0;
        }
        let heads = self.problem.batch * self.problem.heads_q;
        heads.div_ceil(self.heads_per_chunk) * self.problem.seq_q.div_ceil(self.rows_per_chunk)
    }

    /// Every dispatch, in order.
    pub fn dispatches(&self) -> impl Iterator<Item = Dispatch> + '_ {
        (0..self.chunks()).flat_map(move |index| {
            let chunk = self.chunk(index);
            let parts = self.parts();
            self.stages.iter().enumerate().flat_map(move |(stage, blueprint)| {
                let groups = self.groups(blueprint, chunk);
                // The terms of a head's keys serve all chunks of its rows.
                let again = chunk.row > 0 && blueprint.kernel.is_of_keys();
                let due = groups > 0 && !again && (index == 0 || !blueprint.kernel.is_once());
                let repeats = if blueprint.parts { parts } else { usize::from(due) };
                (0..repeats).map(move |part| Dispatch {
                    kernel: blueprint.kernel.name(),
                    groups: fold(groups, self.caps.max_dispatch),
                    indirect: blueprint.counted && blueprint.split,
                    stage,
                    block: index * parts + part,
                })
            })
        })
    }

    /// The composed shaders, in the order of their dispatches.
    pub fn shaders(&self) -> Vec<Shader> {
        self.stages
            .iter()
            .map(|stage| Shader {
                name: stage.kernel.name(),
                wgsl: compose(stage),
                workgroup_bytes: stage.workgroup_bytes(),
                threads: stage.threads(),
                bindings: stage.bindings().iter().map(|binding| binding.slot.number()).collect(),
            })
            .collect()
    }

    pub(crate) fn caps(&self) -> &Caps {
        &self.caps
    }

    pub(crate) fn tiles(&self) -> &Tiles {
        &self.tiles
    }

    pub(crate) fn stages(&self) -> &[Blueprint] {
        &self.stages
    }

    /// Workgroups of a stage for a chunk.
    fn groups(&self, stage: &Blueprint, chunk: Chunk) -> u64 {
        let splits = if stage.split { self.splits as u64 } else { 1 };
        splits * stage.groups(&self.problem, chunk.heads as u64, chunk.rows as u64)
    }

    pub(crate) fn chunk(&self, index: usize) -> Chunk {
        let p = &self.problem;
        let slices = p.seq_q.div_ceil(self.rows_per_chunk);
        let head = index / slices * self.heads_per_chunk;
        let row = index % slices * self.rows_per_chunk;
        Chunk {
            head,
            heads: self.heads_per_chunk.min(p.batch * p.heads_q - head),
            row,
            rows: self.rows_per_chunk.min(p.seq_q - row),
        }
    }
}

/// `groups` workgroups over three dimensions of at most `most` each. The kernels number them
/// linearly and ignore the surplus.
pub(crate) fn fold(groups: u64, most: u32) -> [u32; 3] {
    let most = u64::from(most);
    let x = groups.min(most);
    let y = groups.div_ceil(x).min(most);
    let z = groups.div_ceil(x * y);
    [x as u32, y as u32, z as u32]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folding_covers_every_group() {
        for groups in [1, 2, 65535, 65536, 65535 * 65535, 65535 * 65535 + 1, u64::from(u32::MAX)] {
            let [x, y, z] = fold(groups, 65535).map(u64::from);
            assert!(x * y * z >= groups && x <= 65535 && y <= 65535 && z <= 65535, "{groups}");
        }
    }

    #[test]
    fn chunks_cover_every_row_once_and_stay_inside_the_budget() {
        for budget in [300_u64, 5_000, 70_000, 1 << 30] {
            let problem = AttentionProblem::new(2, 3, 1, 37, 50, 8, 8);
            let options = PlanOptions { scratch_budget: Some(budget), ..PlanOptions::default() };
            let plan = Plan::new(&problem, &Caps::minimal(), &options).unwrap();
            assert!(plan.scratch_bytes() <= budget, "{budget}");
            let mut seen = vec![0; problem.rows()];
            for chunk in (0..plan.chunks()).map(|i| plan.chunk(i)) {
                for head in chunk.head..chunk.head + chunk.heads {
                    for row in chunk.row..chunk.row + chunk.rows {
                        seen[head * problem.seq_q + row] += 1;
                    }
                }
            }
            assert!(seen.iter().all(|&n| n == 1), "{budget}");
        }
    }
}
