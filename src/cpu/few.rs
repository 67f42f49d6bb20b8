//! The two products for a tile of few query rows (decoding). Broadcasting keys to lanes that are
//! mostly empty would waste the vectors, so here dims lie across them; scores and sums go to the
//! same places as those of [`super::kernel`].

use pulp::Simd;

use super::load::Rows;

/// Products that are added up in one register, as in [`super::kernel`].
const CHAIN: usize = 16;

/// Whether dims across the lanes serve a tile better than queries across the lanes. With four rows
/// it is a tie: each score costs the reduction of a vector here.
pub(super) fn is_few<S: Simd>(lanes: usize, head_dim: usize, head_dim_v: usize) -> bool {
    lanes <= 2 && 2 * lanes < S::F32_LANES && 32 * lanes <= head_dim.min(head_dim_v)
}

/// `scores[j * width + lane] = keys[j] . q[lane]`, with `q` as rows of `head_dim`.
#[inline(always)]
pub(super) fn scores<S: Simd>(
    simd: S,
    keys: Rows<'_>,
    q: &[f32],
    head_dim: usize,
    scores: &mut [f32],
    width: usize,
) {
    for (j, scores) in scores.chunks_exact_mut(width).enumerate() {
        let (key, key_tail) = S::as_simd_f32s(&keys.data[j * keys.stride..][..head_dim]);
        for (score, q) in scores.iter_mut().zip(q.chunks_exact(head_dim)) {
            let (q, q_tail) = S::as_simd_f32s(q);
            let mut sum = simd.mul_f32s(simd.partial_load_f32s(key_tail), simd.partial_load_f32s(q_tail));
            for (k, q) in key.iter().zip(q) {
                sum = simd.mul_add_e_f32s(*k, *q, sum);
            }
            *score = simd.reduce_sum_f32s(sum);
        }
    }
}

/// `acc[d * width + lane] += sum over j of p[j * width + lane] values[j][d]`.
#[inline(always)]
pub(super) fn weighted_sum<S: Simd>(
    simd: S,
    values: Rows<'_>,
    lanes: usize,
    p: &[f32],
    acc: &mut [f32],
    width: usize,
) {
    let head_dim_v = acc.len() / width;
    for lane in 0..lanes {
        let mut at = 0;
        macro_rules! blocks_of {
            ($vectors:literal) => {
                while head_dim_v - at >= $vectors * S::F32_LANES {
                    let acc = &mut acc[at * width + lane..];
                    columns::<S, $vectors>(simd, values, at, &p[lane..], acc, width);
                    at += $vectors * S::F32_LANES;
                }
            };
        }
        blocks_of!(8);
        blocks_of!(4);
        blocks_of!(1);
        // Fewer dims than lanes are left.
        if at < head_dim_v {
            let mut sum = simd.splat_f32s(0.0);
            for (chain, p) in p.chunks(CHAIN * width).enumerate() {
                let mut part = simd.splat_f32s(0.0);
                for (j, p) in p.chunks_exact(width).enumerate() {
                    let row = &values.data[(chain * CHAIN + j) * values.stride..][at..head_dim_v];
                    let v = simd.partial_load_f32s(row);
                    part = simd.mul_add_e_f32s(simd.splat_f32s(p[lane]), v, part);
                }
                sum = simd.add_f32s(sum, part);
            }
            add_column(&[sum], &mut acc[at * width + lane..], width);
        }
    }
}

/// `N` vectors of dims from `at`, for the lane at which `p` and `acc` start.
#[inline(always)]
fn columns<S: Simd, const N: usize>(
    simd: S,
    values: Rows<'_>,
    at: usize,
    p: &[f32],
    acc: &mut [f32],
    width: usize,
) {
    let mut sum = [simd.splat_f32s(0.0); N];
    for (chain, p) in p.chunks(CHAIN * width).enumerate() {
        let mut part = [simd.splat_f32s(0.0); N];
        for (j, p) in p.iter().step_by(width).enumerate() {
            let p = simd.splat_f32s(*p);
            let row = &values.data[(chain * CHAIN + j) * values.stride + at..][..N * S::F32_LANES];
            let v = S::as_simd_f32s(row).0;
            for n in 0..N {
                part[n] = simd.mul_add_e_f32s(p, v[n], part[n]);
            }
        }
        for n in 0..N {
            sum[n] = simd.add_f32s(sum[n], part[n]);
        }
    }
    add_column(&sum, acc, width);
}

/// Adds the elements of `sum` to every `width`-th of `acc`.
#[inline(always)]
fn add_column<T: bytemuck::NoUninit>(sum: &[T], acc: &mut [f32], width: usize) {
    let sum: &[f32] = bytemuck::cast_slice(sum);
    acc.iter_mut().step_by(width).zip(sum).for_each(|(acc, sum)| *acc += sum);
}
