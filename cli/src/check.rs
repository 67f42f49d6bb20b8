//! Holding a result to the oracle, for problems too large to compute whole in f64.

use std::ops::Range;

use wgpu_attention::reference::{self, Reference};
use wgpu_attention::{AttentionProblem, Bias, Dtype, Inputs, Layout, Operand, Similarity, Tensor, TensorRef};

use crate::failure::Result;
use crate::{backend, cache};

/// Multiply-adds that the oracle may spend on one problem, less than a second on two cores.
const ORACLE_WORK: f64 = 1e8;
/// Rows whose naive error makes the budget of narrow types; the same work limit holds.
const NAIVE_ROWS: usize = 64;

/// The oracle's answer for some rows of one problem, and the error that a path may have on them.
pub(crate) struct Judge {
    rows: Vec<Range<usize>>,
    reference: Reference,
    /// The largest error that the contract allows.
    pub(crate) budget: f64,
}

impl Judge {
    /// Computes the oracle on every row, or on blocks of rows spread evenly where that is too much.
    pub(crate) fn new(problem: &AttentionProblem, inputs: &Inputs<'_>) -> Result<Self> {
        let rows = sample(problem);
        let reference = backend::oracle_rows(problem, inputs, &rows)?;
        let naive =
            if problem.dtype == Dtype::F32 { 0.0 } else { naive_error(problem, inputs, &rows, &reference)? };
        let budget = reference::tolerance(problem, &reference, naive);
        Ok(Self { rows, reference, budget })
    }

    /// Largest error of an output on the rows that the oracle knows.
    pub(crate) fn error(&self, problem: &AttentionProblem, o: TensorRef<'_>) -> f64 {
        let p = problem;
        let got = self.rows.iter().cloned().flatten().flat_map(|row| {
            let [b, h, i] = [row / p.seq_q / p.heads_q, row / p.seq_q % p.heads_q, row % p.seq_q];
            (0..p.head_dim_v).map(move |d| f64::from(o.get(p.o.index([b, h, i, d]))))
        });
        reference::max_error(got, &self.reference.o)
    }
}

/// Which rows to check.
fn sample(p: &AttentionProblem) -> Vec<Range<usize>> {
    const BLOCK: usize = 16;
    let all = p.rows();
    let row_work = (p.seq_kv * (p.head_dim + p.head_dim_v) + p.query_dim() * p.head_dim).max(1) as f64;
    let blocks = ((ORACLE_WORK / row_work) as usize / BLOCK).max(4);
    if blocks * BLOCK >= all {
        return std::iter::once(0..all).collect();
    }
    // The first and the last rows are always among them.
    let last = all - BLOCK;
    (0..blocks).map(|i| i * last / (blocks - 1)).map(|start| start..start + BLOCK).collect::<Vec<_>>()
}

/// Error of the naive computation in the storage precision: what it is on some of the rows, or at the least on all,
/// which is the rounding of the oracle's answer.
fn naive_error(
    p: &AttentionProblem,
    inputs: &Inputs<'_>,
    rows: &[Range<usize>],
    reference: &Reference,
) -> Result<f64> {
    let rows: Vec<usize> = rows.iter().cloned().flatten().collect();
    let step = rows.len().div_ceil(NAIVE_ROWS).max(1);
    let exact = reference.o.iter().map(|&x| x as f32).collect::<Vec<_>>();
    let rounded = Tensor::from_f32(p.dtype, &exact).to_f32();
    let mut worst = reference::max_error(rounded.into_iter().map(f64::from), &reference.o);
    for (at, &row) in rows.iter().enumerate().step_by(step) {
        let naive = naive_row(p, inputs, row)?;
        let want = &reference.o[at * p.head_dim_v..][..p.head_dim_v];
        worst = worst.max(reference::max_error(naive, want));
    }
    Ok(worst)
}

/// One row of the naive computation: the problem of one query and the keys that it may see, taken out of
/// their cache.
fn naive_row(p: &AttentionProblem, inputs: &Inputs<'_>, row: usize) -> Result<Vec<f64>> {
    let [b, h, i] = [row / p.seq_q / p.heads_q, row / p.seq_q % p.heads_q, row % p.seq_q];
    let len_k = inputs.kv_lens.map_or(p.seq_kv, |lens| lens[b] as usize);
    let keys = p.kv_range(i, len_k);
    let similarity = match p.similarity {
        Similarity::Bilinear { query_dim, .. } => Similarity::Bilinear { query_dim, per_head: false },
        Similarity::Additive { query_dim, hidden, .. } => {
            Similarity::Additive { query_dim, hidden, per_head: false }
        }
        other => other,
    };
    let per_head = similarity != p.similarity;
    // Where the head's own matrices begin.
    let own = |operand| if per_head { p.extent(operand) as usize / p.heads_q * h } else { 0 };
    // ALiBi depends on where the query stands among all keys: here it is a part of the bias.
    let slope = p.alibi.then(|| inputs.alibi_slopes.map_or(0.0, |slopes| slopes[h]));
    let position = i as i64 + p.positions_align().offset(p.seq_q, len_k);
    let biases: Option<Vec<f32>> = slope.map(|slope| {
        let given = |j| match (p.bias, inputs.bias) {
            (Some(bias), Some(values)) => values.get(bias.layout.index([b, h, i, j])),
            _ => 0.0,
        };
        keys.clone().map(|j| given(j) - slope * (position - j as i64).unsigned_abs() as f32).collect()
    });
    let here = |layout: Layout| layout.at(layout.index([b, h, i, keys.start]));
    let rows = |of| keys.clone().flat_map(|j| cache::row(p, inputs, of, [b, p.kv_head(h), j])).collect();
    let (k, v): (Vec<f32>, Vec<f32>) = (rows(Operand::K), rows(Operand::V));
    let base = AttentionProblem::new(1, 1, 1, 1, keys.len(), p.head_dim, p.head_dim_v).with_dtype(p.dtype);
    let one = AttentionProblem {
        similarity,
        scale: p.scale,
        softcap: p.softcap,
        bias: match biases {
            Some(_) => Some(Bias { dtype: Dtype::F32, layout: Layout::bhsd(1, 1, keys.len()) }),
            None => p.bias.map(|bias| Bias { layout: here(bias.layout), ..bias }),
        },
        mask: p.mask.map(here),
        sinks: p.sinks,
        q: p.q.at(p.q.index([b, h, i, 0])),
        kv_dtype: Some(Dtype::F32),
        ..base
    };
    let inputs = Inputs {
        k: TensorRef::F32(&k),
        v: TensorRef::F32(&v),
        w: inputs.w.map(|all| &all[own(Operand::W)..]),
        wq: inputs.wq.map(|all| &all[own(Operand::Wq)..]),
        wk: inputs.wk.map(|all| &all[own(Operand::Wk)..]),
        score_v: inputs.score_v.map(|all| &all[own(Operand::ScoreV)..]),
        bias: biases.as_deref().map(TensorRef::F32).or(inputs.bias),
        sinks: inputs.sinks.map(|sinks| &sinks[h..]),
        alibi_slopes: None,
        kv_lens: None,
        block_table: None,
        cu_seqlens_k: None,
        ..*inputs
    };
    Ok(reference::naive(&one, &inputs)?.o)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Data;
    use crate::prng::Prng;
    use wgpu_attention::{Align, Cache, Window};

    /// The largest values stand in rows whose naive error is not computed; rounding them is no error.
    #[test]
    fn budgets_have_room_for_the_rounding_of_every_row() {
        let window = Some(Window { left: Some(1), right: Some(0) });
        let p = AttentionProblem { window, ..AttentionProblem::new(1, 1, 1, 300, 300, 4, 8) };
        let p = p.with_dtype(Dtype::F16);
        let mut data = Data::random(&p, &mut Prng::new(1));
        (0..8).for_each(|d| data.v.set(p.v.index([0, 0, 1, d]), 2000.0));
        let judge = Judge::new(&p, &data.inputs()).unwrap();
        let exact: Vec<f32> = judge.reference.o.iter().map(|&x| x as f32).collect();
        let rounded = Tensor::from_f32(Dtype::F16, &exact);
        let error = judge.error(&p, rounded.as_ref());
        assert!(error > 0.05 && error <= judge.budget, "{error} of {}", judge.budget);
    }

    #[test]
    fn one_row_is_that_row_of_the_whole() {
        let pairs = Layout::broadcast([2, 4, 5, 7]);
        let p = AttentionProblem {
            similarity: Similarity::Bilinear { query_dim: 8, per_head: true },
            bias: Some(Bias { dtype: Dtype::F16, layout: pairs }),
            mask: Some(pairs),
            causal: Some(Align::BottomRight),
            window: Some(Window { left: Some(4), right: None }),
            softcap: Some(5.0),
            kv_lens: true,
            sinks: true,
            ..AttentionProblem::new(2, 4, 2, 5, 7, 8, 3).with_dtype(Dtype::F16)
        };
        let data = Data::random(&p, &mut Prng::new(1));
        let whole = reference::naive(&p, &data.inputs()).unwrap();
        for row in 0..p.rows() {
            assert_eq!(naive_row(&p, &data.inputs(), row).unwrap(), whole.o[row * 3..][..3], "row {row}");
        }
        for per_head in [true, false] {
            let similarity = Similarity::Additive { query_dim: 6, hidden: 5, per_head };
            let p = AttentionProblem { similarity, ..p.clone() };
            let p = AttentionProblem { q: Layout::bhsd(4, 5, 6), ..p };
            let data = Data::random(&p, &mut Prng::new(1));
            let whole = reference::naive(&p, &data.inputs()).unwrap();
            for row in 0..p.rows() {
                assert_eq!(naive_row(&p, &data.inputs(), row).unwrap(), whole.o[row * 3..][..3], "row {row}");
            }
        }
        // Wherever its keys are kept, and in whatever type.
        for (kept, kv_dtype) in [
            (Cache::Contiguous, Dtype::Int8),
            (Cache::Ring { capacity: 7 }, Dtype::F32),
            (Cache::Paged { pages: 8, page_size: 2, max_blocks: 4 }, Dtype::Int4),
        ] {
            let p = p.clone().with_cache(kept, kv_dtype);
            let data = Data::random(&p, &mut Prng::new(1));
            let whole = reference::naive(&p, &data.inputs()).unwrap();
            for row in 0..p.rows() {
                let got = naive_row(&p, &data.inputs(), row).unwrap();
                assert_eq!(got, whole.o[row * 3..][..3], "row {row} of {kept}");
            }
        }
        // ALiBi is rounded once less.
        let p = AttentionProblem { alibi: true, bias: None, ..p };
        let data = Data::random(&p, &mut Prng::new(1));
        let whole = reference::naive(&p, &data.inputs()).unwrap();
        for row in 0..p.rows() {
            let got = naive_row(&p, &data.inputs(), row).unwrap();
            assert!(reference::max_error(got, &whole.o[row * 3..][..3]) < 1e-3, "row {row}");
        }
    }

    #[test]
    fn samples_reach_both_ends() {
        let p = AttentionProblem::new(1, 8, 8, 4096, 4096, 64, 64);
        let rows = sample(&p);
        assert_eq!((rows[0].start, rows.last().unwrap().end), (0, p.rows()));
        let small = sample(&AttentionProblem::new(1, 1, 1, 3, 3, 4, 4));
        assert_eq!((small.len(), &small[0]), (1, &(0..3)));
    }
}
