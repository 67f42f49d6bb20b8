//! [`AttentionProblem`]: the mathematics that one call computes, whatever the data. The only home
//! of shape rules.

use crate::dtype::Dtype;
use crate::error::{Error, Operand, Result};
use crate::layout::Layout;
use crate::mask::{Align, Window};

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
    /// Width of k, and of q unless the similarity is bilinear.
    pub head_dim: usize,
    /// Width of v and o.
    pub head_dim_v: usize,
    /// Storage of q, k and v.
    pub dtype: Dtype,
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
    /// Drops keys after the query's position.
    pub causal: Option<Align>,
    /// Drops keys too far from the query's position.
    pub window: Option<Window>,
    /// Where query 0 stands among the keys, for the window; for ALiBi too unless `causal` says it.
    pub align: Align,
    /// Each batch entry has its own number of valid keys; later keys are never used.
    pub kv_lens: bool,
    /// Each head has a logit that joins the denominator alone (attention sinks, Xiao 2023).
    pub sinks: bool,
    /// Where q's elements lie: `[batch, heads_q, seq_q, head_dim]`.
    pub q: Layout,
    /// Where k's elements lie: `[batch, heads_kv, seq_kv, head_dim]`.
    pub k: Layout,
    /// Where v's elements lie: `[batch, heads_kv, seq_kv, head_dim_v]`.
    pub v: Layout,
    /// Where o's elements lie: `[batch, heads_q, seq_q, head_dim_v]`. No stride of 0.
    pub o: Layout,
    /// Also give `lse[batch, heads_q, seq_q]`, contiguous f32: `weight = exp(score - lse)`.
    pub lse: bool,
    /// Also give the weights `[batch, heads_q, seq_q, seq_kv]`, contiguous f32.
    pub weights: bool,
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
            sinks: false,
            q: Layout::bhsd(heads_q, seq_q, head_dim),
            k: Layout::bhsd(heads_kv, seq_kv, head_dim),
            v: Layout::bhsd(heads_kv, seq_kv, head_dim_v),
            o: Layout::bhsd(heads_q, seq_q, head_dim_v),
            lse: false,
            weights: false,
        }
    }

    /// The same problem with q, k, v and o stored as `dtype`.
    pub fn with_dtype(self, dtype: Dtype) -> Self {
        Self { dtype, out_dtype: dtype, ..self }
    }

    /// Width of q.
    pub fn query_dim(&self) -> usize {
        match self.similarity {
            Similarity::Bilinear { query_dim, .. } => query_dim,
            _ => self.head_dim,
        }
    }

    /// The factor on the similarity, defaults filled in.
    pub fn effective_scale(&self) -> f64 {
        self.scale.map(f64::from).unwrap_or(match self.similarity {
            Similarity::ScaledDot => 1.0 / (self.head_dim as f64).sqrt(),
            Similarity::Dot | Similarity::Bilinear { .. } => 1.0,
        })
    }

    /// Alignment of the positions that ALiBi measures distances between.
    pub fn alibi_align(&self) -> Align {
        self.causal.unwrap_or(self.align)
    }

    /// The key-value head that query head `head` reads.
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

    /// Query rows over all batch entries and heads (`usize::MAX` where that overflows).
    pub fn rows(&self) -> usize {
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
        let (b, h, hkv) = (self.batch, self.heads_q, self.heads_kv);
        let (sq, sk) = (self.seq_q, self.seq_kv);
        match operand {
            Operand::Q => [b, h, sq, self.query_dim()],
            Operand::K => [b, hkv, sk, self.head_dim],
            Operand::V => [b, hkv, sk, self.head_dim_v],
            Operand::O => [b, h, sq, self.head_dim_v],
            Operand::W => {
                let per_head = matches!(self.similarity, Similarity::Bilinear { per_head: true, .. });
                [1, if per_head { h } else { 1 }, self.query_dim(), self.head_dim]
            }
            Operand::Bias | Operand::Mask | Operand::Weights => [b, h, sq, sk],
            Operand::AlibiSlopes | Operand::Sinks => [1, 1, 1, h],
            Operand::KvLens => [1, 1, 1, b],
            Operand::Lse => [1, b, h, sq],
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
            Operand::Bias => self.bias.map(|bias| bias.layout),
            Operand::Mask => self.mask,
            Operand::AlibiSlopes => when(self.alibi),
            Operand::Sinks => when(self.sinks),
            Operand::KvLens => when(self.kv_lens),
            Operand::Lse => when(self.lse),
            Operand::Weights => when(self.weights),
        }
    }

    /// Bytes of one element of an operand.
    pub fn element_bytes(&self, operand: Operand) -> usize {
        match operand {
            Operand::Q | Operand::K | Operand::V => self.dtype.bytes(),
            Operand::O => self.out_dtype.bytes(),
            Operand::Bias => self.bias.map_or(4, |bias| bias.dtype.bytes()),
            Operand::Mask => 1,
            _ => 4,
        }
    }

    /// Elements that a slice for this operand must hold: one past the largest index of its layout.
    /// 0 when the problem has no such operand or it is empty.
    pub fn extent(&self, operand: Operand) -> u128 {
        self.layout(operand).map_or(0, |layout| layout.extent(self.shape(operand)))
    }

    /// Every operand that this problem has, inputs before outputs.
    pub fn operands(&self) -> impl Iterator<Item = Operand> + '_ {
        Operand::ALL.into_iter().filter(|&operand| self.layout(operand).is_some())
    }

    /// Checks every rule that does not depend on data or device.
    ///
    /// # Errors
    /// [`Error::ZeroSize`], [`Error::HeadGroups`], [`Error::TooLarge`], [`Error::BadNumber`] and
    /// [`Error::OutputOverlaps`]. `batch`, `seq_q` and `seq_kv` may be 0.
    pub fn validate(&self) -> Result<()> {
        for (what, size) in [
            ("heads_q", self.heads_q),
            ("heads_kv", self.heads_kv),
            ("head_dim", self.head_dim),
            ("head_dim_v", self.head_dim_v),
            ("query_dim", self.query_dim()),
        ] {
            if size == 0 {
                return Err(Error::ZeroSize { what });
            }
        }
        if !self.heads_q.is_multiple_of(self.heads_kv) {
            return Err(Error::HeadGroups { heads_q: self.heads_q, heads_kv: self.heads_kv });
        }
        for (what, size) in [
            ("batch", self.batch),
            ("heads_q", self.heads_q),
            ("seq_q", self.seq_q),
            ("seq_kv", self.seq_kv),
            ("head_dim", self.head_dim),
            ("head_dim_v", self.head_dim_v),
            ("query_dim", self.query_dim()),
        ] {
            if size > MAX_SEQ {
                return Err(Error::TooLarge { what: what.into(), got: size as u128, max: MAX_SEQ as u64 });
            }
        }
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
        let (operand, shape) = (Operand::O, self.shape(Operand::O));
        if !self.o.is_injective(shape) {
            return Err(Error::OutputOverlaps { operand, shape, strides: self.o.strides });
        }
        Ok(())
    }
}
