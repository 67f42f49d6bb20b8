//! The map of a boolean mask (`shaders/mask_map.wgsl` is the twin): which tiles of pairs it drops as a
//! whole, so that a fused kernel skips their keys, and which it keeps, so that the kernel need not ask.

use crate::error::Operand;
use crate::problem::AttentionProblem;

/// Tiles of a word, along the keys: two bits each.
const WORD_TILES: u64 = 16;

/// Fewest multiply-additions of head_dim and head_dim_v for each byte of the mask at which making the
/// map is a trifle beside them: a GPU does some ten of them in the time that a byte of memory takes. (On
/// a CPU adapter, which gathers the mask word by word, it is a sixth where nothing can be skipped.)
const LEAST_PRODUCTS_A_BYTE: u128 = 128;

/// Fewest tiles of keys among which some may be skipped: with fewer a dispatch more is not won back.
const LEAST_TILES: usize = 4;

/// Query rows and keys of a tile: those that a workgroup of the kernel takes in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MapTile {
    pub(crate) rows: u32,
    pub(crate) keys: u32,
}

/// How often the map repeats along batch, heads and rows: once along a dimension of stride 0.
fn dims(problem: &AttentionProblem, rows: usize) -> [u64; 3] {
    let [batch, heads, seq_q, _] = problem.shape(Operand::Mask);
    // A dimension of one element has a stride of 0 in the shaders' parameters as well.
    let own = |dim: usize, n: usize| match problem.mask {
        Some(layout) if layout.strides[dim] > 0 => n as u64,
        _ => 1,
    };
    [own(0, batch), own(1, heads), own(2, seq_q).div_ceil(rows as u64)]
}

/// Words of the map.
pub(crate) fn words(problem: &AttentionProblem, tile: MapTile) -> u64 {
    let along_keys = (problem.seq_kv as u64).div_ceil(WORD_TILES * u64::from(tile.keys));
    dims(problem, tile.rows as usize).into_iter().fold(along_keys, u64::saturating_mul)
}

/// Why a map would cost more than it could save; `None` where it may pay.
///
/// Making it reads each byte of the mask once, where the kernel alone reads it anew for each head and
/// batch entry that share it. A map that finds nothing to skip is therefore at worst about one more
/// reading; a skipped tile saves all products of its pairs, and the loads of its keys and values.
pub(crate) fn futile(problem: &AttentionProblem, tile: MapTile) -> Option<String> {
    let p = problem;
    if p.packs() {
        return Some("tiles have rows of several heads".into());
    }
    if p.seq_q < tile.rows as usize {
        // Every byte would be read for the map, and so few rows wait for that dispatch to end.
        return Some(format!("{} query rows do not fill a tile of {}", p.seq_q, tile.rows));
    }
    if p.seq_kv < LEAST_TILES * tile.keys as usize {
        return Some(format!("{} keys are too few tiles of {}", p.seq_kv, tile.keys));
    }
    let [batch, heads, rows] = dims(p, 1).map(u128::from);
    let products = p.rows() as u128 * (p.head_dim + p.head_dim_v) as u128 / (batch * heads * rows).max(1);
    (products < LEAST_PRODUCTS_A_BYTE).then(|| {
        format!("{products} multiply-additions a byte of the mask are fewer than {LEAST_PRODUCTS_A_BYTE}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Layout;

    fn problem(dims: [usize; 4]) -> AttentionProblem {
        let mask = Some(Layout::broadcast(dims));
        AttentionProblem { mask, ..AttentionProblem::new(2, 6, 2, 100, 1100, 16, 16) }
    }

    const TILE: MapTile = MapTile { rows: 64, keys: 32 };

    #[test]
    fn what_the_mask_repeats_is_mapped_once() {
        // Three words of 512 keys, two tiles of rows.
        assert_eq!(words(&problem([2, 6, 100, 1100]), TILE), 3 * 2 * 6 * 2);
        assert_eq!(words(&problem([1, 1, 100, 1100]), TILE), 3 * 2);
        assert_eq!(words(&problem([2, 1, 1, 1100]), TILE), 3 * 2);
        assert_eq!(words(&problem([1, 6, 1, 1100]), TILE), 3 * 6);
    }

    #[test]
    fn it_is_made_where_it_may_pay() {
        // 32 multiply-additions a pair: only where several heads share the mask.
        assert!(futile(&problem([2, 6, 100, 1100]), TILE).is_some());
        assert!(futile(&problem([1, 6, 100, 1100]), TILE).is_some());
        assert!(futile(&problem([2, 1, 100, 1100]), TILE).is_none());
        assert!(futile(&problem([1, 1, 1, 1100]), TILE).is_none());
        let few = AttentionProblem { seq_q: 8, ..problem([1, 1, 1, 1100]) };
        assert!(futile(&few, TILE).is_some());
        let short = AttentionProblem { seq_kv: 100, ..problem([1, 1, 1, 100]) };
        assert!(futile(&short, TILE).is_some());
    }
}
