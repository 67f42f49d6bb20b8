//! The references that every path is held to: an f64 oracle in four plain passes, a naive
//! computation in the storage precision, and the error budget made of both.

pub use crate::backward::oracle::{Gradients, backward, backward_naive, backward_tolerance};
use crate::cache::{Cache, KvRows};
use crate::dtype::Dtype;
use crate::error::{Operand, Result};
use crate::host::Inputs;
pub use crate::layer::oracle::{LayerReference, layer, layer_naive};
pub use crate::linear::oracle::{LinearReference, linear};
pub use crate::merge::oracle::{Merged, merge_states};
use crate::problem::{AttentionProblem, LEAST_NORM, Similarity};

/// What [`oracle`] and [`naive`] give, in logical order and f64.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Reference {
    /// `[batch, heads_q, seq_q, head_dim_v]`; `[heads_q, total_q, head_dim_v]` where queries are ragged.
    pub o: Vec<f64>,
    /// The same without the last dimension, natural logarithm.
    pub lse: Vec<f64>,
    /// `[batch, heads_q, seq_q, seq_kv]` when [`AttentionProblem::weights`] asks for it; `[rows, seq_kv]` of
    /// [`oracle_rows`].
    pub weights: Option<Vec<f64>>,
    /// Largest finite magnitude of a kept score.
    pub max_score: f64,
    /// Largest finite magnitude in v.
    pub max_value: f64,
}

/// Attention in f64: scores, maximum, exponentials, weighted sum; no tiling, no online softmax.
///
/// ```
/// use wgpu_attention::{AttentionProblem, Inputs, reference};
/// let problem = AttentionProblem::new(1, 1, 1, 1, 2, 1, 1);
/// let (q, k, v) = ([0.0_f32], [1.0_f32, 2.0], [1.0_f32, 3.0]);
/// let result = reference::oracle(&problem, &Inputs::new(&q[..], &k[..], &v[..]))?;
/// assert_eq!(result.o, [2.0]);
/// assert_eq!(result.lse, [2.0_f64.ln()]);
/// # Ok::<(), wgpu_attention::Error>(())
/// ```
///
/// # Errors
/// Those of [`Inputs::check`].
pub fn oracle(problem: &AttentionProblem, inputs: &Inputs<'_>) -> Result<Reference> {
    compute(problem, inputs, None, &|x| x)
}

/// The oracle for some query rows only, numbered as those of [`Reference::lse`]: a slice of a problem too
/// large to compute whole.
///
/// # Errors
/// Those of [`Inputs::check`].
///
/// # Panics
/// When `rows` reaches past those of the problem.
pub fn oracle_rows(
    problem: &AttentionProblem,
    inputs: &Inputs<'_>,
    rows: std::ops::Range<usize>,
) -> Result<Reference> {
    compute(problem, inputs, Some(rows), &|x| x)
}

/// What a plain framework computes when every tensor has the storage precision: each of scores,
/// scaled scores, capped scores, biased scores, weights and output is rounded to
/// [`AttentionProblem::dtype`]. Its error is the yardstick of FlashAttention's tests.
///
/// # Errors
/// Those of [`Inputs::check`].
pub fn naive(problem: &AttentionProblem, inputs: &Inputs<'_>) -> Result<Reference> {
    let dtype = problem.dtype;
    compute(problem, inputs, None, &move |x| dtype.round(x as f32) as f64)
}

/// The largest error of `o` that a path may have. `naive_error` is the maximal error of [`naive`]
/// against the oracle, used where the storage is narrower than f32.
///
/// f32: `8 * 2^-24 * max(1, max|s|) * max|V|`, never above `1e-4 * max|V|`. f16 and bf16: twice
/// the naive error plus 1e-5.
pub fn tolerance(problem: &AttentionProblem, oracle: &Reference, naive_error: f64) -> f64 {
    if problem.dtype == Dtype::F32 && problem.out_dtype == Dtype::F32 {
        let relative = 8.0 * 2f64.powi(-24) * oracle.max_score.max(1.0);
        relative.min(1e-4) * oracle.max_value
    } else {
        2.0 * naive_error + 1e-5
    }
}

/// Largest absolute difference, where equal infinities and two NaNs count as equal and a NaN on
/// one side alone counts as infinite.
pub fn max_error(got: impl IntoIterator<Item = f64>, want: &[f64]) -> f64 {
    let mut worst = 0.0_f64;
    let mut seen = 0;
    for (got, &want) in got.into_iter().zip(want) {
        seen += 1;
        if got == want || (got.is_nan() && want.is_nan()) {
            continue;
        }
        let error = (got - want).abs();
        worst = if error.is_nan() { f64::INFINITY } else { worst.max(error) };
    }
    if seen == want.len() { worst } else { f64::INFINITY }
}

fn compute(
    problem: &AttentionProblem,
    inputs: &Inputs<'_>,
    rows: Option<std::ops::Range<usize>>,
    round: &dyn Fn(f64) -> f64,
) -> Result<Reference> {
    inputs.check(problem)?;
    let p = problem;
    let [entries, heads, queries, _] = p.shape(Operand::O);
    let all = if p.rows() == 0 { 0 } else { entries * heads * queries };
    let whole = rows.is_none();
    let rows = rows.unwrap_or(0..all);
    // Ragged queries leave rows of the whole without a query.
    let weights = if whole { p.extent(Operand::Weights) as usize } else { rows.len() * p.seq_kv };
    let mut out = Reference {
        o: Vec::with_capacity(rows.len() * p.head_dim_v),
        lse: Vec::with_capacity(rows.len()),
        weights: p.weights.then(|| vec![0.0; weights]),
        max_score: 0.0,
        max_value: max_finite(problem, inputs),
    };
    let values = KvRows::new(p, inputs, Operand::V);
    let mut projected = ProjectedKeys::default();
    for (at, row) in rows.enumerate() {
        let place = [row / queries / heads, row / queries % heads, row % queries];
        let h = place[1];
        let [b, i] = inputs.query_of([place[0], place[2]]);
        if let Similarity::Additive { .. } = p.similarity {
            projected.make(p, inputs, [b, h], round);
        }
        let scores = scores(p, inputs, [b, h, i], place, &projected, round);

        let kept = scores.iter().flatten().copied();
        let of = Denominator::new(kept.clone(), inputs.sinks.map(|sinks| f64::from(sinks[h])));
        out.max_score = kept.filter(|s| s.is_finite()).fold(out.max_score, |m, s| m.max(s.abs()));
        let weight = |s: Option<f64>| s.map_or(0.0, |s| round(of.weight(s)));
        out.lse.push(of.lse());

        // The weighted sum, over kept keys alone: what lies at a dropped key is never read.
        let mut o = vec![0.0; p.head_dim_v];
        for (j, s) in scores.iter().enumerate().filter(|(_, s)| s.is_some()) {
            let at = values.index([b, p.kv_head(h), j]);
            for (d, o) in o.iter_mut().enumerate() {
                *o += weight(*s) * f64::from(inputs.v.element(at, values.step(), p.head_dim_v, d));
            }
        }
        out.o.extend(o.into_iter().map(round));
        if let Some(weights) = &mut out.weights {
            let at = if whole { (b * heads + h) * p.seq_q + i } else { at };
            for (to, s) in weights[at * p.seq_kv..].iter_mut().zip(scores) {
                *to = weight(s);
            }
        }
    }
    Ok(out)
}

/// What a row's exponentials are divided by.
pub(crate) struct Denominator {
    max: f64,
    /// Of exponentials, the largest of which is 1; 0 of a row of nothing but -inf (or nothing).
    pub(crate) sum: f64,
}

impl Denominator {
    /// Of the scores of kept keys, and the sink.
    pub(crate) fn new(kept: impl Iterator<Item = f64> + Clone, sink: Option<f64>) -> Self {
        let all = kept.chain(sink);
        // f64::max would hide a NaN.
        let larger = |m: f64, s: f64| if s > m || s.is_nan() { s } else { m };
        let of = Self { max: all.clone().fold(f64::NEG_INFINITY, larger), sum: 0.0 };
        Self { sum: all.map(|s| of.exp(s)).sum(), ..of }
    }

    fn exp(&self, s: f64) -> f64 {
        if s == f64::NEG_INFINITY { 0.0 } else { (s - self.max).exp() }
    }

    /// Its logarithm.
    pub(crate) fn lse(&self) -> f64 {
        if self.sum == 0.0 { f64::NEG_INFINITY } else { self.max + self.sum.ln() }
    }

    /// The weight of a kept score.
    pub(crate) fn weight(&self, s: f64) -> f64 {
        if self.sum == 0.0 { 0.0 } else { self.exp(s) / self.sum }
    }
}

/// Scores of one query, which lies at `place` of q, against every valid key; `None` where a mask drops the key.
pub(crate) fn scores(
    p: &AttentionProblem,
    inputs: &Inputs<'_>,
    [b, h, i]: [usize; 3],
    place: [usize; 3],
    projected: &ProjectedKeys,
    round: &dyn Fn(f64) -> f64,
) -> Vec<Option<f64>> {
    let (len_q, len_k) = (inputs.len_q(p, b), inputs.len_k(p, b));
    let range = p.kv_range_of(i, len_q, len_k);
    let q = projected_query(p, inputs, place, round);
    let keys = KvRows::new(p, inputs, Operand::K);
    let scale = p.effective_scale();
    let position = i as i64 + p.positions_align().offset(len_q, len_k);
    (0..len_k)
        .map(|j| {
            let masked = p
                .mask
                .is_some_and(|layout| inputs.mask.is_some_and(|mask| mask[layout.index([b, h, i, j])] == 0));
            if masked || !range.contains(&j) {
                return None;
            }
            let at = keys.index([b, p.kv_head(h), j]);
            let key = || (0..p.head_dim).map(|d| f64::from(inputs.k.element(at, keys.step(), p.head_dim, d)));
            let similarity: f64 = match p.similarity {
                Similarity::Cosine => {
                    let mut k: Vec<f64> = key().collect();
                    normalize(&mut k, round);
                    q.iter().zip(&k).map(|(q, k)| q * k).sum()
                }
                Similarity::Additive { hidden, .. } => {
                    let v = &inputs.score_v.unwrap_or_default()[own_matrix(p, h) * hidden..];
                    let k = &projected.rows[j * hidden..][..hidden];
                    let tanh = q.iter().zip(k).map(|(q, k)| round(round(q + k).tanh()));
                    tanh.zip(v).map(|(tanh, &v)| f64::from(v) * tanh).sum()
                }
                Similarity::Dot | Similarity::ScaledDot | Similarity::Bilinear { .. } => {
                    q.iter().zip(key()).map(|(q, k)| q * k).sum()
                }
            };
            let mut s = round(round(similarity) * scale);
            if let Some(cap) = p.softcap.map(f64::from) {
                s = round(cap * (s / cap).tanh());
            }
            if let (Some(bias), Some(values)) = (p.bias, inputs.bias) {
                let bias = f64::from(values.get(bias.layout.index([b, h, i, j])));
                if bias == f64::NEG_INFINITY {
                    return None;
                }
                s = round(s + bias);
            }
            if let (true, Some(slopes)) = (p.alibi, inputs.alibi_slopes) {
                let distance = (position - j as i64).unsigned_abs();
                s = round(s - f64::from(slopes[h]) * distance as f64);
            }
            Some(s)
        })
        .collect()
}

/// `Wk k` of the keys of one head, kept from row to row.
#[derive(Default)]
pub(crate) struct ProjectedKeys {
    /// The entry, the head of k, and the head of Wk.
    of: Option<[usize; 3]>,
    /// `[len_k, hidden]`.
    rows: Vec<f64>,
}

impl ProjectedKeys {
    fn make(
        &mut self,
        p: &AttentionProblem,
        inputs: &Inputs<'_>,
        [b, h]: [usize; 2],
        round: &dyn Fn(f64) -> f64,
    ) {
        let of = [b, p.kv_head(h), own_matrix(p, h)];
        if self.of == Some(of) {
            return;
        }
        self.of = Some(of);
        self.rows.clear();
        let keys = KvRows::new(p, inputs, Operand::K);
        let wk = &inputs.wk.unwrap_or_default()[of[2] * p.compared_dim() * p.head_dim..];
        for j in 0..inputs.len_k(p, b) {
            let at = keys.index([b, of[1], j]);
            let k = |d| f64::from(inputs.k.element(at, keys.step(), p.head_dim, d));
            let k: Vec<f64> = (0..p.head_dim).map(k).collect();
            let rows = wk.chunks_exact(p.head_dim).take(p.compared_dim());
            self.rows.extend(rows.map(|w| round(product(w, &k))));
        }
    }
}

/// Which of the matrices a query head uses.
fn own_matrix(p: &AttentionProblem, h: usize) -> usize {
    if p.has_own_matrices() { h } else { 0 }
}

fn product(w: &[f32], x: &[f64]) -> f64 {
    w.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum()
}

/// q, or `qT W` for the bilinear similarity, or `Wq q` for the additive, or q with length 1 for the cosine.
fn projected_query(
    p: &AttentionProblem,
    inputs: &Inputs<'_>,
    [b, h, i]: [usize; 3],
    round: &dyn Fn(f64) -> f64,
) -> Vec<f64> {
    let at = p.q.index([b, h, i, 0]);
    let q = |d: usize| f64::from(inputs.q.get(at + d * p.q.strides[3]));
    match (p.similarity, inputs.w) {
        (Similarity::Bilinear { query_dim, per_head }, Some(w)) => {
            let w = &w[if per_head { h * query_dim * p.head_dim } else { 0 }..];
            (0..p.head_dim)
                .map(|d| round((0..query_dim).map(|c| q(c) * f64::from(w[c * p.head_dim + d])).sum()))
                .collect()
        }
        (Similarity::Additive { query_dim, hidden, .. }, _) => {
            let q: Vec<f64> = (0..query_dim).map(q).collect();
            let wq = &inputs.wq.unwrap_or_default()[own_matrix(p, h) * hidden * query_dim..];
            wq.chunks_exact(query_dim).take(hidden).map(|w| round(product(w, &q))).collect()
        }
        (Similarity::Cosine, _) => {
            let mut q: Vec<f64> = (0..p.head_dim).map(q).collect();
            normalize(&mut q, round);
            q
        }
        _ => (0..p.head_dim).map(q).collect(),
    }
}

/// Divides a vector by its norm, or by the least that a norm counts as.
fn normalize(x: &mut [f64], round: &dyn Fn(f64) -> f64) {
    let norm = round(x.iter().map(|x| x * x).sum::<f64>().sqrt()).max(LEAST_NORM);
    x.iter_mut().for_each(|x| *x = round(*x / norm));
}

fn max_finite(p: &AttentionProblem, inputs: &Inputs<'_>) -> f64 {
    let values = KvRows::new(p, inputs, Operand::V);
    let mut max = 0.0_f64;
    for (b, h) in (0..p.batch).flat_map(|b| (0..p.heads_kv).map(move |h| (b, h))) {
        let len_k = inputs.len_k(p, b);
        let first = if let Cache::Ring { capacity } = p.cache { len_k.saturating_sub(capacity) } else { 0 };
        for j in first..len_k {
            let at = values.index([b, h, j]);
            for d in 0..p.head_dim_v {
                let x = f64::from(inputs.v.element(at, values.step(), p.head_dim_v, d)).abs();
                if x.is_finite() {
                    max = max.max(x);
                }
            }
        }
    }
    max
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mask::Align;

    #[test]
    fn a_row_without_keys_is_zero_and_a_sink_gives_its_lse() {
        let p = AttentionProblem {
            causal: Some(Align::BottomRight),
            ..AttentionProblem::new(1, 1, 1, 2, 1, 1, 1)
        };
        let inputs = Inputs::new(&[1.0_f32, 1.0][..], &[1.0_f32][..], &[7.0_f32][..]);
        let r = oracle(&p, &inputs).unwrap();
        assert_eq!((r.o.as_slice(), r.lse[0]), (&[0.0, 7.0][..], f64::NEG_INFINITY));
        let p = AttentionProblem { sinks: true, ..p };
        let r = oracle(&p, &Inputs { sinks: Some(&[0.25]), ..inputs }).unwrap();
        assert_eq!((r.o[0], r.lse[0]), (0.0, 0.25));
        let kept = (1f64.exp() / (1f64.exp() + 0.25f64.exp())) * 7.0;
        assert!((r.o[1] - kept).abs() < 1e-12);
    }

    #[test]
    fn nan_stays_in_the_rows_that_read_it() {
        let p =
            AttentionProblem { causal: Some(Align::TopLeft), ..AttentionProblem::new(1, 1, 1, 2, 2, 1, 1) };
        let inputs = Inputs::new(&[1.0_f32, 1.0][..], &[1.0_f32, 1.0][..], &[3.0_f32, f32::NAN][..]);
        let r = oracle(&p, &inputs).unwrap();
        assert_eq!(r.o[0], 3.0);
        assert!(r.o[1].is_nan());
    }

    #[test]
    fn max_error_sees_nan_and_length() {
        assert_eq!(max_error([1.0], &[f64::NAN]), f64::INFINITY);
        assert_eq!(max_error([f64::NAN], &[f64::NAN]), 0.0);
        assert_eq!(max_error([1.0], &[1.0, 1.0]), f64::INFINITY);
        assert_eq!(max_error([f64::NEG_INFINITY, 2.0], &[f64::NEG_INFINITY, 1.5]), 0.5);
    }
}
