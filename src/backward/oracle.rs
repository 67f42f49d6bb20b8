//! The backward pass in f64, row by row: what the kernels are held to.

use super::BackwardProblem;
use crate::cache::{Cache, KvRows};
use crate::dtype::{Dtype, TensorRef};
use crate::error::{Operand, Result};
use crate::host::Inputs;
use crate::reference::{Denominator, ProjectedKeys, scores};

/// What [`backward`] and [`backward_naive`] give, in logical order and f64.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Gradients {
    /// `[batch, heads_q, seq_q, head_dim]`; `[heads_q, total_q, head_dim]` where queries are ragged.
    pub dq: Vec<f64>,
    /// `[batch, heads_kv, seq_kv, head_dim]`; `[heads_kv, total, head_dim]` where keys are ragged.
    pub dk: Vec<f64>,
    /// The same of width `head_dim_v`.
    pub dv: Vec<f64>,
    /// `[batch, heads_q, seq_q, seq_kv]`, the same sum wherever the gradient has one element for several; empty without
    /// such a gradient.
    pub dbias: Vec<f64>,
    /// `[heads_q]`; empty without sinks.
    pub dsinks: Vec<f64>,
    /// Largest finite magnitude of a kept score, also of one before its soft cap.
    pub max_score: f64,
    /// Largest finite magnitude of a row's lse.
    pub max_lse: f64,
    /// Of each of [`Operand::GRADIENTS`]: the largest sum of magnitudes that an element is the sum of.
    pub max_terms: [f64; 5],
    /// The same of those terms alone that o has a part in, as it is stored.
    pub max_terms_of_o: [f64; 5],
}

impl Gradients {
    /// A gradient by its name; nothing of any other operand.
    pub fn get(&self, gradient: Operand) -> &[f64] {
        match gradient {
            Operand::Dq => &self.dq,
            Operand::Dk => &self.dk,
            Operand::Dv => &self.dv,
            Operand::Dbias => &self.dbias,
            Operand::Dsinks => &self.dsinks,
            _ => &[],
        }
    }
}

/// The gradients of a loss by all that has one, from its gradient by o: the weights of each row, whole, and the sums of
/// [`BackwardProblem`] over them.
///
/// ```
/// use wgpu_attention::{AttentionProblem, BackwardProblem, Inputs, reference};
/// // One query that weighs two keys alike: a change of v reaches o by half.
/// let backward = BackwardProblem::of(&AttentionProblem::new(1, 1, 1, 1, 2, 1, 1));
/// let (q, k, v) = ([0.0_f32], [1.0_f32, 2.0], [1.0_f32, 3.0]);
/// let gradients = reference::backward(&backward, &Inputs::new(&q[..], &k[..], &v[..]), (&[1.0_f32][..]).into())?;
/// assert_eq!((gradients.dq, gradients.dv), (vec![0.5], vec![0.5, 0.5]));
/// # Ok::<(), wgpu_attention::Error>(())
/// ```
///
/// # Errors
/// Those of [`BackwardProblem::validate`] and [`Inputs::check`]; [`Error::DtypeMismatch`](crate::Error::DtypeMismatch) and
/// [`Error::OutOfBounds`](crate::Error::OutOfBounds) about `dout`.
pub fn backward(problem: &BackwardProblem, inputs: &Inputs<'_>, dout: TensorRef<'_>) -> Result<Gradients> {
    compute(problem, inputs, dout, false)
}

/// What a plain framework computes when every tensor has the storage precision: scores and weights of the forward
/// pass, `dout . v` and ds that of q; o and the gradients each their own.
///
/// # Errors
/// Those of [`backward`].
pub fn backward_naive(
    problem: &BackwardProblem,
    inputs: &Inputs<'_>,
    dout: TensorRef<'_>,
) -> Result<Gradients> {
    compute(problem, inputs, dout, true)
}

/// The largest error that each of [`Operand::GRADIENTS`] may have. `naive` is what [`backward_naive`] gives, used where
/// anything is stored narrower than f32.
///
/// f32: `8 * 2^-24 * max(1, max|s|, max|lse|)` times the largest sum of magnitudes behind an element, never above `1e-4`
/// times that: weights are `exp(s - lse)`, of an lse that was rounded when it was stored. f16 and bf16: beside it twice
/// the naive error and the rounding of the largest element, plus 1e-5. Where few rows see a key, the naive error may be
/// small by luck, so that what rounding o can do to an element is always granted.
pub fn backward_tolerance(problem: &BackwardProblem, oracle: &Gradients, naive: &Gradients) -> [f64; 5] {
    let p = &problem.attention;
    let wide = [p.dtype, p.stored_kv(), p.out_dtype].iter().all(|&dtype| dtype == Dtype::F32);
    let exponent = oracle.max_score.max(oracle.max_lse).max(1.0);
    let relative = (8.0 * 2f64.powi(-24) * exponent).min(1e-4);
    std::array::from_fn(|at| {
        let gradient = Operand::GRADIENTS[at];
        let sums = relative * oracle.max_terms[at];
        let dtype = problem.dtype(gradient);
        if wide && dtype == Dtype::F32 {
            return sums;
        }
        let [of_naive, of_oracle] = [naive, oracle].map(|of| of.get(gradient));
        let error = crate::reference::max_error(of_naive.iter().copied(), of_oracle);
        let largest = of_oracle.iter().filter(|x| x.is_finite()).fold(0.0, |max: f64, x| max.max(x.abs()));
        let of_o = p.out_dtype.rounding() * oracle.max_terms_of_o[at];
        sums + of_o.max(2.0 * error) + dtype.rounding() * largest + 1e-5
    })
}

/// An element and the magnitudes behind it: of all terms, and of those with a part of o.
#[derive(Clone, Copy, Default)]
struct Sum {
    value: f64,
    sizes: [f64; 2],
}

impl Sum {
    fn add(&mut self, x: f64, sizes: [f64; 2]) {
        self.value += x;
        self.sizes = [self.sizes[0] + sizes[0], self.sizes[1] + sizes[1]];
    }
}

fn compute(
    problem: &BackwardProblem,
    inputs: &Inputs<'_>,
    dout: TensorRef<'_>,
    naive: bool,
) -> Result<Gradients> {
    problem.check(inputs, dout)?;
    let forward = problem.forward();
    let p = &forward;
    let stored = |dtype: Dtype, x: f64| if naive { f64::from(dtype.round(x as f32)) } else { x };
    let round = |x: f64| stored(p.dtype, x);
    let (dim, dim_v) = (p.head_dim, p.head_dim_v);
    let [_, heads, queries, _] = p.shape(Operand::O);
    let all = if p.rows() == 0 { 0 } else { p.shape(Operand::O)[..3].iter().product() };
    let [entries_k, heads_kv, rows_k] = p.cache.dims(p);
    let keys = entries_k * heads_kv * rows_k;
    let places = problem.extent(Operand::Dbias) as usize;
    let heads_sunk = if p.sinks { heads } else { 0 };
    let mut sums = [all * dim, keys * dim, keys * dim_v, places, heads_sunk].map(|n| vec![Sum::default(); n]);
    let (mut max_score, mut max_lse) = (0.0_f64, 0.0_f64);
    let [k_rows, v_rows] = [Operand::K, Operand::V].map(|operand| KvRows::new(p, inputs, operand));
    let projected = ProjectedKeys::default();
    for row in 0..all {
        let place = [row / queries / heads, row / queries % heads, row % queries];
        let h = place[1];
        let [b, i] = inputs.query_of([place[0], place[2]]);
        let scores = scores(p, inputs, [b, h, i], place, &projected, &round);
        let kept = scores.iter().flatten().copied();
        let of = Denominator::new(kept.clone(), inputs.sinks.map(|sinks| f64::from(sinks[h])));
        max_score = kept.filter(|s| s.is_finite()).fold(max_score, |m, s| m.max(s.abs()));
        let lse = of.lse().abs();
        max_lse = if lse.is_finite() { max_lse.max(lse) } else { max_lse };
        if of.sum == 0.0 {
            continue;
        }
        let at = |layout: crate::Layout| {
            move |d: usize| layout.index([place[0], h, place[2], 0]) + d * layout.strides[3]
        };
        let (at_q, at_dout) = (at(p.q), at(problem.dout));
        let q: Vec<f64> = (0..dim).map(|d| f64::from(inputs.q.get(at_q(d)))).collect();
        let dout: Vec<f64> = (0..dim_v).map(|d| f64::from(dout.get(at_dout(d)))).collect();
        let key_of = |rows: &KvRows<'_>, values: TensorRef<'_>, j, dim| -> Vec<f64> {
            let at = rows.index([b, p.kv_head(h), j]);
            (0..dim).map(|d| f64::from(values.element(at, rows.step(), dim, d))).collect()
        };
        let weights: Vec<_> =
            scores.iter().enumerate().filter_map(|(j, s)| Some((j, round(of.weight((*s)?))))).collect();
        let mut o = vec![0.0; dim_v];
        for &(j, weight) in &weights {
            let v = key_of(&v_rows, inputs.v, j, dim_v);
            o.iter_mut().zip(&v).for_each(|(o, v)| *o += weight * v);
        }
        let terms = |x: &[f64]| dout.iter().zip(x).map(|(a, b)| a * b).collect::<Vec<_>>();
        let size = |terms: &[f64]| terms.iter().map(|x| x.abs()).sum::<f64>();
        let of_o = terms(&o.iter().map(|&o| stored(p.out_dtype, o)).collect::<Vec<_>>());
        let delta: f64 = of_o.iter().sum();
        let scale = p.effective_scale();
        let [dq, dk, dv, dbias, dsinks] = &mut sums;
        if let Some(sinks) = inputs.sinks {
            let weight = round(of.weight(f64::from(sinks[h])));
            let size = weight.abs() * size(&of_o);
            dsinks[h].add(-weight * delta, [size, size]);
        }
        for (j, weight) in weights {
            let (k, v) = (key_of(&k_rows, inputs.k, j, dim), key_of(&v_rows, inputs.v, j, dim_v));
            let dot: f64 = q.iter().zip(&k).map(|(q, k)| q * k).sum();
            let uncapped = (dot * scale).abs();
            max_score = if uncapped.is_finite() { max_score.max(uncapped) } else { max_score };
            let slope = p.softcap.map_or(1.0, |cap| 1.0 - (dot * scale / f64::from(cap)).tanh().powi(2));
            let of_v = terms(&v);
            let by_score = weight * (round(of_v.iter().sum()) - delta);
            let sizes = [size(&of_v) + size(&of_o), size(&of_o)].map(|size| weight.abs() * size);
            if let Some(layout) = problem.layout(Operand::Dbias) {
                dbias[layout.index([b, h, i, j])].add(round(by_score), sizes);
            }
            let ds = round(by_score * slope);
            let ds_sizes = sizes.map(|size| size * slope.abs() * scale.abs());
            let first = inputs.cu_seqlens_k.map_or(0, |list| list[b] as usize);
            let entry = if let Cache::Ragged { .. } = p.cache { 0 } else { b };
            let key = (entry * heads_kv + p.kv_head(h)) * rows_k + first + j;
            let add = |to: &mut [Sum], x: &[f64], by: f64, sizes: [f64; 2]| {
                for (to, x) in to.iter_mut().zip(x) {
                    to.add(by * x, sizes.map(|size| size * x.abs()));
                }
            };
            add(&mut dq[row * dim..], &k, scale * ds, ds_sizes);
            add(&mut dk[key * dim..], &q, scale * ds, ds_sizes);
            add(&mut dv[key * dim_v..], &dout, weight, [weight.abs(), 0.0]);
        }
    }
    let [max_terms, max_terms_of_o] = [0, 1].map(|part| {
        sums.each_ref().map(|sums| {
            sums.iter().map(|sum| sum.sizes[part]).filter(|size| size.is_finite()).fold(0.0, f64::max)
        })
    });
    let mut sums = sums.into_iter();
    let [dq, dk, dv, dbias, dsinks] = Operand::GRADIENTS.map(|operand| -> Vec<f64> {
        let sums = sums.next().unwrap_or_default();
        sums.into_iter().map(|sum| stored(problem.dtype(operand), sum.value)).collect()
    });
    // From the places of the layout to every element.
    let dbias = problem.layout(Operand::Dbias).map_or(Vec::new(), |layout| {
        let [entries, heads, queries, keys] = problem.shape(Operand::Dbias);
        let at = |n: usize| {
            let (row, key) = (n / keys, n % keys);
            [row / queries / heads, row / queries % heads, row % queries, key]
        };
        (0..entries * heads * queries * keys).map(|n| dbias[layout.index(at(n))]).collect()
    });
    Ok(Gradients { dq, dk, dv, dbias, dsinks, max_score, max_lse, max_terms, max_terms_of_o })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AttentionProblem, Tensor};

    /// o is 2, which every type holds, so that the naive computation is exact.
    #[test]
    fn what_rounding_o_can_do_is_granted_where_the_naive_error_is_small() {
        for (dtype, unit) in [(Dtype::F16, 2f64.powi(-11)), (Dtype::Bf16, 2f64.powi(-8))] {
            let forward = AttentionProblem::new(1, 1, 1, 1, 2, 1, 1).with_dtype(dtype);
            let [q, k, v, dout] =
                [&[0.0][..], &[1.0, 2.0], &[1.0, 3.0], &[1.0]].map(|x| Tensor::from_f32(dtype, x));
            let problem = BackwardProblem::of(&forward);
            let inputs = Inputs::new(q.as_ref(), k.as_ref(), v.as_ref());
            let [oracle, naive] =
                [backward, backward_naive].map(|of| of(&problem, &inputs, dout.as_ref()).unwrap());
            assert_eq!((&oracle.dq, &naive.dq), (&vec![0.5], &vec![0.5]));
            let [dq, _, dv, ..] = backward_tolerance(&problem, &oracle, &naive);
            // w |o dout| |k| of both keys, and dq's own rounding.
            assert!((dq - unit * (0.5 * 2.0 * 1.0 + 0.5 * 2.0 * 2.0 + 0.5)).abs() < 2e-5, "{dtype}: {dq}");
            // o has no part in dv.
            assert!((dv - unit * 0.5).abs() < 2e-5, "{dtype}: {dv}");
        }
    }
}
