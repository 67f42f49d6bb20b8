//! Which families there are for a device, and which kernels one takes for a problem.

use crate::blueprint::Blueprint;
use crate::caps::Caps;
use crate::error::{Operand, Result};
use crate::family::Family;
use crate::kernel::{Kernel, Tiles, looks_after_lengths};
use crate::plan::Path;
use crate::problem::{AttentionProblem, KeyTerms, Similarity};

/// Elements of k or v that the row kernel's masked index reaches: 2^26 quads.
pub(super) const MOST_ROW_ELEMENTS: u128 = 1 << 28;

/// Every family, the best for a device first, with what it is for.
pub(super) fn preference(caps: &Caps) -> Vec<(Family, &'static str)> {
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

/// Why kernels that fit are no good here, unless they are asked for: where a matrix has more rows for nothing than
/// for queries, reading keys is all that takes time, and one subgroup for a tile of them has few loads on their way.
pub(super) fn wasteful(tiles: Tiles, problem: &AttentionProblem, forced: bool) -> Option<String> {
    let (rows, edge) = (problem.owned_rows(), tiles.matrix.edge as usize);
    let wastes = tiles.family == Family::FusedMatrix && 2 * rows < edge && !forced;
    wastes.then(|| format!("{rows} rows leave most of a matrix of {edge} empty"))
}

/// Why kernels that fit are not trusted. Drivers have been met whose cooperative matrices give wrong
/// products: they are taken only where a test has found them right, and refused where it has not.
pub(super) fn untrusted(family: Family, caps: &Caps, forced: bool) -> Option<String> {
    let matrix = caps.matrix.as_ref().filter(|_| family == Family::FusedMatrix)?;
    match &matrix.tested {
        Some(Ok(())) => None,
        Some(Err(why)) => Some(format!("the self-test of cooperative matrices failed: {why}")),
        None => (!forced).then(|| "Attention::self_test has not tried cooperative matrices yet".into()),
    }
}

/// The kernels of a family for a problem, in the order of their dispatches; or why one does not fit.
pub(super) fn stages(
    tiles: Tiles,
    problem: &AttentionProblem,
    caps: &Caps,
) -> Result<Vec<Blueprint>, String> {
    if tiles.family.path() == Path::Fused && problem.key_terms() == KeyTerms::Projected {
        return Err("it multiplies queries and keys, and additive scores are no such product".into());
    }
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
        Family::FusedRow if tiles.row.unpacked => {
            vec![new(Kernel::UnpackK), new(Kernel::UnpackV), new(Kernel::FusedRow)]
        }
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
    match problem.key_terms() {
        KeyTerms::None => {}
        KeyTerms::InverseNorms => stages.insert(0, new(Kernel::KeyNorms)),
        KeyTerms::Projected => stages.insert(0, new(Kernel::ProjectK)),
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
    match problem.similarity {
        Similarity::Dot | Similarity::ScaledDot => {}
        Similarity::Bilinear { .. } => stages.insert(0, new(Kernel::Project)),
        Similarity::Cosine => stages.insert(0, new(Kernel::NormalizeQ)),
        Similarity::Additive { .. } => stages.insert(0, new(Kernel::ProjectQ)),
    }
    if problem.weights {
        stages.push(new(Kernel::Weights));
    }
    match stages.iter().find_map(|stage| stage.unfit(caps)) {
        Some(why) => Err(why),
        None => Ok(stages),
    }
}
