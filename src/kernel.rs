//! The table of kernels, and the sizes of their tiles.

use crate::cache::Cache;
use crate::caps::Caps;
use crate::dtype::Dtype;
use crate::family::Family;
use crate::fused::{self, FusedRow, FusedTile};
use crate::fused_matrix::{self, FusedMatrix};
use crate::mask_map::MapTile;
use crate::problem::AttentionProblem;

/// A kernel; each has a WGSL file of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kernel {
    Project,
    NormalizeQ,
    KeyNorms,
    ProjectQ,
    ProjectK,
    UnpackK,
    UnpackV,
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
            Self::UnpackK => "unpack_k",
            Self::UnpackV => "unpack_v",
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

    /// Whether it makes something of keys, or values, that all rows of a chunk's heads read.
    pub(crate) fn is_of_keys(self) -> bool {
        matches!(self, Self::KeyNorms | Self::ProjectK) || self.unpacks()
    }

    /// Whether it makes rows of f32 of k or v.
    pub(crate) fn unpacks(self) -> bool {
        matches!(self, Self::UnpackK | Self::UnpackV)
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
    pub(crate) const fn none(family: Family) -> Self {
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

    /// Of a kernel that unpacks rows of so many elements.
    pub(crate) fn unrolled(width: usize) -> Self {
        let row = FusedRow { width: width as u32, ..FusedRow::NONE };
        Self { row, ..Self::none(Family::FusedRow) }
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
/// all. On a GPU only the rounding of f32 sums grows with them, which matrix units may cut off instead.
pub(crate) fn part_keys(problem: &AttentionProblem, caps: &Caps) -> usize {
    if !caps.on_cpu() {
        return if problem.dtype == Dtype::F32 { 8192 } else { 16384 };
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
pub(crate) const ELEMENT_LANES: u32 = 64;

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
