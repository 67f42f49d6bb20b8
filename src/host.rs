//! Operands and results as slices and vectors: what the one-shot calls, the CPU path and the
//! oracle take and give.

use crate::dtype::{Dtype, Tensor, TensorRef};
use crate::error::{Error, Operand, Result};
use crate::problem::AttentionProblem;

/// The operands of one call as slices, laid out as the problem says.
///
/// ```
/// use wgpu_attention::{AttentionProblem, Inputs, TensorRef};
/// let x = vec![0.5_f32; 2 * 4 * 8];
/// let inputs = Inputs::new(&x[..], &x[..], &x[..]);
/// assert!(inputs.check(&AttentionProblem::new(1, 2, 2, 4, 4, 8, 8)).is_ok());
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// Queries.
    pub q: TensorRef<'a>,
    /// Keys.
    pub k: TensorRef<'a>,
    /// Values.
    pub v: TensorRef<'a>,
    /// The bilinear matrix.
    pub w: Option<&'a [f32]>,
    /// The additive bias.
    pub bias: Option<TensorRef<'a>>,
    /// The boolean mask, one byte an element; non-zero keeps.
    pub mask: Option<&'a [u8]>,
    /// ALiBi slopes, one for each query head.
    pub alibi_slopes: Option<&'a [f32]>,
    /// Sink logits, one for each query head.
    pub sinks: Option<&'a [f32]>,
    /// Valid keys, one for each batch entry.
    pub kv_lens: Option<&'a [u32]>,
}

impl<'a> Inputs<'a> {
    /// The three operands that every problem has; fill in the rest with `..`.
    pub fn new(
        q: impl Into<TensorRef<'a>>,
        k: impl Into<TensorRef<'a>>,
        v: impl Into<TensorRef<'a>>,
    ) -> Self {
        Self {
            q: q.into(),
            k: k.into(),
            v: v.into(),
            w: None,
            bias: None,
            mask: None,
            alibi_slopes: None,
            sinks: None,
            kv_lens: None,
        }
    }

    /// Element type (where the operand may have several), element count and bytes of an operand.
    pub(crate) fn get(&self, operand: Operand) -> Option<(Option<Dtype>, usize, &'a [u8])> {
        let tensor = |t: TensorRef<'a>| (Some(t.dtype()), t.len(), t.bytes());
        let floats = |x: &'a [f32]| (None, x.len(), bytemuck::cast_slice(x));
        match operand {
            Operand::Q => Some(tensor(self.q)),
            Operand::K => Some(tensor(self.k)),
            Operand::V => Some(tensor(self.v)),
            Operand::W => self.w.map(floats),
            Operand::Bias => self.bias.map(tensor),
            Operand::Mask => self.mask.map(|x| (None, x.len(), x)),
            Operand::AlibiSlopes => self.alibi_slopes.map(floats),
            Operand::Sinks => self.sinks.map(floats),
            Operand::KvLens => self.kv_lens.map(|x| (None, x.len(), bytemuck::cast_slice(x))),
            Operand::O | Operand::Lse | Operand::Weights => None,
        }
    }

    /// Checks the problem, and these slices against it.
    ///
    /// # Errors
    /// Those of [`AttentionProblem::validate`], and [`Error::MissingOperand`],
    /// [`Error::UnexpectedOperand`], [`Error::DtypeMismatch`], [`Error::OutOfBounds`] and
    /// [`Error::KvLen`].
    pub fn check(&self, problem: &AttentionProblem) -> Result<()> {
        use Operand::*;
        problem.validate()?;
        for operand in [Q, K, V, W, Bias, Mask, AlibiSlopes, Sinks, KvLens] {
            let (wanted, got) = (problem.layout(operand).is_some(), self.get(operand));
            let Some((dtype, len, _)) = got else {
                if wanted {
                    return Err(Error::MissingOperand { operand });
                }
                continue;
            };
            if !wanted {
                return Err(Error::UnexpectedOperand { operand });
            }
            let need =
                if operand == Bias { problem.bias.map(|bias| bias.dtype) } else { Some(problem.dtype) };
            if let (Some(got), Some(need)) = (dtype, need)
                && got != need
            {
                return Err(Error::DtypeMismatch { operand, need, got });
            }
            let need = problem.extent(operand);
            if need > len as u128 {
                return Err(Error::OutOfBounds {
                    operand,
                    need: need as u64,
                    got: len as u64,
                    unit: "elements",
                    container: "slice",
                });
            }
        }
        for (batch, &got) in self.kv_lens.iter().flat_map(|lens| lens[..problem.batch].iter().enumerate()) {
            if got as usize > problem.seq_kv {
                return Err(Error::KvLen { batch, got, seq_kv: problem.seq_kv });
            }
        }
        Ok(())
    }

    /// Valid keys of a batch entry.
    pub(crate) fn len_k(&self, problem: &AttentionProblem, batch: usize) -> usize {
        self.kv_lens.map_or(problem.seq_kv, |lens| (lens[batch] as usize).min(problem.seq_kv))
    }
}

/// What one call gives.
#[derive(Clone, Debug, PartialEq)]
pub struct Outputs {
    /// The attended values, laid out as [`AttentionProblem::o`] says and as long as that layout
    /// reaches; places between its elements are 0.
    pub o: Tensor,
    /// Natural logarithm of each row's denominator, `[batch, heads_q, seq_q]`, when asked for.
    pub lse: Option<Vec<f32>>,
    /// The weights, `[batch, heads_q, seq_q, seq_kv]`, when asked for.
    pub weights: Option<Vec<f32>>,
}

impl Outputs {
    /// Zeros of the right size. The problem must have been validated.
    pub(crate) fn zeros(problem: &AttentionProblem) -> Self {
        let zeros = |operand| problem.layout(operand).map(|_| vec![0.0; problem.extent(operand) as usize]);
        Self {
            o: Tensor::zeros(problem.out_dtype, problem.extent(Operand::O) as usize),
            lse: zeros(Operand::Lse),
            weights: zeros(Operand::Weights),
        }
    }

    /// o in logical order, `[batch, heads_q, seq_q, head_dim_v]`, widened to f32.
    pub fn o_contiguous(&self, problem: &AttentionProblem) -> Vec<f32> {
        let [b, h, s, d] = problem.shape(Operand::O);
        let mut out = Vec::with_capacity(b * h * s * d);
        let o = self.o.as_ref();
        for at in 0..b * h * s {
            let (b, h, s) = (at / s / h, at / s % h, at % s);
            out.extend((0..d).map(|d| o.get(problem.o.index([b, h, s, d]))));
        }
        out
    }
}
