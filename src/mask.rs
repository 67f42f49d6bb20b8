//! Which keys a query may see: positions, causal masks, windows. `shaders/mask.wgsl` is the twin
//! of [`AttentionProblem::kv_range`].

use std::ops::Range;

use crate::problem::AttentionProblem;

/// Where query 0 stands among the keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Align {
    /// Query `i` stands at key `i` (PyTorch's `is_causal`).
    TopLeft,
    /// The last query stands at the last valid key: query `i` at `i + len_k - seq_q`
    /// (FlashAttention, and every KV cache). With more queries than keys, early ones stand before
    /// the first key.
    BottomRight,
}

impl Align {
    /// The position of query 0, in keys.
    pub fn offset(self, seq_q: usize, len_k: usize) -> i64 {
        match self {
            Self::TopLeft => 0,
            Self::BottomRight => (len_k as i64).saturating_sub(seq_q as i64),
        }
    }
}

impl std::fmt::Display for Align {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::TopLeft => "top-left",
            Self::BottomRight => "bottom-right",
        })
    }
}

/// A sliding window, inclusive on both sides, as FlashAttention counts: `left: Some(3)` keeps the
/// key at the query's position and three before it. `None` is unbounded.
///
/// Hugging Face's `sliding_window = W` keeps W keys: that is `left: Some(W - 1)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Window {
    /// Keys kept before the query's position.
    pub left: Option<usize>,
    /// Keys kept after the query's position.
    pub right: Option<usize>,
}

impl AttentionProblem {
    /// The keys that causality, the window and the key length leave to query `row` of a batch
    /// entry with `len_k` valid keys. A boolean mask or a bias of -inf may drop more.
    pub fn kv_range(&self, row: usize, len_k: usize) -> Range<usize> {
        self.kv_range_of(row, self.seq_q, len_k)
    }

    /// The same of an entry with `len_q` queries of its own.
    pub(crate) fn kv_range_of(&self, row: usize, len_q: usize, len_k: usize) -> Range<usize> {
        let len_k = len_k.min(self.seq_kv);
        let (mut lo, mut hi) = (0, len_k as i64);
        let position = (row as i64).saturating_add(self.positions_align().offset(len_q, len_k));
        if self.causal.is_some() {
            hi = hi.min(position.saturating_add(1));
        }
        if let Some(window) = self.window {
            if let Some(left) = window.left {
                lo = lo.max(position.saturating_sub(left.min(i64::MAX as usize) as i64));
            }
            if let Some(right) = window.right {
                let right = right.min(i64::MAX as usize >> 1) as i64;
                hi = hi.min(position.saturating_add(right).saturating_add(1));
            }
        }
        let hi = hi.max(0) as usize;
        (lo as usize).min(hi)..hi
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(seq_q: usize, seq_kv: usize) -> AttentionProblem {
        AttentionProblem::new(1, 1, 1, seq_q, seq_kv, 8, 8)
    }

    #[test]
    fn causal_alignments() {
        let top = AttentionProblem { causal: Some(Align::TopLeft), ..problem(3, 5) };
        assert_eq!((0..3).map(|i| top.kv_range(i, 5)).collect::<Vec<_>>(), [0..1, 0..2, 0..3]);
        let bottom = AttentionProblem { causal: Some(Align::BottomRight), ..problem(3, 5) };
        assert_eq!((0..3).map(|i| bottom.kv_range(i, 5)).collect::<Vec<_>>(), [0..3, 0..4, 0..5]);
        // A shorter key length moves the queries with it; early rows then see nothing.
        assert_eq!((0..3).map(|i| bottom.kv_range(i, 2)).collect::<Vec<_>>(), [0..0, 0..1, 0..2]);
    }

    #[test]
    fn windows_are_inclusive() {
        let window = Some(Window { left: Some(2), right: Some(1) });
        let p = AttentionProblem { window, ..problem(4, 8) };
        assert_eq!(p.kv_range(0, 8), 2..6);
        assert_eq!(p.kv_range(3, 8), 5..8);
        let p = AttentionProblem { window, align: Align::TopLeft, ..problem(8, 3) };
        assert_eq!(p.kv_range(0, 3), 0..2);
        assert!(p.kv_range(7, 3).is_empty());
        // A causal mask says where the window stands, too, whatever `align` does.
        let p = AttentionProblem { window, causal: Some(Align::TopLeft), ..problem(4, 8) };
        assert_eq!((0..4).map(|i| p.kv_range(i, 8)).collect::<Vec<_>>(), [0..1, 0..2, 0..3, 1..4]);
        let all = Some(Window { left: Some(usize::MAX), right: Some(usize::MAX) });
        assert_eq!(AttentionProblem { window: all, ..problem(4, 8) }.kv_range(1, 8), 0..8);
    }
}
