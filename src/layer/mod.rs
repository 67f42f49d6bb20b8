//! The attention layer: from a sequence to its attended output. Here is what one is; `encode` has the way to
//! the GPU, `oracle` what it is held to, and `weights` how checkpoints are read.

mod encode;
pub(crate) mod oracle;
mod turns;
#[cfg(feature = "safetensors")]
mod weights;

pub use encode::{LayerOperands, LayerOptions};
pub use oracle::{HostWeights, LayerInputs};
#[cfg(feature = "safetensors")]
pub use weights::Naming;

use crate::append::QkNorm;
use crate::cache::Cache;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::linear::LinearProblem;
use crate::mask::Align;
use crate::problem::{AttentionProblem, MAX_SEQ, Similarity};
use crate::rope::Rope;

/// One attention layer as models have it: projections of a sequence to queries, keys and values, attention of
/// several heads side by side, and a projection of what they found (Vaswani 2017, "multi-head attention").
///
/// ```text
/// q = norm(x Wq + bq)   k = norm(c Wk + bk)   v = c Wv + bv     c = x, or the context of cross-attention
/// q, k turned by their positions (RoPE)
/// y = attention(q, k, v) Wo + bo
/// ```
///
/// Heads are strides: each projection writes where attention reads, and nothing is transposed. What lies
/// between the projections is stored in [`AttentionProblem::dtype`], the type of x.
///
/// ```
/// use wgpu_attention::{Align, AttentionProblem, Layer, Rope};
/// // A decoder's layer over 128 tokens of width 576: 9 query heads over 3, width 64.
/// let attention = AttentionProblem {
///     causal: Some(Align::TopLeft),
///     ..AttentionProblem::new(1, 9, 3, 128, 128, 64, 64)
/// };
/// let layer = Layer { rope: Some(Rope { positions: 128, ..Rope::new(64) }), ..Layer::new(&attention, 576) };
/// assert!(layer.validate().is_ok());
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// What is computed between the projections: sizes, heads, masks and every other option. The layer makes
    /// its layouts; keys are contiguous, or ragged; it gives neither lse nor weights.
    pub attention: AttentionProblem,
    /// Width of x's rows.
    pub width: usize,
    /// Width of the context's rows where keys and values come from another sequence than queries
    /// (cross-attention).
    pub context_width: Option<usize>,
    /// Width of y's rows.
    pub out_width: usize,
    /// Where x's rows lie: `[tokens, width]`, the entries of a batch one after the other.
    pub x: Layout,
    /// Where the context's rows lie.
    pub context: Layout,
    /// Where y's rows lie: `[tokens, out_width]`.
    pub y: Layout,
    /// Storage of all weights and biases.
    pub weight_dtype: Dtype,
    /// Weights are `[in, out]`, not `[out, in]` as PyTorch stores them.
    pub transposed: bool,
    /// The weights of q, k and v are one matrix, in this order along its outputs, and so are their biases.
    pub packed: bool,
    /// q, k and v have biases.
    pub bias: bool,
    /// y has one.
    pub bias_o: bool,
    /// Normalises queries and keys, head by head (QK-norm).
    pub norm: Option<QkNorm>,
    /// Turns queries and keys by their positions in the sequence: key `j` of an entry stands at `j`, and in
    /// self-attention query `i` at `i`, where its key does. A query of cross-attention stands where masks see it: at
    /// `i` where they align top-left, else so that the last one stands at the last key.
    pub rope: Option<Rope>,
    /// The positions of x's tokens are given, and rope turns what is made of x by those. (A batch that is padded on
    /// the left; the middle of a longer sequence.)
    pub positions: bool,
}

/// A matrix of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Projection {
    Q,
    K,
    V,
    /// q, k and v at once.
    Qkv,
    /// k and v of a context at once.
    Kv,
    O,
}

impl Projection {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Q => "the projection of q",
            Self::K => "the projection of k",
            Self::V => "the projection of v",
            Self::Qkv => "the projection of q, k and v",
            Self::Kv => "the projection of k and v",
            Self::O => "the projection of the output",
        }
    }
}

/// Where projected rows lie: one row of the sequence after the other, and in each q, k and v of all heads; those
/// of a context have rows of their own, behind. Or all of q, then all of k, then all of v, where that is too much
/// for one binding: each of the three has its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Places {
    /// Elements in all.
    pub(crate) len: usize,
    /// Row strides.
    pub(crate) row_q: usize,
    pub(crate) row_k: usize,
    pub(crate) row_v: usize,
    pub(crate) k: usize,
    pub(crate) v: usize,
}

/// The next row stride that is an odd number of cache lines (of f32). A head's keys, one of each row, would else
/// fall into a few of a cache's sets and push each other out.
fn spread(row: usize) -> usize {
    const LINE: usize = 16;
    (row.div_ceil(LINE) | 1) * LINE
}

impl Layer {
    /// A self-attention layer over contiguous rows of `width`, with f32 weights and no biases.
    pub fn new(attention: &AttentionProblem, width: usize) -> Self {
        Self {
            attention: attention.clone(),
            width,
            context_width: None,
            out_width: width,
            x: Layout::rows(width),
            context: Layout::rows(width),
            y: Layout::rows(width),
            weight_dtype: Dtype::F32,
            transposed: false,
            packed: false,
            bias: false,
            bias_o: false,
            norm: None,
            rope: None,
            positions: false,
        }
    }

    /// The same layer as cross-attention to a context of contiguous rows of `width`.
    #[must_use]
    pub fn with_context(self, width: usize) -> Self {
        Self { context_width: Some(width), context: Layout::rows(width), ..self }
    }

    /// Rows of x and y.
    pub fn tokens(&self) -> usize {
        let p = &self.attention;
        p.total_q.unwrap_or(p.batch.saturating_mul(p.seq_q))
    }

    /// Rows that keys and values are made of: those of x, or of the context.
    pub fn tokens_kv(&self) -> usize {
        let p = &self.attention;
        match p.cache {
            Cache::Ragged { total } => total,
            _ => p.batch.saturating_mul(p.seq_kv),
        }
    }

    /// Widths of q, k and v of all heads.
    pub(crate) fn widths(&self) -> [usize; 3] {
        let p = &self.attention;
        [p.heads_q * p.query_dim(), p.heads_kv * p.head_dim, p.heads_kv * p.head_dim_v]
    }

    /// Where q, k and v of all tokens lie.
    pub(crate) fn places(&self, apart: bool) -> Places {
        let [q, k, v] = self.widths();
        // At multiples of four, so that vectors stay whole.
        let end = |first: usize, rows: usize, row: usize| (first + rows * row).next_multiple_of(4);
        let end_q = end(0, self.tokens(), q);
        if apart {
            let end_k = end(end_q, self.tokens_kv(), k);
            let len = end_k + self.tokens_kv() * v;
            return Places { len, row_q: q, row_k: k, row_v: v, k: end_q, v: end_k };
        }
        if self.context_width.is_none() {
            let row = spread(q + k + v);
            return Places { len: self.tokens() * row, row_q: row, row_k: row, row_v: row, k: q, v: q + k };
        }
        let row = spread(k + v);
        let len = end_q + self.tokens_kv() * row;
        Places { len, row_q: q, row_k: row, row_v: row, k: end_q, v: end_q + k }
    }

    /// Where q and k lie once they are normalised and turned: k behind q, and all elements.
    pub(crate) fn turned(&self) -> [usize; 2] {
        let [q, k, _] = self.widths();
        let first = (self.tokens() * q).next_multiple_of(4);
        [first, first + self.tokens_kv() * k]
    }

    pub(crate) fn turns(&self) -> bool {
        self.norm.is_some() || self.rope.is_some()
    }

    /// Where the first query of each entry stands; `None` where positions are given. The layer has been validated.
    pub(crate) fn first_query(&self) -> Option<usize> {
        (!self.positions).then(|| self.first_position().unwrap_or(0))
    }

    /// The same of keys.
    pub(crate) fn first_key(&self) -> Option<usize> {
        (!self.positions || self.context_width.is_some()).then_some(0)
    }

    /// Where the first query of each entry stands, if that is one place at or behind the first key.
    fn first_position(&self) -> Option<usize> {
        let p = &self.attention;
        if self.context_width.is_none() || p.positions_align() == Align::TopLeft {
            return Some(0);
        }
        let lengths_differ = p.kv_lens || p.total_q.is_some() || p.cache != Cache::Contiguous;
        if lengths_differ { None } else { p.seq_kv.checked_sub(p.seq_q) }
    }

    /// `[batch, heads, seq, dim]` in rows of `row` elements.
    pub(crate) fn heads(offset: usize, row: usize, seq: usize, dim: usize) -> Layout {
        Layout { offset, strides: [seq * row, dim, row, 1] }
    }

    /// The attention call over what was projected.
    pub(crate) fn attention(&self, apart: bool) -> AttentionProblem {
        let p = &self.attention;
        let ([q, k, _], places) = (self.widths(), self.places(apart));
        let v = Self::heads(places.v, places.row_v, p.seq_kv, p.head_dim_v);
        let (q, k) = if self.turns() {
            let [first, _] = self.turned();
            (Self::heads(0, q, p.seq_q, p.query_dim()), Self::heads(first, k, p.seq_kv, p.head_dim))
        } else {
            (
                Self::heads(0, places.row_q, p.seq_q, p.query_dim()),
                Self::heads(places.k, places.row_k, p.seq_kv, p.head_dim),
            )
        };
        let o = Self::heads(0, p.heads_q * p.head_dim_v, p.seq_q, p.head_dim_v);
        AttentionProblem { q, k, v, o, out_dtype: p.dtype, kv_dtype: None, ..p.clone() }
    }

    /// The linear maps before attention; of a packed matrix as few as there may be.
    pub(crate) fn projections(&self, apart: bool) -> Vec<(Projection, LinearProblem)> {
        use Projection::*;
        let ([q, k, v], places) = (self.widths(), self.places(apart));
        let [first_k, first_v] = if self.packed { [q, q + k] } else { [0, 0] };
        match (self.packed && !apart, self.context_width) {
            (true, None) => vec![(Qkv, self.linear(Qkv, q + k + v, 0, 0, places.row_q))],
            (true, Some(_)) => vec![
                (Q, self.linear(Q, q, 0, 0, places.row_q)),
                (Kv, self.linear(Kv, k + v, first_k, places.k, places.row_k)),
            ],
            (false, _) => vec![
                (Q, self.linear(Q, q, 0, 0, places.row_q)),
                (K, self.linear(K, k, first_k, places.k, places.row_k)),
                (V, self.linear(V, v, first_v, places.v, places.row_v)),
            ],
        }
    }

    /// A linear map to `outputs`, whose weights begin at output `first` of their matrix, and whose results go
    /// to `to` in rows of `row`.
    fn linear(&self, of: Projection, outputs: usize, first: usize, to: usize, row: usize) -> LinearProblem {
        let from_context = matches!(of, Projection::K | Projection::V | Projection::Kv);
        let (rows, inputs, x) = match (from_context, self.context_width) {
            (true, Some(width)) => (self.tokens_kv(), width, self.context),
            _ => (self.tokens(), self.width, self.x),
        };
        let total = if self.packed { self.widths().iter().sum() } else { outputs };
        let w = if self.transposed {
            Layout::columns(total).at(first)
        } else {
            Layout::rows(inputs).at(first * inputs)
        };
        let problem = LinearProblem {
            dtype: self.attention.dtype,
            weight_dtype: self.weight_dtype,
            out_dtype: self.attention.dtype,
            x,
            w,
            y: Layout::rows(row).at(to),
            ..LinearProblem::new(rows, inputs, outputs)
        };
        match self.bias {
            true => {
                let mut biased = problem.with_bias(self.weight_dtype);
                if let Some(bias) = &mut biased.bias {
                    bias.layout = bias.layout.at(first);
                }
                biased
            }
            false => problem,
        }
    }

    /// The linear map after attention.
    pub(crate) fn projection_o(&self) -> LinearProblem {
        let inputs = self.attention.heads_q * self.attention.head_dim_v;
        let problem = LinearProblem {
            dtype: self.attention.dtype,
            weight_dtype: self.weight_dtype,
            out_dtype: self.attention.out_dtype,
            y: self.y,
            w: if self.transposed { Layout::columns(self.out_width) } else { Layout::rows(inputs) },
            ..LinearProblem::new(self.tokens(), inputs, self.out_width)
        };
        if self.bias_o { problem.with_bias(self.weight_dtype) } else { problem }
    }

    /// Checks every rule that does not depend on data or device.
    ///
    /// # Errors
    /// Those of [`AttentionProblem::validate`]; [`Error::Layer`] for what no layer has; [`Error::Projection`] around
    /// what is wrong with one of its linear maps; [`Error::BadNumber`] for a norm's epsilon.
    pub fn validate(&self) -> Result<()> {
        let p = &self.attention;
        let fail = |why: &str| Err(Error::Layer { why: why.into() });
        self.validate_sizes()?;
        let ragged_k = matches!(p.cache, Cache::Ragged { .. });
        if !ragged_k && p.cache != Cache::Contiguous {
            return fail("it makes its keys itself: they are contiguous or ragged");
        }
        if p.kv_dtype.is_some_and(|kv| kv != p.dtype) {
            return fail("its keys and values have the type of x");
        }
        if p.lse || p.weights {
            return fail("it gives neither lse nor weights");
        }
        if self.context_width.is_none() {
            if self.tokens() != self.tokens_kv() || p.seq_q != p.seq_kv {
                return fail("without a context there is a key for each query");
            }
            if p.total_q.is_some() != ragged_k {
                return fail("without a context queries and keys are both ragged, or neither");
            }
        }
        if self.packed && self.context_width.is_some_and(|width| width != self.width) {
            return fail("a packed matrix has rows of one width, x and the context have others");
        }
        self.norm.map_or(Ok(()), QkNorm::validate)?;
        let divides = p.similarity == Similarity::ScaledDot && p.scale.is_none();
        if divides && matches!(self.norm, Some(QkNorm::L2 { .. })) {
            return fail(
                "1/sqrt(head_dim) belongs to no L2 norm: give the problem a scale, or Similarity::Dot",
            );
        }
        if let Some(rope) = self.rope {
            let first = self.first_position();
            let positions = match (first, self.positions, self.context_width) {
                (_, true, None) => 1,
                (_, true, Some(_)) => p.seq_kv.max(1),
                (Some(first), false, _) => p.seq_kv.max(first + p.seq_q),
                (None, false, _) => {
                    return fail(
                        "where the queries of cross-attention stand depends on lengths, or is before the first key: \
                         rope wants their positions, or masks that align top-left",
                    );
                }
            };
            if let Some(why) = rope.unfit(p.head_dim.min(p.query_dim()), positions) {
                return fail(&why);
            }
        } else if self.positions {
            return fail("nothing is turned by the positions that are given");
        }
        for (of, problem) in self.projections(false).into_iter().chain([(Projection::O, self.projection_o())])
        {
            problem.validate().map_err(|error| error.of(of))?;
        }
        self.attention(false).validate()
    }

    /// The rules of sizes, so that none of what is computed from them later overflows.
    fn validate_sizes(&self) -> Result<()> {
        let p = &self.attention;
        p.validate_sizes()?;
        let of = |count: usize, size: usize| count as u128 * size as u128;
        let q = of(p.heads_q, p.query_dim());
        let kv = of(p.heads_kv, p.head_dim) + of(p.heads_kv, p.head_dim_v);
        let [tokens, tokens_kv] = [self.tokens(), self.tokens_kv()].map(|tokens| tokens as u128);
        // Rows are spread by two cache lines at most, and parts begin at multiples of four.
        let projected = match self.context_width {
            None => tokens * (q + kv + 32),
            Some(_) => tokens * q + tokens_kv * (kv + 32),
        };
        let most = MAX_SEQ as u128;
        let indices = u128::from(u32::MAX);
        let rope = self.rope.map_or(0, |rope| of(rope.positions, rope.width));
        for (what, got, max) in [
            ("width", self.width as u128, most),
            ("context_width", self.context_width.unwrap_or(0) as u128, most),
            ("out_width", self.out_width as u128, most),
            ("the width of all heads", q + kv, most),
            ("tokens", tokens, most),
            ("tokens of keys", tokens_kv, most),
            ("elements between the projections", projected + 8, indices),
            ("rope's elements", rope, indices),
            ("batch * heads_kv * seq_kv", of(p.batch, p.heads_kv) * p.seq_kv as u128, indices),
        ] {
            if got > max {
                return Err(Error::TooLarge { what: what.into(), got, max: max as u64 });
            }
        }
        Ok(())
    }
}

impl Error {
    /// The same error, as one about a linear map of a layer; what a driver says stands by itself.
    pub(crate) fn of(self, map: Projection) -> Self {
        match self {
            Self::DeviceLost { .. } | Self::OutOfMemory { .. } | Self::Driver { .. } => self,
            error => Self::Projection { part: map.name(), error: Box::new(error) },
        }
    }
}
