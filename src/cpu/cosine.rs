//! The cosine similarity's norms. Sums of squares are f64: no vector is too long or too short for them.

use pulp::Simd;

use super::load::Rows;
use crate::problem::LEAST_NORM;

/// One over the norm of a vector.
#[inline(always)]
fn inverse_norm(x: &[f32]) -> f64 {
    // Side by side, so that they become vectors.
    const CHAINS: usize = 8;
    let mut sums = [0.0_f64; CHAINS];
    for x in x.chunks(CHAINS) {
        sums.iter_mut().zip(x).for_each(|(sum, &x)| *sum += f64::from(x) * f64::from(x));
    }
    1.0 / sums.iter().sum::<f64>().sqrt().max(LEAST_NORM)
}

/// The vector with length 1.
#[inline(always)]
pub(super) fn normalize(x: &mut [f32]) {
    let inverse = inverse_norm(x);
    x.iter_mut().for_each(|x| *x = (f64::from(*x) * inverse) as f32);
}

/// One over the norms of `count` keys.
#[inline(always)]
pub(super) fn inverse_norms(keys: Rows<'_>, head_dim: usize, count: usize, to: &mut Vec<f32>) {
    to.clear();
    to.extend((0..count).map(|j| inverse_norm(&keys.data[j * keys.stride..][..head_dim]) as f32));
}

/// Products of queries of length 1 with keys to cosines.
#[inline(always)]
pub(super) fn divide<S: Simd, const NV: usize>(simd: S, scores: &mut [[S::f32s; NV]], inverse_norms: &[f32]) {
    for (scores, &inverse) in scores.iter_mut().zip(inverse_norms) {
        let inverse = simd.splat_f32s(inverse);
        for s in scores.iter_mut() {
            *s = simd.mul_f32s(*s, inverse);
        }
    }
}
