//! Gradients: what attention hands back to q, k, v, bias and sinks of a loss's gradient by o. Here is what a backward
//! pass is; `form` says who owns what, `kernel` has the shaders, `encode` the way to them, and `oracle` what they are
//! held to.

mod encode;
mod form;
pub(crate) mod kernel;
pub(crate) mod oracle;
mod run;

pub use encode::BackwardOperands;
pub use run::BackwardOutputs;

use crate::cache::Cache;
use crate::dtype::{Dtype, TensorRef};
use crate::error::{Error, Operand, Result};
use crate::host::Inputs;
use crate::layout::Layout;
use crate::problem::{AttentionProblem, Similarity, whole_words};

/// The backward pass of one attention call: from the gradient of a loss by o, `dout`, those by q, k, v, bias and sinks.
///
/// With the weights `p = exp(s - lse)` of the forward call and its `delta = sum of dout o`:
///
/// ```text
/// ds = p (dout . v - delta) ds/d(q . k)      dq = sum over keys of ds k
/// dk = sum over queries of ds q              dv = sum over queries of p dout
/// dbias = p (dout . v - delta)               dsinks = -sum over queries of exp(sink - lse) delta
/// ```
///
/// (FlashAttention 2, Dao 2023, algorithm 2.) Heads of queries that share a head of k and v add up there. Weights are
/// computed again, tile by tile, and none is ever stored ([`BackwardProblem::scratch_bytes`]). Sums are f32 whatever the
/// storage, have one owner each, and so come out as the same bits each time.
///
/// Scale, soft cap, bias, ALiBi, every mask, key lengths, sinks, grouped heads, ragged sequences, strides and types
/// are those of the forward call. A query or key that no pair keeps has a gradient of zeros; rows of k and v behind an
/// entry's length have, too, but where keys are ragged, of which rows that belong to no entry are left alone, as they
/// are of ragged queries. A NaN in what a pair keeps spreads to the gradients that the pair adds to, unless its weight
/// there is zero. Gradients by bias are zeros where no pair is kept, and add up where a dimension of the bias repeats.
/// ALiBi's slopes are constants: they get no gradient.
///
/// ```
/// use wgpu_attention::{Align, AttentionProblem, BackwardProblem, Operand};
/// let attention = AttentionProblem {
///     causal: Some(Align::TopLeft),
///     ..AttentionProblem::new(2, 32, 8, 512, 512, 64, 64)
/// };
/// let backward = BackwardProblem::of(&attention);
/// assert!(backward.validate().is_ok());
/// assert_eq!(backward.extent(Operand::Dk), 2 * 8 * 512 * 64);
///
/// // A bias for relative positions, one for all entries: so is its gradient.
/// use wgpu_attention::{Bias, Dtype, Layout};
/// let bias = Bias { dtype: Dtype::F32, layout: Layout::broadcast([1, 32, 512, 512]) };
/// let backward = BackwardProblem::of(&AttentionProblem { bias: Some(bias), ..attention });
/// assert_eq!(backward.extent(Operand::Dbias), 32 * 512 * 512);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct BackwardProblem {
    /// The forward call. Its o and lse are operands here; whether it asks for lse does not matter.
    pub attention: AttentionProblem,
    /// Where the elements of the gradient by o lie, in o's shape and type.
    pub dout: Layout,
    /// Where the gradient by q goes, in q's shape and type. No stride of 0.
    pub dq: Layout,
    /// Where the gradient by k goes, in k's shape and type. No stride of 0.
    pub dk: Layout,
    /// Where the gradient by v goes, in v's shape and type. No stride of 0.
    pub dv: Layout,
    /// Where the gradient by bias goes, in its shape `[batch, heads_q, seq_q, seq_kv]` and type. Entries, or heads, whose
    /// stride is 0 add up. `None` where nobody asks for it; a problem without a bias has none.
    pub dbias: Option<Layout>,
}

impl BackwardProblem {
    /// The backward pass of `attention`, with gradients that lie as o, q, k, v and bias do; contiguous, in the order of
    /// `[batch, heads, seq, dim]`, those of an operand which repeats elements. A bias that repeats over queries or keys
    /// has no gradient here: that of a bias which does not can be asked for, and added up.
    pub fn of(attention: &AttentionProblem) -> Self {
        let p = attention;
        let as_is = |operand, layout: Layout| {
            let shape = p.shape(operand);
            let own = layout.is_injective(shape);
            if own { layout } else { Layout::bhsd(shape[1], shape[2], shape[3]) }
        };
        Self {
            attention: p.clone(),
            dout: p.o,
            dq: as_is(Operand::Q, p.q),
            dk: as_is(Operand::K, p.k),
            dv: as_is(Operand::V, p.v),
            dbias: p.bias.map(|bias| bias.layout).filter(|layout| {
                let shape = p.shape(Operand::Bias);
                repeats(layout, shape).is_none() && layout.is_injective(distinct(layout, shape))
            }),
        }
    }

    /// The forward call as the backward pass sees it: with lse, and with nothing else beside o.
    pub(crate) fn forward(&self) -> AttentionProblem {
        AttentionProblem { lse: true, weights: false, status: false, ..self.attention.clone() }
    }

    /// Logical shape of an operand.
    pub fn shape(&self, operand: Operand) -> [usize; 4] {
        self.attention.shape(like(operand))
    }

    /// Where an operand's elements lie; `None` when the backward pass has no such operand.
    pub fn layout(&self, operand: Operand) -> Option<Layout> {
        match operand {
            Operand::Dout => Some(self.dout),
            Operand::Dq => Some(self.dq),
            Operand::Dk => Some(self.dk),
            Operand::Dv => Some(self.dv),
            Operand::Dbias => self.attention.bias.and(self.dbias),
            Operand::Dsinks => self.attention.layout(Operand::Sinks),
            _ => self.forward().layout(operand),
        }
    }

    /// Storage of a tensor operand.
    pub(crate) fn dtype(&self, operand: Operand) -> Dtype {
        let p = &self.attention;
        match like(operand) {
            Operand::Q => p.dtype,
            Operand::K | Operand::V => p.stored_kv(),
            Operand::Bias => p.bias.map_or(Dtype::F32, |bias| bias.dtype),
            Operand::Sinks => Dtype::F32,
            _ => p.out_dtype,
        }
    }

    /// Bytes that a buffer for this operand needs, or a piece of one: whole words up to its last element. 0 when there is
    /// no such operand or it is empty; `u64::MAX` where no buffer could be so large.
    pub fn buffer_bytes(&self, operand: Operand) -> u64 {
        whole_words(self.extent(operand), self.attention.element_bytes(like(operand)))
    }

    /// Elements that a slice for this operand must hold: one past the largest index of its layout. 0 when there is no
    /// such operand or it is empty.
    pub fn extent(&self, operand: Operand) -> u128 {
        self.layout(operand).map_or(0, |layout| layout.extent(self.shape(operand)))
    }

    /// Floating-point operations, counted as FlashAttention does: two and a half times the forward call's.
    pub fn flops(&self) -> f64 {
        2.5 * self.attention.flops()
    }

    /// Checks every rule that does not depend on data or device.
    ///
    /// # Errors
    /// Those of [`AttentionProblem::validate`]; [`Error::NoGradient`] for similarities other than (scaled) dot
    /// products, for rings and pages, and for quantised k and v; [`Error::TooLarge`] and [`Error::Overlaps`] about a
    /// gradient.
    pub fn validate(&self) -> Result<()> {
        let forward = self.forward();
        forward.validate()?;
        let none = |of: &str| Err(Error::NoGradient { of: of.into() });
        match self.attention.similarity {
            Similarity::Dot | Similarity::ScaledDot => {}
            Similarity::Bilinear { .. } => return none("a bilinear similarity"),
            Similarity::Cosine => return none("a cosine similarity"),
            Similarity::Additive { .. } => return none("an additive similarity"),
        }
        match self.attention.cache {
            Cache::Contiguous | Cache::Ragged { .. } => {}
            Cache::Ring { .. } => return none("keys in a ring"),
            Cache::Paged { .. } => return none("keys in pages"),
        }
        if !forward.stored_kv().is_float() {
            return Err(Error::NoGradient { of: format!("keys of {}", forward.stored_kv()) });
        }
        for operand in [Operand::Dout].into_iter().chain(Operand::GRADIENTS) {
            let extent = self.extent(operand);
            if extent > u128::from(u32::MAX) {
                let what = format!("{operand}'s last element index");
                return Err(Error::TooLarge { what, got: extent, max: u32::MAX.into() });
            }
        }
        for operand in Operand::GRADIENTS {
            let Some(layout) = self.layout(operand) else { continue };
            let mut shape = self.shape(operand);
            if operand == Operand::Dbias {
                if let Some(what) = repeats(&layout, shape) {
                    return none(&format!("a bias that repeats over {what}"));
                }
                shape = distinct(&layout, shape);
            }
            if !layout.is_injective(shape) {
                return Err(Error::Overlaps { operand, shape, strides: layout.strides });
            }
        }
        Ok(())
    }

    /// Entries and heads that have an element of the gradient by bias each: 1 of those that add up.
    pub(crate) fn owners_of_bias(&self) -> [usize; 2] {
        self.layout(Operand::Dbias).map_or([0; 2], |layout| {
            let [entries, heads, ..] = distinct(&layout, self.shape(Operand::Dbias));
            [entries, heads]
        })
    }

    /// The problem, and slices against it.
    pub(crate) fn check(&self, inputs: &Inputs<'_>, dout: TensorRef<'_>) -> Result<()> {
        self.validate()?;
        inputs.check(&self.forward())?;
        let operand = Operand::Dout;
        let (need, got) = (self.dtype(operand), dout.dtype());
        if need != got {
            return Err(Error::DtypeMismatch { operand, need, got });
        }
        let (need, got) = (self.extent(operand) as u64, dout.len() as u64);
        if need > got {
            return Err(Error::OutOfBounds { operand, need, got, unit: "elements", container: "slice" });
        }
        Ok(())
    }
}

/// The part of a bias's shape that does not repeat over entries or heads.
fn distinct(layout: &Layout, shape: [usize; 4]) -> [usize; 4] {
    let of = |dim: usize| if layout.strides[dim] == 0 { shape[dim].min(1) } else { shape[dim] };
    [of(0), of(1), shape[2], shape[3]]
}

/// What a bias repeats over that no gradient adds up.
fn repeats(layout: &Layout, shape: [usize; 4]) -> Option<&'static str> {
    let is = |dim: usize| layout.strides[dim] == 0 && shape[dim] > 1;
    if is(2) { Some("queries") } else { is(3).then_some("keys") }
}

/// The operand whose shape and type a gradient has.
fn like(operand: Operand) -> Operand {
    match operand {
        Operand::Dout => Operand::O,
        Operand::Dq => Operand::Q,
        Operand::Dk => Operand::K,
        Operand::Dv => Operand::V,
        Operand::Dbias => Operand::Bias,
        Operand::Dsinks => Operand::Sinks,
        other => other,
    }
}
