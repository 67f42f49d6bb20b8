//! The table of kernels, and the blueprint of one: everything that is compiled in.

use crate::cache::Cache;
use crate::caps::{Caps, MANY_REGISTERS};
use crate::dtype::Dtype;
use crate::error::{Error, Operand, Result};
use crate::fused::{self, FusedRow, FusedTile};
use crate::fused_matrix::{self, FusedMatrix};
use crate::linear::kernel::Linear;
use crate::mask_map::{self, MapTile};
use crate::plan::Path;
use crate::problem::{AttentionProblem, KeyTerms};

/// A family of kernels: one way to compute attention. Each belongs to a [`Path`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Family {
    /// Staged products, tiles of both operands in workgroup memory: for GPUs.
    StagedTile,
    /// Staged products from registers fed straight from storage, one operand at workgroup-uniform
    /// addresses and no barrier: for adapters that run on a CPU.
    StagedDirect,
    /// One kernel, a workgroup for a tile of query rows, keys and values in workgroup memory: for
    /// GPUs, at any limits.
    FusedTile,
    /// The same with subgroup operations in the place of most of the workgroup memory: for GPUs that
    /// offer them, with subgroups of any size from 4 to 128.
    FusedSubgroup,
    /// One kernel whose products run on cooperative matrices, f16 tensors alone: for GPUs with matrix
    /// units. See [`Attention::self_test`](crate::Attention::self_test).
    FusedMatrix,
    /// One kernel, a thread for a few query rows, no workgroup memory: for adapters that run on a CPU.
    FusedRow,
}

impl Family {
    /// Every family.
    pub const ALL: &'static [Self] = &[
        Self::StagedTile,
        Self::StagedDirect,
        Self::FusedTile,
        Self::FusedSubgroup,
        Self::FusedMatrix,
        Self::FusedRow,
    ];

    /// The path that these kernels make up.
    pub fn path(self) -> Path {
        match self {
            Self::StagedTile | Self::StagedDirect => Path::Staged,
            Self::FusedTile | Self::FusedSubgroup | Self::FusedMatrix | Self::FusedRow => Path::Fused,
        }
    }

    /// Its name among the families of its path.
    pub fn name(self) -> &'static str {
        match self {
            Self::StagedTile | Self::FusedTile => "tile",
            Self::StagedDirect => "direct",
            Self::FusedSubgroup => "tile_subgroup",
            Self::FusedMatrix => "tile_matrix",
            Self::FusedRow => "row",
        }
    }

    /// What a device lacks for these kernels whatever the problem; `None` where it lacks nothing.
    ///
    /// ```
    /// use wgpu_attention::{Caps, Family};
    /// let least = Caps::minimal();
    /// assert!(Family::FusedTile.lacks(&least).is_none() && Family::FusedSubgroup.lacks(&least).is_some());
    /// ```
    pub fn lacks(self, caps: &Caps) -> Option<String> {
        let tile = |subgroup| fused::tile(1, 64, 64, subgroup, caps);
        match self {
            Self::FusedSubgroup => tile(true).subgroup_unfit(caps),
            Self::FusedMatrix => fused_matrix::lacks(caps),
            Self::StagedTile | Self::StagedDirect | Self::FusedTile | Self::FusedRow => None,
        }
    }

    /// The families of a path.
    pub fn of(path: Path) -> impl Iterator<Item = Self> {
        Self::ALL.iter().copied().filter(move |family| family.path() == path)
    }
}

/// `staged:tile`, `fused:tile`, ...
impl std::fmt::Display for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.path(), self.name())
    }
}

impl std::str::FromStr for Family {
    type Err = Error;

    /// Reads what `Display` writes.
    ///
    /// # Errors
    /// [`Error::Name`].
    fn from_str(s: &str) -> Result<Self> {
        Self::ALL.iter().copied().find(|family| family.to_string() == s).ok_or_else(|| {
            let all: Vec<_> = Self::ALL.iter().map(Self::to_string).collect();
            Error::Name { got: s.into(), why: format!("is no kernel family; there are {}", all.join(", ")) }
        })
    }
}

/// A kernel; each has a WGSL file of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kernel {
    Project,
    NormalizeQ,
    KeyNorms,
    ProjectQ,
    ProjectK,
    ScoresTile,
    ScoresDirect,
    SoftmaxRow,
    ValuesTile,
    ValuesDirect,
    Weights,
    Lengths,
    Bundle,
    MaskMap,
    FusedTile,
    FusedSubgroup,
    FusedMatrix,
    FusedRow,
    Count,
    Merge,
}

impl Kernel {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Project => "project",
            Self::NormalizeQ => "normalize_q",
            Self::KeyNorms => "key_norms",
            Self::ProjectQ => "project_q",
            Self::ProjectK => "project_k",
            Self::ScoresTile => "scores_tile",
            Self::ScoresDirect => "scores_direct",
            Self::SoftmaxRow => "softmax_row",
            Self::ValuesTile => "values_tile",
            Self::ValuesDirect => "values_direct",
            Self::Weights => "weights",
            Self::Lengths => "lengths",
            Self::Bundle => "bundle",
            Self::MaskMap => "mask_map",
            Self::FusedTile => "fused_tile",
            Self::FusedSubgroup => "fused_tile_subgroup",
            Self::FusedMatrix => "fused_tile_matrix",
            Self::FusedRow => "fused_row",
            Self::Count => "count",
            Self::Merge => "merge",
        }
    }

    pub(crate) fn is_fused(self) -> bool {
        self.is_fused_tile() || matches!(self, Self::FusedMatrix | Self::FusedRow)
    }

    /// Whether it is one of those that share the text of the fused tile kernel.
    pub(crate) fn is_fused_tile(self) -> bool {
        matches!(self, Self::FusedTile | Self::FusedSubgroup)
    }

    /// Whether what it makes serves every chunk: it is dispatched before the first alone.
    pub(crate) fn is_once(self) -> bool {
        matches!(self, Self::Lengths | Self::Bundle | Self::MaskMap | Self::Count)
    }

    /// Whether it makes the queries that scores are computed of.
    pub(crate) fn is_of_queries(self) -> bool {
        matches!(self, Self::Project | Self::NormalizeQ | Self::ProjectQ)
    }

    /// Whether it makes the terms of keys.
    pub(crate) fn is_of_keys(self) -> bool {
        matches!(self, Self::KeyNorms | Self::ProjectK)
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
    /// Those of the fused tile kernels.
    pub(crate) fused: FusedTile,
    /// Those of the fused kernel on cooperative matrices.
    pub(crate) matrix: FusedMatrix,
    /// Those of the fused row kernel.
    pub(crate) row: FusedRow,
}

impl Tiles {
    /// Of kernels that have no tiles.
    const fn none(family: Family) -> Self {
        Self {
            family,
            scores_rows: 0,
            scores_keys: 0,
            scores_lanes: 0,
            scores_step: 0,
            softmax_lanes: 0,
            softmax_rows: 0,
            values_rows: 0,
            values_lanes: 0,
            values_step: 0,
            fused: FusedTile::NONE,
            matrix: FusedMatrix::NONE,
            row: FusedRow::NONE,
        }
    }

    /// Tiles of the mask's map; `None` where the family has no use for one.
    pub(crate) fn map(&self) -> Option<MapTile> {
        match self.family {
            Family::FusedTile | Family::FusedSubgroup => {
                Some(MapTile { rows: self.fused.tile_q(), keys: self.fused.tile_kv() })
            }
            Family::FusedMatrix => Some(MapTile { rows: self.matrix.tile_q(), keys: self.matrix.tile_kv }),
            Family::FusedRow => Some(MapTile { rows: self.row.tile_q(), keys: fused::ROW_MAP_KEYS }),
            Family::StagedTile | Family::StagedDirect => None,
        }
    }
}

/// Keys of a part of the work of the kernels that sum values, a multiple of every step of theirs. On a
/// processor a thread of any family loops fewer than 40000 times for it, even where a driver unrolls nothing and
/// where a NaN makes it look twice at each of its rows: lavapipe ends a thread's loops after 65535 iterations in
/// all. On a GPU only the rounding of f32 sums grows with them.
pub(crate) fn part_keys(problem: &AttentionProblem, caps: &Caps) -> usize {
    if !caps.on_cpu() {
        return if problem.dtype == Dtype::F32 { 8192 } else { 32768 };
    }
    let widest = problem.head_dim.max(problem.head_dim_v).next_power_of_two();
    4096 * 64 / widest.clamp(64, 512)
}

/// Parts of the keys that those kernels take one after the other.
pub(crate) fn key_parts(problem: &AttentionProblem, caps: &Caps) -> usize {
    problem.seq_kv.div_ceil(part_keys(problem, caps)).max(1)
}

/// Words of the buffer that holds all lists together.
pub(crate) fn bundle_words(problem: &AttentionProblem) -> u64 {
    let table = match problem.cache {
        Cache::Paged { max_blocks, .. } => problem.batch as u64 * max_blocks as u64,
        _ => 0,
    };
    2 * problem.heads_q as u64 + 3 * problem.batch as u64 + 2 + table
}

/// Whether [`Kernel::Lengths`] looks after the lengths first: where pages might not exist, and where the
/// caller wants to know what was wrong.
pub(crate) fn looks_after_lengths(problem: &AttentionProblem) -> bool {
    problem.status || matches!(problem.cache, Cache::Paged { .. })
}

/// Threads of the element-wise kernels (project, weights, bundle, ...) and of the mask's map.
const ELEMENT_LANES: u32 = 64;

/// The one place where tile sizes are chosen.
pub(crate) fn tiles(family: Family, problem: &AttentionProblem, caps: &Caps) -> Tiles {
    let quads_v = (problem.head_dim_v as u32).div_ceil(4);
    match family {
        // 16 x 16 threads, 4 x 4 results each: 64 x 64 tiles, the classic shape that feeds each
        // multiplication-add from two quarter loads; 10 KiB (scores) and 9 KiB (values), inside the
        // default 16 KiB, so that at least one workgroup fits everywhere.
        Family::StagedTile => {
            // The reduction halves the lanes: a power of two.
            let widest = 1 << caps.max_invocations.min(caps.max_workgroup_size[0]).clamp(1, 256).ilog2();
            // A lane walks four keys at a time: more lanes than quads would idle.
            let quads = (problem.seq_kv as u32).div_ceil(4).max(1).next_power_of_two();
            let softmax_lanes = quads.min(widest);
            Tiles {
                scores_rows: 64,
                scores_keys: 64,
                scores_lanes: 16,
                scores_step: 4,
                softmax_lanes,
                softmax_rows: (64 / softmax_lanes).max(1),
                values_rows: 64,
                values_lanes: 16,
                values_step: 16,
                ..Tiles::none(family)
            }
        }
        // 16 x 4 scores or 16 quads of output a lane: fewer leave too many loads for each
        // multiplication-addition, more no longer compile to registers. A score workgroup of 8 lanes
        // wastes least at the edges. One lane walks a whole softmax row, since every barrier costs
        // more there than sharing a row saves.
        Family::StagedDirect => {
            // Long rows of few queries still want several lanes: the cores would idle.
            let wanted = if problem.rows() < 64 && problem.seq_kv > 4096 { 16 } else { 1 };
            // And no lane may pass the 65535 iterations: two for every four keys.
            let needed = problem.seq_kv.div_ceil(65536).next_power_of_two().min(256) as u32;
            let widest = 1 << caps.max_invocations.min(caps.max_workgroup_size[0]).clamp(1, 256).ilog2();
            let softmax_lanes = needed.max(wanted).min(widest);
            Tiles {
                scores_rows: 16,
                scores_keys: 32,
                scores_lanes: 8,
                scores_step: 1,
                softmax_lanes,
                softmax_rows: (16 / softmax_lanes).max(1),
                values_rows: 16,
                values_lanes: quads_v.next_power_of_two().clamp(1, 32),
                values_step: 4,
                ..Tiles::none(family)
            }
        }
        Family::FusedTile | Family::FusedSubgroup => {
            let subgroup = family == Family::FusedSubgroup;
            let fused =
                fused::tile(problem.owned_rows(), problem.head_dim, problem.head_dim_v, subgroup, caps);
            Tiles { fused, ..Tiles::none(family) }
        }
        Family::FusedMatrix => Tiles { matrix: fused_matrix::sizes(problem, caps), ..Tiles::none(family) },
        Family::FusedRow => Tiles { row: fused::row(problem, caps), ..Tiles::none(family) },
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
            Operand::K | Operand::V => problem.stored_kv(),
            _ => problem.dtype,
        };
        // The bias is read element by element, whatever its layout, and codes by the word.
        let vec4 = operand != Operand::Bias && dtype.is_float() && layout.is_vec4(problem.shape(operand)[3]);
        Some(Self { dtype, vec4, native: dtype == Dtype::F16 && caps.shader_f16 })
    }
}

/// How a kernel finds the rows of k and v: [`Cache`], with what is compiled in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Keys {
    Contiguous,
    Ragged,
    /// Rows of the ring.
    Ring(u32),
    /// Rows of a page.
    Paged(u32),
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
    /// Scores read queries that another kernel has made of q.
    pub(crate) projected: bool,
    /// What they read of keys that another kernel has made of k.
    pub(crate) key_terms: KeyTerms,
    pub(crate) softcap: bool,
    pub(crate) alibi: bool,
    pub(crate) mask: bool,
    pub(crate) kv_lens: bool,
    /// [`Kernel::Lengths`] has looked after the lengths.
    pub(crate) looked_after: bool,
    /// How rows of k and v are found; contiguous where the kernel looks for none.
    pub(crate) keys: Keys,
    pub(crate) ragged_q: bool,
    pub(crate) sinks: bool,
    pub(crate) lse: bool,
    /// The status word is there.
    pub(crate) status: bool,
    /// Keys come in several parts.
    pub(crate) parts: bool,
    /// Key lengths, slopes and sinks lie in one buffer, made by [`Kernel::Bundle`]: with a binding for
    /// each there would be more of them than the device has.
    pub(crate) bundled: bool,
    /// [`Kernel::MaskMap`] has mapped the mask's tiles.
    pub(crate) mapped: bool,
    /// Tiles take rows of all heads of a group.
    pub(crate) packed: bool,
    /// Workgroups take splits of the keys, which [`Kernel::Merge`] joins.
    pub(crate) split: bool,
    /// [`Kernel::Count`] has counted the splits that have keys: no others are launched, and joined.
    pub(crate) counted: bool,
    /// How a kernel that is a product of matrices computes it.
    pub(crate) product: Option<Linear>,
}

impl Blueprint {
    /// The blueprint of `kernel`, with only what that kernel depends on filled in: problems that
    /// differ elsewhere share the pipeline.
    pub(crate) fn new(kernel: Kernel, tiles: Tiles, problem: &AttentionProblem, caps: &Caps) -> Self {
        let io = |wanted: bool, operand| {
            let io = Io::of(problem, caps, operand).filter(|_| wanted)?;
            // An adapter on a CPU loads elements one by one: two at a time are half of the loads.
            Some(Io { native: io.native && kernel != Kernel::FusedRow, ..io })
        };
        let (bundles, maps) = (kernel == Kernel::Bundle, kernel == Kernel::MaskMap);
        let scores = kernel.is_scores() || kernel.is_fused();
        let merges = kernel == Kernel::Merge;
        let softmax = kernel == Kernel::SoftmaxRow || kernel.is_fused() || merges;
        let values = kernel.is_values() || kernel.is_fused();
        let lengths = kernel == Kernel::Lengths;
        // It asks how many keys an entry has, or gathers the list.
        let (of_queries, of_keys) = (kernel.is_of_queries(), kernel.is_of_keys());
        let counts = !of_queries && !maps && !merges;
        let looked_after = counts && !lengths && looks_after_lengths(problem);
        // Additive scores are of keys that lie in scratch, one after the other.
        let of_terms = scores && problem.key_terms() == KeyTerms::Projected;
        let finds = (scores && !of_terms) || values || lengths || bundles || of_keys;
        let product = |operand, rows, inputs| {
            let sizes = [rows, inputs, problem.compared_dim()];
            Some(Linear::product(Io::of(problem, caps, operand)?, sizes, kernel == Kernel::Project, caps))
        };
        Self {
            kernel,
            // What becomes of queries and keys before they are compared is the same for every family.
            tiles: if of_queries || of_keys { Tiles::none(Family::StagedDirect) } else { tiles },
            product: match kernel {
                Kernel::Project | Kernel::ProjectQ => product(Operand::Q, problem.seq_q, problem.query_dim()),
                Kernel::ProjectK => product(Operand::K, problem.seq_kv, problem.head_dim),
                _ => None,
            },
            q: io(of_queries || (scores && !problem.projects()), Operand::Q),
            k: io((scores && !of_terms) || of_keys, Operand::K),
            v: io(values, Operand::V),
            o: io(values || merges, Operand::O),
            bias: io(scores, Operand::Bias),
            projected: scores && problem.projects(),
            key_terms: if scores { problem.key_terms() } else { KeyTerms::None },
            softcap: scores && problem.softcap.is_some(),
            alibi: (scores || bundles) && problem.alibi,
            mask: (scores || maps) && problem.mask.is_some(),
            kv_lens: counts && problem.kv_lens && !looked_after,
            looked_after,
            keys: match problem.cache {
                Cache::Ragged { .. } if finds || (counts && !looked_after) => Keys::Ragged,
                Cache::Ring { capacity } if finds => Keys::Ring(capacity as u32),
                Cache::Paged { page_size, .. } if finds => Keys::Paged(page_size as u32),
                _ => Keys::Contiguous,
            },
            ragged_q: !maps && !of_keys && kernel != Kernel::Count && problem.total_q.is_some(),
            sinks: (softmax || bundles) && problem.sinks,
            lse: softmax && problem.lse,
            status: lengths && problem.status,
            parts: values && key_parts(problem, caps) > 1,
            bundled: false,
            mapped: false,
            packed: kernel.is_fused() && problem.packs(),
            split: false,
            counted: false,
        }
    }

    /// The same kernel for splits of the keys: what a finished row needs is the merging kernel's.
    pub(crate) fn split(self) -> Self {
        Self { split: true, parts: false, o: None, lse: false, sinks: false, ..self }
    }

    /// The same kernel where the splits that have keys have been counted.
    pub(crate) fn counted(self) -> Self {
        Self { counted: true, ..self }
    }

    /// The same kernel with its lists in one buffer.
    pub(crate) fn bundled(self) -> Self {
        Self { bundled: true, ..self }
    }

    /// The same kernel with the mask's map.
    pub(crate) fn mapped(self) -> Self {
        Self { mapped: true, ..self }
    }

    /// The bindings but the uniform block.
    pub(crate) fn storage(&self) -> impl Iterator<Item = Binding> {
        self.bindings().into_iter().filter(|binding| binding.slot != Slot::Params)
    }

    fn storage_buffers(&self) -> u32 {
        self.storage().count() as u32
    }

    /// Whether there are more bindings than the device has, and bundling could mend that.
    pub(crate) fn wants_bundle(&self, caps: &Caps) -> bool {
        self.storage_buffers() > caps.max_storage_buffers && self.lists().count() > 1
    }

    /// The lists that it reads, by the binding of each.
    pub(crate) fn lists(&self) -> impl Iterator<Item = Slot> {
        let lengths = if self.looked_after { Slot::Lengths } else { Slot::Operand(Operand::KvLens) };
        [
            (self.alibi, Slot::Operand(Operand::AlibiSlopes)),
            (self.sinks, Slot::Operand(Operand::Sinks)),
            (self.kv_lens || self.looked_after, lengths),
            (self.ragged_q, Slot::Operand(Operand::CuSeqlensQ)),
            (self.keys == Keys::Ragged, Slot::Operand(Operand::CuSeqlensK)),
            (matches!(self.keys, Keys::Paged(_)), Slot::Operand(Operand::BlockTable)),
        ]
        .into_iter()
        .filter_map(|(present, slot)| present.then_some(slot))
    }

    /// Threads of a workgroup.
    pub(crate) fn threads(&self) -> u32 {
        let t = &self.tiles;
        match self.kernel {
            Kernel::Project | Kernel::ProjectQ | Kernel::ProjectK => {
                self.product.map_or(0, |product| product.workgroup_size().iter().product())
            }
            Kernel::NormalizeQ
            | Kernel::KeyNorms
            | Kernel::Weights
            | Kernel::Lengths
            | Kernel::Bundle
            | Kernel::MaskMap
            | Kernel::Count
            | Kernel::Merge => ELEMENT_LANES,
            Kernel::FusedTile | Kernel::FusedSubgroup => t.fused.threads(),
            Kernel::FusedMatrix => t.matrix.threads(),
            Kernel::FusedRow => t.row.threads,
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
            Kernel::Project | Kernel::ProjectQ | Kernel::ProjectK => {
                self.product.map_or(0, |product| product.workgroup_bytes())
            }
            Kernel::ScoresTile => 16 * 2 * t.scores_rows * (t.scores_step + 1),
            Kernel::SoftmaxRow => 4 * self.threads(),
            // A bit for each tile of a word, twice.
            Kernel::MaskMap => 8,
            Kernel::Lengths | Kernel::Count => 4,
            Kernel::FusedTile | Kernel::FusedSubgroup => t.fused.workgroup_bytes(),
            Kernel::FusedMatrix => t.matrix.workgroup_bytes(),
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
        let group = if self.packed { problem.group_size() as u64 } else { 1 };
        let product = |rows| self.product.map_or(0, |of| of.tiles(rows, problem.compared_dim() as u64));
        let fused = |tile: u32| heads / group * tiles(rows * group, tile.max(1));
        match self.kernel {
            Kernel::Project | Kernel::ProjectQ => heads * product(rows),
            Kernel::NormalizeQ => tiles(heads * rows, ELEMENT_LANES),
            Kernel::KeyNorms => problem.key_term_heads(heads) * tiles(keys, ELEMENT_LANES),
            Kernel::ProjectK => problem.key_term_heads(heads) * product(keys),
            Kernel::ScoresTile | Kernel::ScoresDirect => {
                heads * tiles(rows, t.scores_rows) * tiles(keys, t.scores_keys)
            }
            Kernel::SoftmaxRow => tiles(heads * rows, t.softmax_rows),
            Kernel::ValuesTile | Kernel::ValuesDirect => {
                heads * tiles(rows, t.values_rows) * tiles(problem.head_dim_v as u64, 4 * t.values_lanes)
            }
            Kernel::Weights => heads * rows * tiles(keys, ELEMENT_LANES),
            Kernel::Lengths => problem.batch as u64,
            Kernel::Count => 1,
            Kernel::Bundle => tiles(bundle_words(problem), ELEMENT_LANES),
            Kernel::MaskMap => t.map().map_or(0, |tile| mask_map::words(problem, tile)),
            Kernel::FusedTile | Kernel::FusedSubgroup => fused(t.fused.tile_q()),
            Kernel::FusedMatrix => fused(t.matrix.tile_q()),
            Kernel::FusedRow => fused(t.row.tile_q()),
            Kernel::Merge => tiles(heads * rows * (problem.head_dim_v as u64).div_ceil(4), ELEMENT_LANES),
        }
    }

    /// Why this kernel cannot run on a device; `None` when it can.
    pub(crate) fn unfit(&self, caps: &Caps) -> Option<String> {
        let [x, y, _] = self.workgroup_size();
        let t = self.tiles.fused;
        if let Some(why) = t.subgroup_unfit(caps) {
            return Some(format!("{}: {why}", self.kernel.name()));
        }
        for (what, need, got) in [
            ("threads a workgroup", self.threads(), caps.max_invocations),
            ("threads along x", x, caps.max_workgroup_size[0]),
            ("threads along y", y, caps.max_workgroup_size[1]),
            ("bytes of workgroup memory", self.workgroup_bytes(), caps.max_workgroup_bytes),
            ("storage buffers", self.storage_buffers(), caps.max_storage_buffers),
        ] {
            if need > got {
                return Some(format!("{} needs {need} {what}, the device has {got}", self.kernel.name()));
            }
        }
        if self.kernel.is_fused_tile() && t.registers() > MANY_REGISTERS {
            let need = t.registers();
            return Some(format!(
                "{} needs {need} registers a thread, {MANY_REGISTERS} is the most",
                self.kernel.name()
            ));
        }
        if self.kernel == Kernel::FusedRow { self.tiles.row.unfit() } else { None }
    }

    fn workgroup_size(&self) -> [u32; 3] {
        match self.kernel {
            Kernel::ScoresTile => [self.tiles.scores_lanes, self.tiles.scores_lanes, 1],
            Kernel::ValuesTile => [self.tiles.values_lanes, self.tiles.values_lanes, 1],
            Kernel::Project | Kernel::ProjectQ | Kernel::ProjectK => {
                let [x, y] = self.product.map_or([0; 2], |product| product.workgroup_size());
                [x, y, 1]
            }
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
            (self.kernel == Kernel::Project, Operand::W),
            (self.kernel == Kernel::ProjectQ, Operand::Wq),
            (self.kernel == Kernel::ProjectK, Operand::Wk),
            (self.key_terms == KeyTerms::Projected, Operand::ScoreV),
        ] {
            if present {
                all.push(read(Slot::Operand(operand)));
            }
        }
        if !self.bundled {
            all.extend(self.lists().map(read));
        }
        for (present, binding) in [
            (self.status, write(Slot::Operand(Operand::Status))),
            (self.projected, read(Slot::Projected)),
            (self.key_terms != KeyTerms::None, read(Slot::KeyTerms)),
            (self.lse, write(Slot::Operand(Operand::Lse))),
            (self.parts || self.split, write(Slot::Carried)),
            (self.bundled, read(Slot::Bundle)),
            (self.mapped, read(Slot::MaskMap)),
            // The split kernel does not look at it: its dispatch does.
            (self.counted && self.kernel == Kernel::Merge, read(Slot::Launch)),
        ] {
            if present {
                all.push(binding);
            }
        }
        match self.kernel {
            Kernel::Project | Kernel::NormalizeQ | Kernel::ProjectQ => all.push(write(Slot::Projected)),
            Kernel::KeyNorms | Kernel::ProjectK => all.push(write(Slot::KeyTerms)),
            Kernel::ScoresTile | Kernel::ScoresDirect => all.push(write(Slot::Scores)),
            Kernel::SoftmaxRow => all.extend([write(Slot::Scores), write(Slot::InverseSums)]),
            Kernel::ValuesTile | Kernel::ValuesDirect => {
                let out = Slot::Operand(Operand::O);
                all.extend([read(Slot::Scores), read(Slot::InverseSums), write(out)]);
            }
            Kernel::Lengths => all.push(write(Slot::Lengths)),
            Kernel::Count => all.push(write(Slot::Launch)),
            Kernel::Bundle => all.push(write(Slot::Bundle)),
            Kernel::MaskMap => all.push(write(Slot::MaskMap)),
            Kernel::FusedTile | Kernel::FusedSubgroup | Kernel::FusedMatrix | Kernel::FusedRow => {
                if !self.split {
                    all.push(write(Slot::Operand(Operand::O)))
                }
            }
            Kernel::Merge => all.extend([read(Slot::Carried), write(Slot::Operand(Operand::O))]),
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
    KeyTerms,
    Carried,
    Bundle,
    MaskMap,
    Lengths,
    Launch,
    LayerProjected,
    LayerTurned,
    LayerAttended,
}

impl Slot {
    pub(crate) const fn number(self) -> u32 {
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
                Operand::BlockTable => 19,
                Operand::CuSeqlensQ => 20,
                Operand::CuSeqlensK => 21,
                Operand::Status => 22,
                Operand::KNew => 24,
                Operand::VNew => 25,
                Operand::QNew => 26,
                Operand::Rope => 27,
                Operand::QGain => 29,
                Operand::KGain => 30,
                // A linear map's, whose bindings have numbers of their own.
                Operand::X => 31,
                Operand::Y => 32,
                Operand::Wq => 36,
                Operand::Wk => 37,
                Operand::ScoreV => 38,
                Operand::Positions => 40,
            },
            Self::Scores => 11,
            Self::InverseSums => 14,
            Self::Projected => 15,
            Self::Carried => 16,
            Self::Bundle => 17,
            Self::MaskMap => 18,
            Self::Lengths => 23,
            Self::Launch => 28,
            Self::LayerProjected => 33,
            Self::LayerTurned => 34,
            Self::LayerAttended => 35,
            Self::KeyTerms => 39,
        }
    }
}

/// A binding of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Binding {
    pub(crate) slot: Slot,
    pub(crate) writes: bool,
}
