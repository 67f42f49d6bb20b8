//! [`Plan`]: which kernels, tiles, chunks and dispatches serve a problem on a device. A pure
//! function; no device is touched.

use std::sync::Arc;

use crate::cache::Cache;
use crate::caps::Caps;
use crate::error::{Error, Operand, Result};
use crate::kernel::{
    Blueprint, Family, Kernel, Keys, Slot, Tiles, bundle_words, key_parts, looks_after_lengths, part_keys,
};
use crate::layout::Layout;
use crate::mask::Align;
use crate::mask_map::{self, MapTile};
use crate::params::{ParamLayout, Params};
use crate::problem::{AttentionProblem, MAX_SEQ, Similarity};
use crate::shader::compose;
use crate::tile::Tile;
use crate::tuning::Tuning;

/// Scratch that a plan takes unless told otherwise, where the device's limits allow it.
const DEFAULT_BUDGET: u64 = 64 << 20;

/// Most floating-point operations of a fused dispatch: a second on a GPU that does 0.3 TFLOP/s, and
/// still thousands of workgroups for one that does a thousand times as many.
const DISPATCH_FLOP: u64 = 300_000_000_000;

/// What a tile of the tuning table is for.
const TUNED: &str = "the fastest by the tuning table";

/// Workgroups that a split of the keys aims at: enough to fill a large GPU's hundred and more
/// multiprocessors a few times, or a processor's threads.
const WANTED_GROUPS: usize = 256;
const WANTED_ON_CPU: usize = 16;

/// Fewest keys of a split that nobody asked for: joining it costs about as much as a few dozen keys.
const LEAST_SPLIT: usize = 256;

/// Elements of k or v that the row kernel's masked index reaches: 2^26 quads.
const MOST_ROW_ELEMENTS: u128 = 1 << 28;

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
    pub const ALL: [Self; 2] = [Self::Staged, Self::Fused];
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
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|path| path.to_string() == s)
            .ok_or_else(|| format!("{s:?} is no GPU path; there are staged and fused"))
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
    const NONE: Self = Self { start: 0, end: 0 };

    /// From a layout's first element, rounded down to what bindings must be aligned to, to its last, rounded
    /// up to a whole word. The extent has been validated.
    pub(crate) fn of(layout: Layout, shape: [usize; 4], bytes: usize, caps: &Caps) -> Self {
        let (bytes, extent) = (bytes as u64, layout.extent(shape) as u64);
        if extent == 0 {
            return Self::NONE;
        }
        let first = layout.offset as u64 * bytes;
        // 16 keeps the parity of vec4 reads whatever the device asks for.
        let align = u64::from(caps.storage_alignment).max(16);
        Self { start: first / align * align, end: (extent * bytes).next_multiple_of(4) }
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
                match untrusted(family, caps, forced == Some(family)) {
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
        plan.split(options.splits);
        plan.map_mask();
        plan.choose_chunks()?;
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
                let splits = if blueprint.split { self.splits as u64 } else { 1 };
                let groups = splits * blueprint.groups(&self.problem, chunk.heads as u64, chunk.rows as u64);
                let due = groups > 0 && (index == 0 || !blueprint.kernel.is_once());
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

    /// Bytes from one uniform block to the next.
    pub(crate) fn params_step(&self) -> u32 {
        (size_of::<Params>() as u32).next_multiple_of(self.caps.uniform_alignment.max(4))
    }

    /// How many uniform blocks there are: one for each part of the keys of each chunk.
    pub(crate) fn blocks(&self) -> usize {
        self.chunks() * self.parts()
    }

    /// Parts of the keys that are worked on one after the other.
    fn parts(&self) -> usize {
        if self.splits > 0 { 1 } else { key_parts(&self.problem) }
    }

    /// A uniform block.
    pub(crate) fn params(&self, block: usize) -> Params {
        let p = &self.problem;
        let parts = self.parts();
        let chunk = self.chunk(block / parts);
        let part = block % parts;
        let align = |align: Align| match align {
            Align::TopLeft => 1,
            Align::BottomRight => 2,
        };
        // Beyond both lengths a window bounds nothing, and positions stay far inside an i32.
        let side = |side: Option<usize>| side.map_or(2 * MAX_SEQ, |n| n.min(2 * MAX_SEQ)) as i32;
        let window = p.window.unwrap_or_default();
        let layout = |operand: Operand| {
            let layout = p.layout(operand).unwrap_or(Layout { offset: 0, strides: [0; 4] });
            let first = self.window(operand).start as usize / p.element_bytes(operand);
            ParamLayout::new(layout, p.shape(operand), first)
        };
        let per_head = matches!(p.similarity, Similarity::Bilinear { per_head: true, .. });
        let step = self.tiles.map().map_or(1, |tile| tile.keys);
        let [pages, max_blocks, total_kv] = match p.cache {
            Cache::Paged { pages, max_blocks, .. } => [pages, max_blocks, 0],
            Cache::Ragged { total } => [0, 0, total],
            _ => [0; 3],
        };
        Params {
            batch: p.batch as u32,
            heads_q: p.heads_q as u32,
            group_size: p.group_size() as u32,
            seq_q: p.seq_q as u32,
            seq_kv: p.seq_kv as u32,
            head_dim: p.head_dim as u32,
            head_dim_v: p.head_dim_v as u32,
            query_dim: p.query_dim() as u32,
            head_first: chunk.head as u32,
            head_count: chunk.heads as u32,
            row_first: chunk.row as u32,
            row_count: chunk.rows as u32,
            score_stride: self.score_stride() as u32,
            projected_stride: self.projected_stride() as u32,
            key_first: (part * part_keys(p)) as u32,
            key_end: if part + 1 == parts { u32::MAX } else { ((part + 1) * part_keys(p)) as u32 },
            splits: self.splits as u32,
            split_step: step,
            split_least: (self.split_least as u32).div_ceil(step),
            split_tiles: self.split_tiles() as u32,
            most_groups: self.caps.max_dispatch,
            total_q: p.total_q.unwrap_or(0) as u32,
            total_kv: total_kv as u32,
            pages: pages as u32,
            max_blocks: max_blocks as u32,
            scale: p.effective_scale() as f32,
            softcap: p.softcap.unwrap_or(1.0),
            w_head_stride: if per_head { (p.query_dim() * p.head_dim) as u32 } else { 0 },
            causal: p.causal.map_or(0, align),
            window_align: align(p.align),
            window_left: side(window.left),
            window_right: side(window.right),
            alibi_align: align(p.alibi_align()),
            q: layout(Operand::Q),
            k: layout(Operand::K),
            v: layout(Operand::V),
            o: layout(Operand::O),
            bias: layout(Operand::Bias),
            mask: layout(Operand::Mask),
        }
    }

    /// The bytes of an operand's buffer that its kernels bind.
    pub(crate) fn window(&self, operand: Operand) -> Window {
        let p = &self.problem;
        p.layout(operand).map_or(Window::NONE, |layout| {
            Window::of(layout, p.shape(operand), p.element_bytes(operand), &self.caps)
        })
    }

    /// Bytes of a scratch buffer; 0 when this plan has none of that kind.
    pub(crate) fn scratch_of(&self, slot: Slot) -> u64 {
        let rows = (self.heads_per_chunk * self.rows_per_chunk) as u64;
        if self.problem.rows() == 0 {
            return 0;
        }
        let staged = self.path() == Path::Staged;
        match slot {
            Slot::Scores if staged => 4 * rows * self.score_stride(),
            // Whole quads, so that the buffer can be bound whatever it is read as.
            Slot::InverseSums if staged => 4 * rows.next_multiple_of(4),
            Slot::Scores | Slot::InverseSums => 0,
            Slot::Bundle if self.stages.iter().any(|stage| stage.bundled) => 4 * bundle_words(&self.problem),
            Slot::Bundle => 0,
            Slot::MaskMap if self.mask_tile().is_some() => self.map_bytes(),
            Slot::MaskMap => 0,
            Slot::Lengths if looks_after_lengths(&self.problem) => 4 * self.problem.batch as u64,
            Slot::Lengths => 0,
            Slot::Launch if self.stages.iter().any(|stage| stage.counted) => 16,
            Slot::Launch => 0,
            Slot::Projected => 4 * rows * self.projected_stride(),
            Slot::Carried => rows * self.carried_bytes(),
            Slot::Params | Slot::Operand(_) => 0,
        }
    }

    /// Elements from one row of scores to the next: whole value steps of either family.
    fn score_stride(&self) -> u64 {
        (self.problem.seq_kv as u64).next_multiple_of(16).max(16)
    }

    fn projected_stride(&self) -> u64 {
        match self.problem.similarity {
            Similarity::Bilinear { .. } => (self.problem.head_dim as u64).next_multiple_of(4),
            _ => 0,
        }
    }

    /// Bytes of a row's sums between two parts of the keys, or of all splits.
    fn carried_bytes(&self) -> u64 {
        // The fused kernels carry a row's maximum and sum as well.
        let quads = (self.problem.head_dim_v as u64).div_ceil(4) + u64::from(self.path() == Path::Fused);
        match self.splits as u64 {
            0 if self.parts() > 1 => 16 * quads,
            splits => 16 * quads * splits,
        }
    }

    /// Rows that one dispatch of a fused kernel may take before a slow GPU's watchdog (2 s, some) sees
    /// it: a part of the keys of so many rows is at most [`DISPATCH_FLOP`].
    fn rows_of_a_dispatch(&self) -> u64 {
        if self.path() == Path::Staged {
            return u64::MAX;
        }
        let p = &self.problem;
        let keys = p.seq_kv.clamp(1, if self.splits > 0 { MAX_SEQ } else { part_keys(p) }) as u64;
        (DISPATCH_FLOP / (2 * keys * (p.head_dim + p.head_dim_v) as u64)).max(64)
    }

    fn check_windows(&self) -> Result<()> {
        for operand in self.problem.operands() {
            let window = self.window(operand);
            let need = window.end - window.start;
            if need > self.caps.max_storage_binding {
                return Err(Error::LimitExceeded {
                    what: format!("{operand}: bytes of one storage binding"),
                    need,
                    got: self.caps.max_storage_binding,
                });
            }
        }
        Ok(())
    }

    /// Splits the keys where the rows alone would leave most of a device idle, or where the caller asks.
    fn split(&mut self, asked: Option<usize>) {
        let p = &self.problem;
        let (Some(tile), false) = (self.tiles.map(), p.rows() == 0 || p.seq_kv == 0) else { return };
        let heads = (p.batch * p.heads_q) as u64;
        let groups = |stage: &Blueprint| stage.groups(p, heads, p.seq_q as u64) as usize;
        let groups = self.stages.iter().find(|stage| stage.kernel.is_fused()).map_or(1, groups).max(1);
        let wanted = if self.caps.on_cpu() { WANTED_ON_CPU } else { WANTED_GROUPS };
        // What the queries of an entry see at most: a window's keys, wherever it stands.
        let window = p.window.unwrap_or_default();
        let sides = window.left.zip(window.right.or(p.causal.map(|_| 0)));
        let keys = sides.map_or(p.seq_kv, |(left, right)| {
            left.saturating_add(right).saturating_add(p.seq_q).min(p.seq_kv)
        });
        let own = (wanted / groups).min(keys.div_ceil(LEAST_SPLIT));
        if asked.unwrap_or(own) < 2 {
            return;
        }
        // Whole steps of the kernel, and no more iterations than a part has. The shader shares the steps out
        // that there are; a window that begins inside a step takes part of one more.
        let step = tile.keys as usize;
        let most = part_keys(p) / step * step;
        let share = keys.div_ceil(asked.unwrap_or(own)).next_multiple_of(step).min(most);
        self.splits = (keys + if sides.is_some() { step - 1 } else { 0 }).div_ceil(share);
        self.split_least = if asked.is_some() { step } else { LEAST_SPLIT };
        let why = if asked.is_some() { "as asked" } else { "to fill the device" };
        self.reasons.push(format!(
            "the keys are split {} times, up to {share} keys each, over {groups} tiles of rows: {why}",
            self.splits
        ));
        for stage in &mut self.stages {
            if stage.kernel.is_fused() {
                *stage = stage.split();
            }
        }
        self.stages.push(Blueprint::new(Kernel::Merge, self.tiles, &self.problem, &self.caps));
    }

    /// Tiles of rows of the kernel whose keys are split, of all rows.
    fn split_tiles(&self) -> u64 {
        let p = &self.problem;
        let all = |stage: &Blueprint| stage.groups(p, (p.batch * p.heads_q) as u64, p.seq_q as u64);
        self.stages.iter().find(|stage| stage.split).map_or(0, all)
    }

    /// Has the splits that have keys counted on the GPU.
    fn count_splits(&mut self) {
        let p = &self.problem;
        let count = Blueprint::new(Kernel::Count, self.tiles, p, &self.caps);
        let why = if self.splits < 2 {
            "the keys are not split"
        } else if !count.kv_lens && !count.looked_after && count.keys != Keys::Ragged {
            "the host knows the lengths"
        } else if self.chunks() != 1 || self.scratch_bytes() + 16 > self.budget {
            "it serves one chunk, and takes 16 bytes of scratch"
        } else {
            for stage in self.stages.iter_mut().filter(|stage| stage.split || stage.kernel == Kernel::Merge) {
                *stage = stage.counted();
            }
            // After the lengths have been looked after.
            let at = self.stages.iter().position(|stage| stage.split).unwrap_or(0);
            self.stages.insert(at, count.counted());
            "as asked"
        };
        self.reasons.push(format!("splits counted on the GPU, an indirect dispatch: {why}"));
    }

    fn map_bytes(&self) -> u64 {
        self.tiles.map().map_or(0, |tile| mask_map::words(&self.problem, tile).saturating_mul(4))
    }

    /// Puts the map of the boolean mask before the fused kernel where it may pay and there is room for it.
    fn map_mask(&mut self) {
        let Some(tile) = self.tiles.map().filter(|_| self.problem.mask.is_some()) else { return };
        let reason = match self.mapped_stages(tile) {
            Ok(stages) => {
                self.stages = stages;
                let bytes = self.map_bytes();
                format!("the mask is mapped in tiles of {} x {} pairs, {bytes} B", tile.rows, tile.keys)
            }
            Err(why) => format!("the mask is not mapped: {why}"),
        };
        self.reasons.push(reason);
    }

    /// The stages with a map of the mask; or why there is none.
    fn mapped_stages(&self, tile: MapTile) -> Result<Vec<Blueprint>, String> {
        if let Some(why) = mask_map::futile(&self.problem, tile) {
            return Err(why);
        }
        // What the rows need comes first, and most of the budget stays theirs.
        let need = self.map_bytes();
        let rows = self.row_bytes() + self.fixed_bytes();
        let room = (self.budget / 4)
            .min(self.budget.saturating_sub(rows))
            .min(self.caps.max_storage_binding)
            .min(self.caps.max_buffer);
        if need > room {
            return Err(format!("the map has {need} bytes, there is room for {room}"));
        }
        let map = Blueprint::new(Kernel::MaskMap, self.tiles, &self.problem, &self.caps);
        let mut stages = vec![map];
        stages.extend(self.stages.iter().map(
            |stage| {
                if stage.kernel.is_fused() { stage.mapped() } else { *stage }
            },
        ));
        match stages.iter().find_map(|stage| stage.unfit(&self.caps)) {
            Some(why) => Err(why),
            None => Ok(stages),
        }
    }

    /// Bytes of a row in the scratch buffer where it takes most.
    fn widest_row_bytes(&self) -> u64 {
        let score_bytes = if self.path() == Path::Staged { 4 * self.score_stride() } else { 0 };
        score_bytes.max(4 * self.projected_stride()).max(self.carried_bytes())
    }

    /// Bytes of scratch for a row.
    fn row_bytes(&self) -> u64 {
        let score_bytes = if self.path() == Path::Staged { 4 * self.score_stride() + 4 } else { 0 };
        score_bytes + 4 * self.projected_stride() + self.carried_bytes()
    }

    /// Bytes of scratch beside the rows'.
    fn fixed_bytes(&self) -> u64 {
        // The row sums are allocated in whole quads.
        let sums = if self.path() == Path::Staged { 12 } else { 0 };
        sums + [Slot::Bundle, Slot::MaskMap, Slot::Lengths, Slot::Launch]
            .map(|slot| self.scratch_of(slot))
            .iter()
            .sum::<u64>()
    }

    /// Whole heads if at least one fits the budget, else rows of one head.
    fn choose_chunks(&mut self) -> Result<()> {
        let p = &self.problem;
        if p.rows() == 0 {
            return Ok(());
        }
        let binding = self.caps.max_storage_binding.min(self.caps.max_buffer);
        let widest = self.widest_row_bytes();
        if widest > binding {
            return Err(Error::LimitExceeded {
                what: "scratch: bytes of one row in one storage binding".into(),
                need: widest,
                got: binding,
            });
        }
        let (row_bytes, fixed) = (self.row_bytes(), self.fixed_bytes());
        if row_bytes + fixed > self.budget {
            return Err(Error::LimitExceeded {
                what: "scratch_budget: bytes of scratch for one row".into(),
                need: row_bytes + fixed,
                got: self.budget,
            });
        }
        // Kernels index scratch by u32.
        let by_scratch = |bytes: u64, each: u64| bytes.checked_div(each).unwrap_or(u64::MAX);
        let rows = by_scratch(self.budget - fixed, row_bytes)
            .min(by_scratch(binding, widest))
            .min(by_scratch(u64::from(u32::MAX), widest / 4))
            .min(self.rows_of_a_dispatch());
        let rows = usize::try_from(rows).unwrap_or(usize::MAX);
        // Packed tiles have whole groups, where those fit.
        let group = if p.packs() && rows >= p.owned_rows() { p.group_size() } else { 1 };
        if group == 1 {
            self.stages.iter_mut().for_each(|stage| stage.packed = false);
        }
        if rows >= p.seq_q {
            self.heads_per_chunk = (rows / p.seq_q / group * group).min(p.batch * p.heads_q);
            self.rows_per_chunk = p.seq_q;
        } else {
            // Whole tiles where at least one fits.
            let tile = self
                .tiles
                .scores_rows
                .max(self.tiles.values_rows)
                .max(self.tiles.fused.tile_q())
                .max(self.tiles.matrix.tile_q())
                .max(self.tiles.row.tile_q()) as usize;
            self.rows_per_chunk = match rows {
                _ if rows >= tile => rows / tile * tile,
                // So that no chunk straddles two tiles of the mask's map.
                _ if self.scratch_of(Slot::MaskMap) > 0 => {
                    (1..=rows).rev().find(|&rows| tile.is_multiple_of(rows)).unwrap_or(1)
                }
                _ => rows,
            };
        }
        // Dynamic offsets of uniform blocks are u32.
        let blocks = self.blocks() as u64 * u64::from(self.params_step());
        let most = self.caps.max_buffer.min(u64::from(u32::MAX));
        if blocks > most {
            return Err(Error::LimitExceeded {
                what: "scratch_budget: bytes of uniform blocks for so many chunks".into(),
                need: blocks,
                got: most,
            });
        }
        Ok(())
    }
}

/// Every family, the best for a device first, with what it is for.
fn preference(caps: &Caps) -> Vec<(Family, &'static str)> {
    let fused_tile = (Family::FusedTile, "tiles in workgroup memory and no score in scratch, for GPUs");
    // Nobody has measured it on a GPU. On NVIDIA's, a broadcast from workgroup memory beats a shuffle by a
    // tenth in other people's kernels.
    let subgroup = (Family::FusedSubgroup, "the same by subgroup operations, for GPUs where they are fast");
    let matrix = (Family::FusedMatrix, "products on matrix units, for f16 tensors on GPUs that have them");
    let staged_tile = (Family::StagedTile, "tiles in workgroup memory, for GPUs and weights");
    let direct = (Family::StagedDirect, "no barrier and no reuse but in registers, for adapters on a CPU");
    let row = (Family::FusedRow, "no barrier and no score in scratch, for adapters on a CPU");
    if caps.on_cpu() {
        vec![row, direct, fused_tile, subgroup, staged_tile, matrix]
    } else {
        vec![matrix, fused_tile, subgroup, staged_tile, row, direct]
    }
}

/// Why kernels that fit are not trusted. Drivers have been met whose cooperative matrices give wrong
/// products: they are taken only where a test has found them right, and refused where it has not.
fn untrusted(family: Family, caps: &Caps, forced: bool) -> Option<String> {
    let matrix = caps.matrix.as_ref().filter(|_| family == Family::FusedMatrix)?;
    match &matrix.tested {
        Some(Ok(())) => None,
        Some(Err(why)) => Some(format!("the self-test of cooperative matrices failed: {why}")),
        None => (!forced).then(|| "Attention::self_test has not tried cooperative matrices yet".into()),
    }
}

/// The kernels of a family for a problem, in the order of their dispatches; or why one does not fit.
fn stages(tiles: Tiles, problem: &AttentionProblem, caps: &Caps) -> Result<Vec<Blueprint>, String> {
    let new = |kernel| Blueprint::new(kernel, tiles, problem, caps);
    let mut stages = match tiles.family {
        Family::StagedTile => [Kernel::ScoresTile, Kernel::SoftmaxRow, Kernel::ValuesTile].map(new).to_vec(),
        Family::StagedDirect => {
            [Kernel::ScoresDirect, Kernel::SoftmaxRow, Kernel::ValuesDirect].map(new).to_vec()
        }
        Family::FusedTile => vec![new(Kernel::FusedTile)],
        Family::FusedSubgroup => vec![new(Kernel::FusedSubgroup)],
        Family::FusedMatrix => match tiles.matrix.unfit(problem, caps) {
            Some(why) => return Err(why),
            None => vec![new(Kernel::FusedMatrix)],
        },
        Family::FusedRow => vec![new(Kernel::FusedRow)],
    };
    if tiles.family.path() == Path::Fused {
        if problem.weights {
            return Err("it makes no weights, which are as large as the scores".into());
        }
        let longest = problem.extent(Operand::K).max(problem.extent(Operand::V));
        if tiles.family == Family::FusedRow && longest > MOST_ROW_ELEMENTS {
            return Err(format!("it indexes k and v up to {MOST_ROW_ELEMENTS} elements, not {longest}"));
        }
    }
    if stages.iter().any(|stage| stage.wants_bundle(caps)) {
        for stage in stages.iter_mut().filter(|stage| stage.wants_bundle(caps)) {
            *stage = stage.bundled();
        }
        stages.insert(0, new(Kernel::Bundle));
    }
    if looks_after_lengths(problem) {
        stages.insert(0, new(Kernel::Lengths));
    }
    if problem.layout(Operand::W).is_some() {
        stages.insert(0, new(Kernel::Project));
    }
    if problem.weights {
        stages.push(new(Kernel::Weights));
    }
    match stages.iter().find_map(|stage| stage.unfit(caps)) {
        Some(why) => Err(why),
        None => Ok(stages),
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

impl std::fmt::Display for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let p = &self.problem;
        let t = &self.tiles;
        writeln!(
            f,
            "attention of {} x {} heads ({} key-value), {} queries, {} keys, head_dim {}, head_dim_v {}, {}",
            p.batch, p.heads_q, p.heads_kv, p.seq_q, p.seq_kv, p.head_dim, p.head_dim_v, p.dtype
        )?;
        if (p.cache, p.stored_kv()) != (Cache::Contiguous, p.dtype) {
            writeln!(f, "keys and values in {}, {}", p.cache, p.stored_kv())?;
        }
        if let Some(total) = p.total_q {
            writeln!(f, "ragged queries, {total} in all")?;
        }
        writeln!(f, "on {}", self.caps.adapter)?;
        let how = match self.path() {
            Path::Staged => "scores in scratch memory, then softmax, then values",
            Path::Fused => "online softmax, no score leaves the kernel",
        };
        writeln!(f, "path {}: {how}", self.path())?;
        for reason in &self.reasons {
            writeln!(f, "  {reason}")?;
        }
        for stage in &self.stages {
            let tile = match stage.kernel {
                Kernel::ScoresTile | Kernel::ScoresDirect => {
                    format!("{} queries x {} keys", t.scores_rows, t.scores_keys)
                }
                Kernel::SoftmaxRow => format!("{} rows x {} lanes", t.softmax_rows, t.softmax_lanes),
                Kernel::ValuesTile | Kernel::ValuesDirect => format!(
                    "{} queries x {} of head_dim_v, {} keys a step",
                    t.values_rows,
                    4 * t.values_lanes,
                    t.values_step
                ),
                Kernel::Project | Kernel::Weights | Kernel::Bundle | Kernel::Merge => {
                    "element by element".into()
                }
                Kernel::Lengths => "an entry each".into(),
                Kernel::Count => "once".into(),
                Kernel::MaskMap => match t.map() {
                    Some(tile) => format!("{} queries x {} keys, two bits each", tile.rows, tile.keys),
                    None => "no tiles".into(),
                },
                Kernel::FusedTile | Kernel::FusedSubgroup => format!(
                    "{} queries x {} keys, {} of a row at a time{}, {} registers a thread",
                    t.fused.tile_q(),
                    t.fused.tile_kv(),
                    4 * t.fused.slice,
                    if t.fused.both { " of keys and values together" } else { "" },
                    t.fused.registers()
                ),
                Kernel::FusedMatrix => format!(
                    "{} queries x {} keys, matrices of {e} x {e}, {} registers a thread for fragments",
                    t.matrix.tile_q(),
                    t.matrix.tile_kv,
                    t.matrix.registers(),
                    e = t.matrix.edge,
                ),
                Kernel::FusedRow => format!(
                    "{} queries x {} keys, {} queries and {} variables a thread",
                    t.row.tile_q(),
                    t.row.keys,
                    t.row.rows,
                    t.row.variables()
                ),
            };
            writeln!(
                f,
                "  {:<14} {tile}; {} threads, {} B of workgroup memory (of {}), {} storage buffers (of {})",
                stage.kernel.name(),
                stage.threads(),
                stage.workgroup_bytes(),
                self.caps.max_workgroup_bytes,
                stage.bindings().len() - 1,
                self.caps.max_storage_buffers,
            )?;
        }
        writeln!(
            f,
            "{} chunks of {} heads x {} rows; scratch {} B (budget {} B), outputs {} B, {} dispatches",
            self.chunks(),
            self.heads_per_chunk,
            self.rows_per_chunk,
            self.scratch_bytes(),
            self.budget,
            self.output_bytes(),
            self.dispatches().count(),
        )
    }
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
