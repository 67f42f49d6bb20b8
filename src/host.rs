//! Operands and results as slices and vectors: what the one-shot calls, the CPU path and the
//! oracle take and give.

use crate::cache::Cache;
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
    /// The additive similarity's matrix on queries.
    pub wq: Option<&'a [f32]>,
    /// The additive similarity's matrix on keys.
    pub wk: Option<&'a [f32]>,
    /// The additive similarity's weights.
    pub score_v: Option<&'a [f32]>,
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
    /// Pages of each batch entry's keys, `[batch, max_blocks]`; those past its length are not looked at.
    pub block_table: Option<&'a [u32]>,
    /// Where each batch entry's ragged queries begin, and the last end.
    pub cu_seqlens_q: Option<&'a [u32]>,
    /// Where each batch entry's ragged keys begin, and the last end.
    pub cu_seqlens_k: Option<&'a [u32]>,
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
            wq: None,
            wk: None,
            score_v: None,
            bias: None,
            mask: None,
            alibi_slopes: None,
            sinks: None,
            kv_lens: None,
            block_table: None,
            cu_seqlens_q: None,
            cu_seqlens_k: None,
        }
    }

    /// Element type (where the operand may have several), element count and bytes of an operand.
    pub(crate) fn get(&self, operand: Operand) -> Option<(Option<Dtype>, usize, &'a [u8])> {
        let tensor = |t: TensorRef<'a>| (Some(t.dtype()), t.len(), t.bytes());
        let floats = |x: &'a [f32]| (None, x.len(), bytemuck::cast_slice(x));
        let words = |x: &'a [u32]| (None, x.len(), bytemuck::cast_slice(x));
        match operand {
            Operand::Q => Some(tensor(self.q)),
            Operand::K => Some(tensor(self.k)),
            Operand::V => Some(tensor(self.v)),
            Operand::W => self.w.map(floats),
            Operand::Wq => self.wq.map(floats),
            Operand::Wk => self.wk.map(floats),
            Operand::ScoreV => self.score_v.map(floats),
            Operand::Bias => self.bias.map(tensor),
            Operand::Mask => self.mask.map(|x| (None, x.len(), x)),
            Operand::AlibiSlopes => self.alibi_slopes.map(floats),
            Operand::Sinks => self.sinks.map(floats),
            Operand::KvLens => self.kv_lens.map(words),
            Operand::BlockTable => self.block_table.map(words),
            Operand::CuSeqlensQ => self.cu_seqlens_q.map(words),
            Operand::CuSeqlensK => self.cu_seqlens_k.map(words),
            _ => None,
        }
    }

    /// Checks the problem, and these slices against it.
    ///
    /// # Errors
    /// Those of [`AttentionProblem::validate`], and [`Error::MissingOperand`],
    /// [`Error::UnexpectedOperand`], [`Error::DtypeMismatch`], [`Error::OutOfBounds`], [`Error::KvLen`],
    /// [`Error::BlockTable`] and [`Error::CuSeqlens`].
    pub fn check(&self, problem: &AttentionProblem) -> Result<()> {
        use Operand::*;
        problem.validate()?;
        let inputs = [
            Q,
            K,
            V,
            W,
            Wq,
            Wk,
            ScoreV,
            Bias,
            Mask,
            AlibiSlopes,
            Sinks,
            KvLens,
            BlockTable,
            CuSeqlensQ,
            CuSeqlensK,
        ];
        for operand in inputs {
            self.check_operand(problem, operand)?;
        }
        for (batch, &got) in self.kv_lens.iter().flat_map(|lens| lens[..problem.batch].iter().enumerate()) {
            if got as usize > problem.seq_kv {
                return Err(Error::KvLen { batch, got, seq_kv: problem.seq_kv });
            }
        }
        self.check_ragged(problem)?;
        let Some(table) = self.block_table else { return Ok(()) };
        let Cache::Paged { pages, page_size, max_blocks } = problem.cache else { return Ok(()) };
        for batch in 0..problem.batch {
            for block in 0..self.len_k(problem, batch).div_ceil(page_size) {
                let got = table[batch * max_blocks + block];
                if got as usize >= pages {
                    return Err(Error::BlockTable { batch, block, got, pages });
                }
            }
        }
        Ok(())
    }

    /// An operand is there if the problem wants it, has its type, and is long enough.
    fn check_operand(&self, problem: &AttentionProblem, operand: Operand) -> Result<()> {
        let wanted = problem.layout(operand).is_some();
        let Some((dtype, len, _)) = operand.brought(wanted, self.get(operand))? else { return Ok(()) };
        let need = match operand {
            Operand::Bias => problem.bias.map(|bias| bias.dtype),
            Operand::K | Operand::V => Some(problem.stored_kv()),
            _ => Some(problem.dtype),
        };
        if let (Some(got), Some(need)) = (dtype, need)
            && got != need
        {
            return Err(Error::DtypeMismatch { operand, need, got });
        }
        let need = problem.extent(operand);
        if need > len as u128 {
            let (need, got, unit, container) = (need as u64, len as u64, "elements", "slice");
            return Err(Error::OutOfBounds { operand, need, got, unit, container });
        }
        Ok(())
    }

    /// The lists of ragged sequences alone, for those who read them before attention does.
    pub(crate) fn check_lists(&self, problem: &AttentionProblem) -> Result<()> {
        self.check_operand(problem, Operand::CuSeqlensQ)?;
        self.check_operand(problem, Operand::CuSeqlensK)?;
        self.check_ragged(problem)
    }

    /// Offsets of ragged sequences rise, stay inside the rows, and leave no entry longer than stated.
    fn check_ragged(&self, problem: &AttentionProblem) -> Result<()> {
        let total_k = if let Cache::Ragged { total } = problem.cache { Some(total) } else { None };
        for (operand, total, list, longest) in [
            (Operand::CuSeqlensQ, problem.total_q, self.cu_seqlens_q, problem.seq_q),
            (Operand::CuSeqlensK, total_k, self.cu_seqlens_k, problem.seq_kv),
        ] {
            let (Some(total), Some(list)) = (total, list) else { continue };
            let mut before = 0;
            for (index, &got) in list[..=problem.batch].iter().enumerate() {
                // From the first row to the last, so that every row is somebody's.
                let least = if index == problem.batch { total as u32 } else { before };
                let longest = if index == 0 { 0 } else { u64::from(before) + longest as u64 };
                let most = longest.min(total as u64);
                if got < least || u64::from(got) > most {
                    return Err(Error::CuSeqlens { operand, index, got, least, most });
                }
                before = got;
            }
        }
        Ok(())
    }

    /// Valid keys of a batch entry.
    pub(crate) fn len_k(&self, problem: &AttentionProblem, batch: usize) -> usize {
        if let Some(list) = self.cu_seqlens_k {
            return (list[batch + 1] - list[batch]) as usize;
        }
        self.kv_lens.map_or(problem.seq_kv, |lens| (lens[batch] as usize).min(problem.seq_kv))
    }

    /// Queries of a batch entry.
    pub(crate) fn len_q(&self, problem: &AttentionProblem, batch: usize) -> usize {
        self.cu_seqlens_q.map_or(problem.seq_q, |list| (list[batch + 1] - list[batch]) as usize)
    }

    /// The batch entry and the query of an index of q and o: of the first and third of their dimensions.
    pub(crate) fn query_of(&self, [entry, row]: [usize; 2]) -> [usize; 2] {
        self.cu_seqlens_q.map_or([entry, row], |list| entry_of(list, row))
    }
}

/// The entry that a row of a ragged batch belongs to, and the row's number there; `list` rises from 0 to all
/// rows.
pub(crate) fn entry_of(list: &[u32], row: usize) -> [usize; 2] {
    let entry = list.partition_point(|&first| first as usize <= row) - 1;
    [entry, row - list[entry] as usize]
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
    ///
    /// # Panics
    /// When these are the outputs of another problem, and fewer.
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
