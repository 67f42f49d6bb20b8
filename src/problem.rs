//! [`AttentionProblem`]: the mathematics that one call computes, whatever the data. The only home
//! of shape rules.

use crate::cache::Cache;
use crate::dtype::Dtype;
use crate::error::{Error, Operand, Result};
use crate::layout::Layout;
use crate::mask::{Align, Window};
use crate::quant::row_elements;

/// The longest sequence: positions plus offsets plus windows then stay inside an `i32`.
pub(crate) const MAX_SEQ: usize = 1 << 28;

/// Most queries of a head whose group's rows share a tile: those of a step of decoding, also where several
/// are guessed ahead.
const MOST_PACKED: usize = 16;

/// How a query and a key are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Similarity {
    /// `q . k`, times [`AttentionProblem::scale`] if that is given (Luong 2015, eq. 8, "dot").
    Dot,
    /// `scale * (q . k)`; the scale defaults to `1/sqrt(head_dim)` (Vaswani 2017, eq. 1).
    #[default]
    ScaledDot,
    /// `qT W k` (Luong 2015, eq. 8, "general"), times the scale if that is given.
    Bilinear {
        /// Width of q; W is `[query_dim, head_dim]`.
        query_dim: usize,
        /// One W for each query head, `[heads_q, query_dim, head_dim]`, or one for all.
        per_head: bool,
    },
    /// `q . k / (max(|q|, 1e-8) max(|k|, 1e-8))`, the cosine of their angle (content addressing of the Neural
    /// Turing Machine, Graves 2014, eq. 6), times the scale if that is given: its key strength beta. A vector of
    /// zeros is compared as 0.
    Cosine,
    /// `vT tanh(Wq q + Wk k)` (Bahdanau 2014, appendix A.1.2; Luong 2015, eq. 8, "concat", where Wq and Wk are the
    /// two halves of W), times the scale if that is given. No product of matrices gives these scores: the staged
    /// kernels alone serve it on a GPU.
    Additive {
        /// Width of q; Wq is `[hidden, query_dim]`, and Wk `[hidden, head_dim]`.
        query_dim: usize,
        /// Width of v and of what it weighs.
        hidden: usize,
        /// One Wq, Wk and v for each query head, `[heads_q, ...]`, or one for all.
        per_head: bool,
    },
}

/// Norms below this one count as this one ([`Similarity::Cosine`]).
pub(crate) const LEAST_NORM: f64 = 1e-8;

/// What a kernel has made of each key before scores are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum KeyTerms {
    None,
    /// One over the key's norm.
    InverseNorms,
    /// `Wk k`.
    Projected,
}

/// The additive bias: `[batch, heads_q, seq_q, seq_kv]` with stride 0 where it is broadcast.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Bias {
    /// Its own element type, which may differ from q's.
    pub dtype: Dtype,
    /// Where its elements lie.
    pub layout: Layout,
}

/// One attention computation: sizes, element types, options and layouts, but no data.
///
/// Fill in what differs from [`AttentionProblem::new`], which gives scaled dot-product attention
/// over contiguous `[batch, heads, seq, dim]` f32 tensors:
///
/// ```
/// use wgpu_attention::{Align, AttentionProblem, Dtype, Layout};
/// let problem = AttentionProblem {
///     causal: Some(Align::BottomRight),
///     softcap: Some(50.0),
///     q: Layout::bshd(32, 128, 64), // [batch, seq, heads, dim]
///     ..AttentionProblem::new(1, 32, 8, 128, 512, 64, 64).with_dtype(Dtype::F16)
/// };
/// assert!(problem.validate().is_ok());
/// ```
///
/// Sizes belong in `new`, which lays q, k, v and o out by them: to change one afterwards leaves strides of another shape.
///
/// In order: similarity, scale, [`softcap`](Self::softcap), [`bias`](Self::bias), ALiBi, masks
/// (causal, window, boolean, key lengths: all must keep a key), softmax (with
/// [`sinks`](Self::sinks) in the denominator), weighted sum. A row that keeps no key gives zeros
/// and `lse = -inf` (with a sink: `lse = sink`).
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionProblem {
    /// Independent entries.
    pub batch: usize,
    /// Query heads.
    pub heads_q: usize,
    /// Key-value heads; query head `h` reads `h / (heads_q / heads_kv)` (GQA, Ainslie 2023).
    pub heads_kv: usize,
    /// Queries of each head.
    pub seq_q: usize,
    /// Keys of each head.
    pub seq_kv: usize,
    /// Width of k, and of q unless the similarity gives q one of its own.
    pub head_dim: usize,
    /// Width of v and o.
    pub head_dim_v: usize,
    /// Storage of q; of k and v, too, unless `kv_dtype` says otherwise.
    pub dtype: Dtype,
    /// Storage of k and v: a cache may be narrower than the queries, or quantised.
    pub kv_dtype: Option<Dtype>,
    /// Storage of o.
    pub out_dtype: Dtype,
    /// How a query and a key are compared.
    pub similarity: Similarity,
    /// Factor on the similarity; any finite number. `None` is the similarity's own default.
    pub scale: Option<f32>,
    /// `cap * tanh(s / cap)` on the scaled similarity (Gemma 2); finite and positive.
    pub softcap: Option<f32>,
    /// A bias is added to the (capped) scores. A bias of -inf excludes the key.
    pub bias: Option<Bias>,
    /// `-slope[head] * |query position - key position|` is added to the scores (ALiBi, Press 2021).
    pub alibi: bool,
    /// A boolean mask, one byte an element; non-zero keeps the key.
    pub mask: Option<Layout>,
    /// Drops keys after the query's position, and says where query 0 stands among the keys.
    pub causal: Option<Align>,
    /// Drops keys too far from the query's position.
    pub window: Option<Window>,
    /// Where query 0 stands among the keys, for window and ALiBi, unless `causal` says it.
    pub align: Align,
    /// Each batch entry has its own number of valid keys; later keys are never used.
    pub kv_lens: bool,
    /// How k and v keep the keys.
    pub cache: Cache,
    /// Queries are ragged: q and o are `[total_q, heads_q, dim]` or any layout of
    /// `[1, heads_q, total_q, dim]`, those of entry `b` from row `cu_seqlens_q[b]` to `cu_seqlens_q[b + 1]`;
    /// lse is `[heads_q, total_q]`. `seq_q` is the largest number of queries of an entry, as in
    /// FlashAttention's varlen functions.
    pub total_q: Option<usize>,
    /// Report through a word ([`Status`](crate::Status)) what was wrong with numbers that lie on the GPU.
    pub status: bool,
    /// Each head has a logit that joins the denominator alone (attention sinks, Xiao 2023).
    pub sinks: bool,
    /// Where q's elements lie: `[batch, heads_q, seq_q, query_dim]`, of which the last is
    /// [`query_dim`](Self::query_dim).
    pub q: Layout,
    /// Where k's elements lie: `[batch, heads_kv, seq_kv, head_dim]`, or as [`Cache`] says. The innermost
    /// size of a quantised one is [`row_elements`]. Within an entry each stride steps over all that smaller ones
    /// span, or is 0 (of q and v, too); entries may overlap.
    pub k: Layout,
    /// Where v's elements lie: `[batch, heads_kv, seq_kv, head_dim_v]`, or as [`Cache`] says.
    pub v: Layout,
    /// Where o's elements lie: `[batch, heads_q, seq_q, head_dim_v]`. No stride of 0.
    pub o: Layout,
    /// Also give `lse[batch, heads_q, seq_q]`, contiguous f32: `weight = exp(score - lse)`.
    pub lse: bool,
    /// Also give the weights `[batch, heads_q, seq_q, seq_kv]`, contiguous f32.
    pub weights: bool,
}

/// Bytes of so many elements of so many bytes each, in whole words.
pub(crate) fn whole_words(elements: u128, bytes: usize) -> u64 {
    let words = elements.saturating_mul(bytes as u128).div_ceil(4);
    u64::try_from(words.saturating_mul(4)).unwrap_or(u64::MAX)
}

impl AttentionProblem {
    /// Scaled dot-product attention over contiguous `[batch, heads, seq, dim]` f32 tensors.
    pub fn new(
        batch: usize,
        heads_q: usize,
        heads_kv: usize,
        seq_q: usize,
        seq_kv: usize,
        head_dim: usize,
        head_dim_v: usize,
    ) -> Self {
        Self {
            batch,
            heads_q,
            heads_kv,
            seq_q,
            seq_kv,
            head_dim,
            head_dim_v,
            dtype: Dtype::F32,
            kv_dtype: None,
            out_dtype: Dtype::F32,
            similarity: Similarity::ScaledDot,
            scale: None,
            softcap: None,
            bias: None,
            alibi: false,
            mask: None,
            causal: None,
            window: None,
            align: Align::BottomRight,
            kv_lens: false,
            cache: Cache::Contiguous,
            total_q: None,
            status: false,
            sinks: false,
            q: Layout::bhsd(heads_q, seq_q, head_dim),
            k: Layout::bhsd(heads_kv, seq_kv, head_dim),
            v: Layout::bhsd(heads_kv, seq_kv, head_dim_v),
            o: Layout::bhsd(heads_q, seq_q, head_dim_v),
            lse: false,
            weights: false,
        }
    }

    /// The same problem with q, k, v and o stored as `dtype`; [`AttentionProblem::with_cache`] gives k and v another type
    /// after that.
    pub fn with_dtype(self, dtype: Dtype) -> Self {
        Self { dtype, out_dtype: dtype, kv_dtype: None, ..self }
    }

    /// The same problem with another similarity, which may give q a width of its own: q is contiguous
    /// `[batch, heads_q, seq_q, query_dim]`, or `[total, heads_q, query_dim]` where queries are ragged.
    ///
    /// ```
    /// use wgpu_attention::{AttentionProblem, Similarity};
    /// let problem = AttentionProblem::new(1, 8, 8, 128, 512, 64, 64)
    ///     .with_similarity(Similarity::Bilinear { query_dim: 96, per_head: false });
    /// assert_eq!((problem.query_dim(), problem.validate()), (96, Ok(())));
    /// ```
    pub fn with_similarity(self, similarity: Similarity) -> Self {
        let problem = Self { similarity, ..self };
        let (heads, dim) = (problem.heads_q, problem.query_dim());
        let q = match problem.total_q {
            Some(total) => Layout::bshd(heads, total, dim),
            None => Layout::bhsd(heads, problem.seq_q, dim),
        };
        Self { q, ..problem }
    }

    /// The same problem against a cache of contiguous `[entry, row, heads_kv, dim]` rows (all that a token
    /// adds lies in one place), stored as `kv_dtype`.
    ///
    /// ```
    /// use wgpu_attention::{Align, AttentionProblem, Cache, Dtype};
    /// // A step of decoding for 16 sequences of at most 4096 tokens, in 8192 pages of 16 tokens.
    /// let problem = AttentionProblem {
    ///     causal: Some(Align::BottomRight),
    ///     kv_lens: true,
    ///     ..AttentionProblem::new(16, 32, 8, 1, 4096, 128, 128)
    /// }
    /// .with_cache(Cache::Paged { pages: 8192, page_size: 16, max_blocks: 256 }, Dtype::F16);
    /// assert!(problem.validate().is_ok());
    /// ```
    pub fn with_cache(self, cache: Cache, kv_dtype: Dtype) -> Self {
        let [_, heads, rows] = cache.dims(&self);
        Self {
            cache,
            kv_dtype: Some(kv_dtype),
            k: Layout::bshd(heads, rows, row_elements(kv_dtype, self.head_dim)),
            v: Layout::bshd(heads, rows, row_elements(kv_dtype, self.head_dim_v)),
            ..self
        }
    }

    /// The same problem with ragged queries, `total` in all: q and o are `[total, heads_q, dim]`.
    pub fn with_ragged_queries(self, total: usize) -> Self {
        Self {
            total_q: Some(total),
            q: Layout::bshd(self.heads_q, total, self.query_dim()),
            o: Layout::bshd(self.heads_q, total, self.head_dim_v),
            ..self
        }
    }

    /// Storage of k and v.
    pub fn stored_kv(&self) -> Dtype {
        self.kv_dtype.unwrap_or(self.dtype)
    }

    /// Width of q.
    pub fn query_dim(&self) -> usize {
        match self.similarity {
            Similarity::Bilinear { query_dim, .. } | Similarity::Additive { query_dim, .. } => query_dim,
            Similarity::Dot | Similarity::ScaledDot | Similarity::Cosine => self.head_dim,
        }
    }

    /// The factor on the similarity, defaults filled in.
    pub fn effective_scale(&self) -> f64 {
        self.scale.map(f64::from).unwrap_or(match self.similarity {
            Similarity::ScaledDot => 1.0 / (self.head_dim as f64).sqrt(),
            Similarity::Dot
            | Similarity::Bilinear { .. }
            | Similarity::Cosine
            | Similarity::Additive { .. } => 1.0,
        })
    }

    /// Whether kernels read queries that another kernel has made of q: multiplied by a matrix, or normalised.
    pub(crate) fn projects(&self) -> bool {
        !matches!(self.similarity, Similarity::Dot | Similarity::ScaledDot)
    }

    /// Width of what is compared: of k and of the queries that kernels read, or of what both are made into.
    pub(crate) fn compared_dim(&self) -> usize {
        match self.similarity {
            Similarity::Additive { hidden, .. } => hidden,
            _ => self.head_dim,
        }
    }

    /// Whether each query head has matrices of its own.
    pub(crate) fn has_own_matrices(&self) -> bool {
        matches!(
            self.similarity,
            Similarity::Bilinear { per_head: true, .. } | Similarity::Additive { per_head: true, .. }
        )
    }

    /// What another kernel has made of k for them.
    pub(crate) fn key_terms(&self) -> KeyTerms {
        match self.similarity {
            Similarity::Cosine => KeyTerms::InverseNorms,
            Similarity::Additive { .. } => KeyTerms::Projected,
            Similarity::Dot | Similarity::ScaledDot | Similarity::Bilinear { .. } => KeyTerms::None,
        }
    }

    /// Numbers of a key's terms.
    pub(crate) fn key_term_width(&self) -> usize {
        match self.key_terms() {
            KeyTerms::None => 0,
            KeyTerms::InverseNorms => 1,
            // As wide as the queries that they are added to.
            KeyTerms::Projected => self.compared_dim().next_multiple_of(4),
        }
    }

    /// Query heads that share the terms of a key.
    pub(crate) fn key_term_group(&self) -> usize {
        if self.key_terms() == KeyTerms::Projected && self.has_own_matrices() { 1 } else { self.group_size() }
    }

    /// Heads of keys, at most, whose terms a chunk of `heads` query heads reads. Chunks are whole groups, or
    /// less than one, which may begin in one and end in the next.
    pub(crate) fn key_term_heads(&self, heads: u64) -> u64 {
        let group = self.key_term_group() as u64;
        if heads.is_multiple_of(group) { heads / group } else { heads.min(2) }
    }

    /// Where query 0 stands among the keys, for the causal mask, the window and ALiBi alike.
    pub fn positions_align(&self) -> Align {
        self.causal.unwrap_or(self.align)
    }

    /// How far the window of the last queries reaches back, if they stand at the last keys.
    fn last_window_left(&self) -> Option<usize> {
        self.window?.left.filter(|_| self.positions_align() == Align::BottomRight)
    }

    /// The fewest rows that a [ring](Cache::Ring) may have for this call: what the first of the last queries sees, and
    /// all up to the last.
    pub fn least_ring(&self) -> usize {
        let left = self.last_window_left();
        left.map_or(self.seq_kv, |left| left.saturating_add(self.seq_q)).min(self.seq_kv).max(1)
    }

    /// The key-value head that query head `head` reads.
    ///
    /// # Panics
    /// When there is no head of keys, or more of them than of queries: [`AttentionProblem::validate`] refuses both.
    pub fn kv_head(&self, head: usize) -> usize {
        head / self.group_size()
    }

    /// Query heads that share a key-value head.
    pub(crate) fn group_size(&self) -> usize {
        self.heads_q / self.heads_kv
    }

    /// Whether a tile of a fused kernel takes rows of all heads of a group: where a head has so few that
    /// they would not fill one, and the group's could share the keys that it reads.
    pub(crate) fn packs(&self) -> bool {
        self.heads_q > self.heads_kv && self.seq_q <= MOST_PACKED
    }

    /// Query rows that tiles are cut from.
    pub(crate) fn owned_rows(&self) -> usize {
        if self.packs() { self.seq_q * self.group_size() } else { self.seq_q }
    }

    /// Query rows over all batch entries and heads (`usize::MAX` where that overflows); where they are ragged,
    /// as many as there would be if each entry had `seq_q`.
    pub fn rows(&self) -> usize {
        if self.total_q == Some(0) {
            return 0;
        }
        self.batch.saturating_mul(self.heads_q).saturating_mul(self.seq_q)
    }

    /// Floating-point operations of the two products, counting no masked-out work as saved except
    /// that causal attention counts half: `2 B Hq Sq Sk (D + Dv)`, the field's convention.
    pub fn flops(&self) -> f64 {
        let all = 2.0
            * (self.rows() as f64)
            * (self.seq_kv as f64)
            * (self.head_dim as f64 + self.head_dim_v as f64);
        if self.causal.is_some() { all / 2.0 } else { all }
    }

    /// Logical shape of an operand (leading ones where it has fewer dimensions).
    pub fn shape(&self, operand: Operand) -> [usize; 4] {
        let (b, h) = (self.batch, self.heads_q);
        let (sq, sk) = (self.seq_q, self.seq_kv);
        let ragged = |dim| self.total_q.map_or([b, h, sq, dim], |total| [1, h, total, dim]);
        let cached = |dim| {
            let [entries, heads, rows] = self.cache.dims(self);
            [entries, heads, rows, row_elements(self.stored_kv(), dim)]
        };
        let own = if self.has_own_matrices() { h } else { 1 };
        match operand {
            Operand::Q => ragged(self.query_dim()),
            Operand::K => cached(self.head_dim),
            Operand::V => cached(self.head_dim_v),
            Operand::O => ragged(self.head_dim_v),
            Operand::W => [1, own, self.query_dim(), self.head_dim],
            Operand::Wq => [1, own, self.compared_dim(), self.query_dim()],
            Operand::Wk => [1, own, self.compared_dim(), self.head_dim],
            Operand::ScoreV => [1, 1, own, self.compared_dim()],
            Operand::Bias | Operand::Mask | Operand::Weights => [b, h, sq, sk],
            Operand::AlibiSlopes | Operand::Sinks => [1, 1, 1, h],
            Operand::KvLens => [1, 1, 1, b],
            Operand::BlockTable => match self.cache {
                Cache::Paged { max_blocks, .. } => [1, 1, b, max_blocks],
                _ => [1, 1, b, 0],
            },
            Operand::CuSeqlensQ | Operand::CuSeqlensK => [1, 1, 1, b.saturating_add(1)],
            Operand::Status => [1, 1, 1, 1],
            Operand::Lse => self.total_q.map_or([1, b, h, sq], |total| [1, 1, h, total]),
            // Those of other calls.
            _ => [1, 1, 1, 0],
        }
    }

    /// Where an operand's elements lie; `None` when the problem has no such operand.
    pub fn layout(&self, operand: Operand) -> Option<Layout> {
        let contiguous = || {
            let [_, h, s, d] = self.shape(operand);
            Some(Layout::bhsd(h, s, d))
        };
        let when = |present: bool| present.then(contiguous).flatten();
        match operand {
            Operand::Q => Some(self.q),
            Operand::K => Some(self.k),
            Operand::V => Some(self.v),
            Operand::O => Some(self.o),
            Operand::W => when(matches!(self.similarity, Similarity::Bilinear { .. })),
            Operand::Wq | Operand::Wk | Operand::ScoreV => {
                when(matches!(self.similarity, Similarity::Additive { .. }))
            }
            Operand::Bias => self.bias.map(|bias| bias.layout),
            Operand::Mask => self.mask,
            Operand::AlibiSlopes => when(self.alibi),
            Operand::Sinks => when(self.sinks),
            Operand::KvLens => when(self.kv_lens),
            Operand::BlockTable => when(matches!(self.cache, Cache::Paged { .. })),
            Operand::CuSeqlensQ => when(self.total_q.is_some()),
            Operand::CuSeqlensK => when(matches!(self.cache, Cache::Ragged { .. })),
            Operand::Status => when(self.status),
            Operand::Lse => when(self.lse),
            Operand::Weights => when(self.weights),
            _ => None,
        }
    }

    /// Bytes of one element of an operand.
    pub fn element_bytes(&self, operand: Operand) -> usize {
        match operand {
            Operand::Q => self.dtype.bytes(),
            Operand::K | Operand::V => self.stored_kv().bytes(),
            Operand::O => self.out_dtype.bytes(),
            Operand::Bias => self.bias.map_or(4, |bias| bias.dtype.bytes()),
            Operand::Mask => 1,
            _ => 4,
        }
    }

    /// Bytes that a buffer for this operand needs, or a piece of one: whole words up to its last element. 0 when the
    /// problem has no such operand or it is empty; `u64::MAX` where no buffer could be so large.
    ///
    /// ```
    /// use wgpu_attention::{AttentionProblem, Dtype, Operand};
    /// let problem = AttentionProblem::new(1, 8, 8, 128, 512, 64, 63).with_dtype(Dtype::F16);
    /// assert_eq!(problem.buffer_bytes(Operand::K), 2 * 8 * 512 * 64);
    /// assert_eq!(problem.buffer_bytes(Operand::Mask), 0);
    /// ```
    pub fn buffer_bytes(&self, operand: Operand) -> u64 {
        whole_words(self.extent(operand), self.element_bytes(operand))
    }

    /// Elements that a slice for this operand must hold: one past the largest index of its layout.
    /// 0 when the problem has no such operand or it is empty.
    pub fn extent(&self, operand: Operand) -> u128 {
        self.layout(operand).map_or(0, |layout| layout.extent(self.shape(operand)))
    }

    /// Every operand that this problem has, inputs before outputs.
    pub fn operands(&self) -> impl Iterator<Item = Operand> + '_ {
        Operand::ALL.iter().copied().filter(|&operand| self.layout(operand).is_some())
    }

    /// Checks every rule that does not depend on data or device.
    ///
    /// # Errors
    /// [`Error::ZeroSize`], [`Error::HeadGroups`], [`Error::TooLarge`], [`Error::BadNumber`],
    /// [`Error::DtypeUnfit`], [`Error::Cache`] and [`Error::Overlaps`]. `batch`, `seq_q` and `seq_kv` may
    /// be 0.
    pub fn validate(&self) -> Result<()> {
        self.validate_sizes()?;
        self.validate_storage()?;
        if let Some(scale) = self.scale.filter(|scale| !scale.is_finite()) {
            return Err(Error::BadNumber { what: "scale", got: scale, need: "finite" });
        }
        if let Some(cap) = self.softcap.filter(|cap| !(cap.is_normal() && *cap > 0.0)) {
            return Err(Error::BadNumber { what: "softcap", got: cap, need: "finite and above 0" });
        }
        let rows = self.batch as u128 * self.heads_q as u128 * self.seq_q as u128;
        if rows > u32::MAX as u128 {
            return Err(Error::TooLarge {
                what: "batch * heads_q * seq_q".into(),
                got: rows,
                max: u32::MAX as u64,
            });
        }
        for operand in self.operands() {
            let extent = self.extent(operand);
            // Kernels index elements by u32.
            if extent > u32::MAX as u128 {
                return Err(Error::TooLarge {
                    what: format!("{operand}'s last element index"),
                    got: extent,
                    max: u32::MAX as u64,
                });
            }
        }
        for (operand, layout) in [(Operand::Q, self.q), (Operand::K, self.k), (Operand::V, self.v)] {
            let (shape, strides) = (self.shape(operand), layout.strides);
            // Entries may be windows on one sequence. A stride of 0 is one head, row or number for all.
            let own = [1, 2, 3].map(|i| if strides[i] == 0 { 1 } else { shape[i] });
            if !layout.is_injective([1, own[0], own[1], own[2]]) {
                return Err(Error::Overlaps { operand, shape, strides });
            }
        }
        let (operand, shape) = (Operand::O, self.shape(Operand::O));
        if !self.o.is_injective(shape) {
            return Err(Error::Overlaps { operand, shape, strides: self.o.strides });
        }
        Ok(())
    }

    /// The rules of sizes, each by itself: products of two of those that pass are far from overflowing.
    pub(crate) fn validate_sizes(&self) -> Result<()> {
        for (what, size, least) in [
            ("batch", self.batch, 0),
            ("heads_q", self.heads_q, 1),
            ("heads_kv", self.heads_kv, 1),
            ("seq_q", self.seq_q, 0),
            ("seq_kv", self.seq_kv, 0),
            ("head_dim", self.head_dim, 1),
            ("head_dim_v", self.head_dim_v, 1),
            ("query_dim", self.query_dim(), 1),
            ("hidden", self.compared_dim(), 1),
            ("total_q", self.total_q.unwrap_or(0), 0),
            ("total", if let Cache::Ragged { total } = self.cache { total } else { 0 }, 0),
        ] {
            if size < least {
                return Err(Error::ZeroSize { what });
            }
            if size > MAX_SEQ {
                return Err(Error::TooLarge { what: what.into(), got: size as u128, max: MAX_SEQ as u64 });
            }
        }
        if !self.heads_q.is_multiple_of(self.heads_kv) {
            return Err(Error::HeadGroups { heads_q: self.heads_q, heads_kv: self.heads_kv });
        }
        Ok(())
    }

    /// The rules of element types and of caches.
    fn validate_storage(&self) -> Result<()> {
        let bias = self.bias.map_or(Dtype::F32, |bias| bias.dtype);
        for (operand, got) in [(Operand::Q, self.dtype), (Operand::O, self.out_dtype), (Operand::Bias, bias)]
        {
            if !got.is_float() {
                return Err(Error::DtypeUnfit { operand, got, need: "f32, f16 or bf16" });
            }
        }
        for (operand, layout) in [(Operand::K, self.k), (Operand::V, self.v)] {
            let dtype = self.stored_kv();
            if !dtype.is_float() && layout.strides[3] != 1 {
                let why = format!(
                    "{operand}'s rows of {dtype} words must be contiguous, not {} apart",
                    layout.strides[3]
                );
                return Err(Error::Cache { why });
            }
        }
        let too_large = |what: &str, got: usize, max: usize| {
            let (what, got) = (what.to_string(), got as u128);
            if got > max as u128 { Err(Error::TooLarge { what, got, max: max as u64 }) } else { Ok(()) }
        };
        match self.cache {
            Cache::Contiguous => Ok(()),
            Cache::Ring { capacity } => {
                too_large("the ring's capacity", capacity, MAX_SEQ)?;
                let need = self.least_ring();
                if capacity < need {
                    let top =
                        self.last_window_left().is_none() && self.window.is_some_and(|w| w.left.is_some());
                    let why = if top { " (positions are top-left aligned)" } else { "" };
                    let why = format!("a ring of {capacity} rows, where queries see {need} keys{why}");
                    return Err(Error::Cache { why });
                }
                Ok(())
            }
            Cache::Paged { pages, page_size, max_blocks } => {
                if page_size == 0 {
                    return Err(Error::ZeroSize { what: "page_size" });
                }
                too_large("pages", pages, MAX_SEQ)?;
                too_large("page_size", page_size, MAX_SEQ)?;
                too_large("max_blocks", max_blocks, MAX_SEQ)?;
                let need = self.seq_kv.div_ceil(page_size);
                if max_blocks < need {
                    let why = format!(
                        "{} keys take {need} blocks of {page_size}, a row of the block table has {max_blocks}",
                        self.seq_kv
                    );
                    return Err(Error::Cache { why });
                }
                Ok(())
            }
            Cache::Ragged { .. } => {
                if self.kv_lens {
                    let why = "ragged keys have their lengths from cu_seqlens_k, not from kv_lens".into();
                    return Err(Error::Cache { why });
                }
                Ok(())
            }
        }
    }
}
