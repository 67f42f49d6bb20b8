//! Merging partial results: attention over disjoint sets of keys, computed apart, becomes attention
//! over all of them. Here is what a merge is; `kernel` has the shader, `encode` the way to it, and
//! `oracle` what both are held to.

mod encode;
pub(crate) mod kernel;
pub(crate) mod oracle;

pub use encode::MergeOperands;

use crate::dtype::Dtype;
use crate::error::{Error, Operand, Result};
use crate::layout::Layout;
use crate::problem::{AttentionProblem, MAX_SEQ, whole_words};

/// Most pairs of buffers that a merge reads: with o and lse they are the eight storage buffers that every
/// device binds.
pub(crate) const MOST_PARTIALS: usize = 3;

/// Most parts of a row. A thread looks at each twice, and lavapipe cuts it off after 65535 iterations.
const MOST_PARTS: usize = 1 << 14;

/// Partial results that lie in one pair of buffers: o and lse of one or more parts of the keys.
///
/// Both tensors have any strides, so that what was computed in one shape can be merged in another: see
/// [`MergeProblem`] for a prefix that many sequences share. A stride of 0 repeats a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Partials {
    /// How many parts lie here.
    pub parts: usize,
    /// Where the first part's o lies: `[batch, heads_q, seq_q, head_dim_v]`.
    pub o: Layout,
    /// Elements from one part's o to the next one's.
    pub o_step: usize,
    /// Where the first part's lse lies: `[batch, heads_q, seq_q, 1]`, f32, natural logarithms.
    pub lse: Layout,
    /// Elements from one part's lse to the next one's.
    pub lse_step: usize,
}

impl Partials {
    /// The one result that [`Attention::encode`](crate::Attention::encode) writes for `problem`, which asks
    /// for [`lse`](AttentionProblem::lse).
    pub fn of(problem: &AttentionProblem) -> Self {
        let [batch, heads, rows, width] = problem.shape(Operand::O);
        Self { o: problem.o, ..Self::stacked(1, batch, heads, rows, width) }
    }

    /// Contiguous `[parts, batch, heads_q, seq_q, head_dim_v]` and `[parts, batch, heads_q, seq_q]`.
    pub const fn stacked(
        parts: usize,
        batch: usize,
        heads_q: usize,
        seq_q: usize,
        head_dim_v: usize,
    ) -> Self {
        let rows = batch.saturating_mul(heads_q).saturating_mul(seq_q);
        Self {
            parts,
            o: Layout::bhsd(heads_q, seq_q, head_dim_v),
            o_step: rows.saturating_mul(head_dim_v),
            lse: Layout::bhsd(heads_q, seq_q, 1),
            lse_step: rows,
        }
    }

    /// One past the largest index of all parts' o or lse; 0 where there is no row.
    fn extent(&self, operand: Operand, shape: [usize; 4]) -> u128 {
        let (layout, step) =
            if operand == Operand::Lse { (self.lse, self.lse_step) } else { (self.o, self.o_step) };
        match layout.extent(shape) {
            0 => 0,
            one => one.saturating_add((self.parts as u128).saturating_sub(1) * step as u128),
        }
    }
}

/// One merge of partial results: sizes, element types and layouts, but no data.
///
/// Each part `i` is attention of the same queries over its own set of keys, which no other part has seen,
/// and gives `o_i` and `lse_i`. Then
///
/// ```text
/// m = max lse_i        w_i = exp(lse_i - m)
/// o = sum w_i o_i / sum w_i        lse = m + ln(sum w_i)
/// ```
///
/// are those of attention over all of these keys (Milakov & Gimelshein 2018; Flash-Decoding, Dao 2023;
/// FlashInfer's `merge_states`). They are partial results again: merges may be merged. A part with
/// `lse = -inf` has seen no key of the row and weighs nothing, whatever lies in its o; a row that all parts
/// say this of gets `o = 0` and `lse = -inf`. A NaN in an lse, or in the o of a part that weighs, spreads to
/// that row and to no other. A [sink](AttentionProblem::sinks) must be in one part alone.
///
/// Three places where it is wanted:
///
/// - A chunk of a prompt against a cache and against itself: two calls, two pairs of buffers.
/// - A prefix that all sequences of a batch share (cascade inference): attended once, as one batch entry with
///   the queries of all sequences, then merged with what each sequence finds in its own tail.
/// - Keys in several places or on several devices: up to 16384 parts, in one pair of buffers or more.
///
/// ```
/// use wgpu_attention::{AttentionProblem, Layout, MergeProblem, Partials};
///
/// // 8 sequences with 4 new tokens each, all of them behind one prefix of 1024 tokens.
/// let (batch, seq_q, heads, dim) = (8, 4, 32, 128);
/// // The prefix sees one entry of 32 queries, [seq, heads, dim] in the order of the sequences ...
/// let prefix = AttentionProblem {
///     q: Layout::bshd(heads, batch * seq_q, dim),
///     o: Layout::bshd(heads, batch * seq_q, dim),
///     lse: true,
///     ..AttentionProblem::new(1, heads, 8, batch * seq_q, 1024, dim, dim)
/// };
/// // ... which for the merge are [batch, seq, heads, dim], and [heads, batch, seq] of lse.
/// let shared = Partials {
///     o: Layout::bshd(heads, seq_q, dim),
///     lse: Layout { offset: 0, strides: [seq_q, batch * seq_q, 1, 1] },
///     ..Partials::stacked(1, batch, heads, seq_q, dim)
/// };
/// let tail = AttentionProblem { lse: true, ..AttentionProblem::new(batch, heads, 8, seq_q, 96, dim, dim) };
/// let merge = MergeProblem::of(&tail, vec![shared, Partials::of(&tail)]);
/// assert!(prefix.validate().and(tail.validate()).and(merge.validate()).is_ok());
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MergeProblem {
    /// The partial results, one entry for each pair of buffers: 1, 2 or 3.
    pub partials: Vec<Partials>,
    /// Independent entries.
    pub batch: usize,
    /// Query heads.
    pub heads_q: usize,
    /// Queries of each head.
    pub seq_q: usize,
    /// Width of o.
    pub head_dim_v: usize,
    /// Storage of the parts' o. f32 keeps what the merge would lose to a second rounding.
    pub dtype: Dtype,
    /// Storage of o.
    pub out_dtype: Dtype,
    /// Where o's elements lie: `[batch, heads_q, seq_q, head_dim_v]`. No stride of 0.
    pub o: Layout,
    /// Also give `lse[batch, heads_q, seq_q]`, contiguous f32.
    pub lse: bool,
}

impl MergeProblem {
    /// A merge into a contiguous `[batch, heads_q, seq_q, head_dim_v]`, all of it f32, without lse.
    pub fn new(
        partials: Vec<Partials>,
        batch: usize,
        heads_q: usize,
        seq_q: usize,
        head_dim_v: usize,
    ) -> Self {
        Self {
            partials,
            batch,
            heads_q,
            seq_q,
            head_dim_v,
            dtype: Dtype::F32,
            out_dtype: Dtype::F32,
            o: Layout::bhsd(heads_q, seq_q, head_dim_v),
            lse: false,
        }
    }

    /// A merge of partial results for the queries of `problem`, whose o it reads and writes in the problem's
    /// output type, into where the problem has its o. Ragged queries are one entry.
    pub fn of(problem: &AttentionProblem, partials: Vec<Partials>) -> Self {
        let [batch, heads, rows, width] = problem.shape(Operand::O);
        let merge = Self::new(partials, batch, heads, rows, width).with_dtype(problem.out_dtype);
        Self { o: problem.o, ..merge }
    }

    /// The same merge with the parts' o and o stored as `dtype`.
    pub fn with_dtype(self, dtype: Dtype) -> Self {
        Self { dtype, out_dtype: dtype, ..self }
    }

    /// Rows over all batch entries and heads (`usize::MAX` where that overflows).
    pub fn rows(&self) -> usize {
        self.batch.saturating_mul(self.heads_q).saturating_mul(self.seq_q)
    }

    /// Bytes that a buffer needs, or a piece of one, for what [`MergeProblem::extent`] counts the elements of, in whole
    /// words; `u64::MAX` where no buffer could be so large.
    pub fn buffer_bytes(&self, partial: Option<usize>, operand: Operand) -> u64 {
        let bytes = match (partial, operand) {
            (_, Operand::Lse) => 4,
            (Some(_), _) => self.dtype.bytes(),
            (None, _) => self.out_dtype.bytes(),
        };
        whole_words(self.extent(partial, operand), bytes)
    }

    /// Elements that a slice for o ([`Operand::O`]) or lse ([`Operand::Lse`]) must hold; with `partial`, one
    /// for o or lse of that entry of [`partials`](Self::partials). 0 where the merge has no such operand.
    pub fn extent(&self, partial: Option<usize>, operand: Operand) -> u128 {
        let shape = self.shape(operand);
        match (partial, operand) {
            (_, Operand::O | Operand::Lse) if shape.contains(&0) => 0,
            (Some(at), Operand::O | Operand::Lse) => {
                self.partials.get(at).map_or(0, |partials| partials.extent(operand, shape))
            }
            (None, Operand::O) => self.o.extent(shape),
            (None, Operand::Lse) if self.lse => Layout::bhsd(self.heads_q, self.seq_q, 1).extent(shape),
            _ => 0,
        }
    }

    pub(crate) fn shape(&self, operand: Operand) -> [usize; 4] {
        let width = if operand == Operand::Lse { 1 } else { self.head_dim_v };
        [self.batch, self.heads_q, self.seq_q, width]
    }

    /// Checks every rule that does not depend on data or device.
    ///
    /// # Errors
    /// [`Error::DtypeUnfit`], [`Error::ZeroSize`], [`Error::TooLarge`], [`Error::Overlaps`], and
    /// [`Error::Partials`] where one of them is about an entry of [`partials`](Self::partials). `batch` and `seq_q` may be 0.
    pub fn validate(&self) -> Result<()> {
        if let Some(got) = [self.dtype, self.out_dtype].into_iter().find(|dtype| !dtype.is_float()) {
            return Err(Error::DtypeUnfit { operand: Operand::O, got, need: "f32, f16 or bf16" });
        }
        let too_large = |what: &str, got, max| Err(Error::TooLarge { what: what.into(), got, max });
        for (what, size) in
            [("partials", self.partials.len()), ("heads_q", self.heads_q), ("head_dim_v", self.head_dim_v)]
        {
            if size == 0 {
                return Err(Error::ZeroSize { what });
            }
        }
        for (what, size, max) in [
            ("partials", self.partials.len(), MOST_PARTIALS),
            ("batch", self.batch, MAX_SEQ),
            ("heads_q", self.heads_q, MAX_SEQ),
            ("seq_q", self.seq_q, MAX_SEQ),
            ("head_dim_v", self.head_dim_v, MAX_SEQ),
        ] {
            if size > max {
                return too_large(what, size as u128, max as u64);
            }
        }
        if let Some(at) = self.partials.iter().position(|partials| partials.parts == 0) {
            return Err(Error::ZeroSize { what: "parts" }.of_partials(Some(at)));
        }
        let parts: u128 = self.partials.iter().map(|partials| partials.parts as u128).sum();
        if parts > MOST_PARTS as u128 {
            return too_large("parts", parts, MOST_PARTS as u64);
        }
        let rows = self.batch as u128 * self.heads_q as u128 * self.seq_q as u128;
        if rows > u128::from(u32::MAX) {
            return too_large("batch * heads_q * seq_q", rows, u32::MAX.into());
        }
        // The kernel indexes elements by u32.
        for (partial, operand) in self.operands() {
            let extent = self.extent(partial, operand);
            if extent > u128::from(u32::MAX) {
                let what = format!("{operand}'s last element index");
                let error = Error::TooLarge { what, got: extent, max: u32::MAX.into() };
                return Err(error.of_partials(partial));
            }
        }
        let (operand, shape) = (Operand::O, self.shape(Operand::O));
        if !self.o.is_injective(shape) {
            return Err(Error::Overlaps { operand, shape, strides: self.o.strides });
        }
        Ok(())
    }

    /// o and lse of each entry of `partials`, then o and lse (also where that is not asked for).
    fn operands(&self) -> impl Iterator<Item = (Option<usize>, Operand)> + use<> {
        let pairs = (0..self.partials.len()).map(Some).chain([None]);
        pairs.flat_map(|partial| [(partial, Operand::O), (partial, Operand::Lse)])
    }
}

impl Error {
    /// The same error about an entry of [`MergeProblem::partials`], if it is about one.
    fn of_partials(self, at: Option<usize>) -> Self {
        match at {
            Some(at) => Self::Partials { at, error: Box::new(self) },
            None => self,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two() -> MergeProblem {
        MergeProblem::new(
            vec![Partials::stacked(1, 2, 3, 4, 5), Partials::stacked(7, 2, 3, 4, 5)],
            2,
            3,
            4,
            5,
        )
    }

    #[test]
    fn extents() {
        let p = MergeProblem { lse: true, o: Layout::bhsd(3, 4, 5).at(9), ..two() };
        let extents: Vec<u128> = p.operands().map(|(partial, operand)| p.extent(partial, operand)).collect();
        assert_eq!(extents, [120, 24, 7 * 120, 7 * 24, 129, 24]);
        assert_eq!(two().extent(None, Operand::Lse), 0);
        assert!(matches!(two().with_dtype(Dtype::Int4).validate(), Err(Error::DtypeUnfit { .. })));
        assert_eq!(two().extent(Some(2), Operand::O), 0);
        assert_eq!(two().extent(None, Operand::Q), 0);
        let empty = MergeProblem { batch: 0, ..p };
        assert!(empty.operands().all(|(partial, operand)| empty.extent(partial, operand) == 0));
        assert!(empty.validate().is_ok());
    }

    #[test]
    fn a_part_is_what_attention_writes() {
        let attention = AttentionProblem {
            o: Layout::bshd(4, 3, 6).at(8),
            ..AttentionProblem::new(2, 4, 2, 3, 9, 16, 6)
        };
        let partials = Partials::of(&attention);
        assert_eq!((partials.parts, partials.o), (1, attention.o));
        let lse = AttentionProblem { lse: true, ..attention }.layout(Operand::Lse).unwrap();
        // [1, batch, heads, seq] there, [batch, heads, seq, 1] here.
        assert_eq!(partials.lse.index([1, 2, 1, 0]), lse.index([0, 1, 2, 1]));
    }

    #[test]
    fn a_part_of_ragged_queries_is_one_entry() {
        let plain = AttentionProblem { lse: true, ..AttentionProblem::new(3, 4, 2, 5, 9, 16, 6) };
        let ragged = plain.with_dtype(Dtype::F16).with_ragged_queries(7);
        let partials = Partials::of(&ragged);
        let lse = ragged.layout(Operand::Lse).unwrap();
        assert_eq!(partials.lse.index([0, 3, 6, 0]), lse.index([0, 0, 3, 6]));
        let merge = MergeProblem { lse: true, ..MergeProblem::of(&ragged, vec![partials]) };
        assert_eq!(merge.extent(Some(0), Operand::O), ragged.extent(Operand::O));
        assert_eq!(merge.extent(Some(0), Operand::Lse), ragged.extent(Operand::Lse));
        assert_eq!((merge.rows(), merge.dtype, merge.o), (4 * 7, Dtype::F16, ragged.o));
        assert_eq!(merge.validate(), Ok(()));
    }
}
