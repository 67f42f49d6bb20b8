//! The two products, register-blocked. Queries lie across vector lanes, so that maxima, sums and
//! exponentials need no shuffles: a tile is `[keys or dims][NV]` vectors, and what lies in one
//! lane never meets another lane. A NaN therefore stays in its own row.
//!
//! Keys and values enter as scalars that are broadcast, straight from row-major memory: nothing
//! is packed.

use pulp::Simd;

/// Products of q and k, which differ in sign, that are added up in one register.
const CHAIN_SCORES: usize = 128;

/// Products of p and v that are added up in a pair of registers. Values and weights may all have
/// one sign; rounding then drifts with the length of a chain of additions.
const CHAIN_VALUES: usize = 32;

/// `(seq_kv, head_dim) @ (head_dim, tile_q) -> (seq_kv, tile_q)`: scores of `scores.len()` keys,
/// row `j` of which starts at `keys[j * stride]`; `q` has `head_dim` rows. `row_max` becomes the
/// maximum of itself and the scores.
#[inline(always)]
pub(super) fn scores<S: Simd, const NV: usize>(
    simd: S,
    keys: &[f32],
    stride: usize,
    q: &[[S::f32s; NV]],
    scores: &mut [[S::f32s; NV]],
    row_max: &mut [S::f32s; NV],
) {
    let mut at = 0;
    let n = scores.len();
    macro_rules! blocks_of {
        ($rows:literal) => {
            while n - at >= $rows {
                let rows = &mut scores[at..at + $rows];
                score_rows::<S, $rows, NV>(simd, &keys[at * stride..], stride, q, rows, row_max);
                at += $rows;
            }
        };
    }
    if S::REGISTER_COUNT >= 32 {
        blocks_of!(8);
    }
    blocks_of!(4);
    blocks_of!(1);
}

#[inline(always)]
fn score_rows<S: Simd, const MR: usize, const NV: usize>(
    simd: S,
    keys: &[f32],
    stride: usize,
    q: &[[S::f32s; NV]],
    scores: &mut [[S::f32s; NV]],
    row_max: &mut [S::f32s; NV],
) {
    let zero = simd.splat_f32s(0.0);
    let mut total = [[zero; NV]; MR];
    for (chain, q) in q.chunks(CHAIN_SCORES).enumerate() {
        let rows: [&[f32]; MR] =
            core::array::from_fn(|r| &keys[r * stride + chain * CHAIN_SCORES..][..q.len()]);
        let mut sum = [[zero; NV]; MR];
        for (d, q) in q.iter().enumerate() {
            for r in 0..MR {
                let k = simd.splat_f32s(rows[r][d]);
                for n in 0..NV {
                    sum[r][n] = simd.mul_add_e_f32s(k, q[n], sum[r][n]);
                }
            }
        }
        if chain == 0 {
            total = sum;
        } else {
            add_rows(simd, &mut total, &sum);
        }
    }
    for (row, total) in scores.iter_mut().zip(&total) {
        for n in 0..NV {
            row_max[n] = simd.max_f32s(total[n], row_max[n]);
        }
        *row = *total;
    }
}

/// `(head_dim_v, seq_kv) @ (seq_kv, tile_q) -> (head_dim_v, tile_q)`, added to `acc`: values of
/// key `j` start at `values[j * stride]`, `p` has one row for each key, `acc` one for each dim.
#[inline(always)]
pub(super) fn weighted_sum<S: Simd, const NV: usize>(
    simd: S,
    values: &[f32],
    stride: usize,
    p: &[[S::f32s; NV]],
    acc: &mut [[S::f32s; NV]],
) {
    let mut at = 0;
    let n = acc.len();
    macro_rules! blocks_of {
        ($rows:literal) => {
            while n - at >= $rows {
                let rows = &mut acc[at..at + $rows];
                value_rows::<S, $rows, NV>(simd, &values[at..], stride, p, rows);
                at += $rows;
            }
        };
    }
    if S::REGISTER_COUNT >= 32 {
        blocks_of!(4);
    }
    blocks_of!(2);
    blocks_of!(1);
}

#[inline(always)]
fn value_rows<S: Simd, const MR: usize, const NV: usize>(
    simd: S,
    values: &[f32],
    stride: usize,
    p: &[[S::f32s; NV]],
    acc: &mut [[S::f32s; NV]],
) {
    for (chain, p) in p.chunks(CHAIN_VALUES).enumerate() {
        let values = &values[chain * CHAIN_VALUES * stride..];
        let mut even = [[simd.splat_f32s(0.0); NV]; MR];
        let mut odd = even;
        let mut pairs = p.chunks_exact(2);
        for (j, pair) in pairs.by_ref().enumerate() {
            add_products(simd, &values[2 * j * stride..][..MR], &pair[0], &mut even);
            add_products(simd, &values[(2 * j + 1) * stride..][..MR], &pair[1], &mut odd);
        }
        if let [last] = pairs.remainder() {
            add_products(simd, &values[(p.len() - 1) * stride..][..MR], last, &mut even);
        }
        add_rows(simd, &mut even, &odd);
        add_rows(simd, acc, &even);
    }
}

/// `sum[r] += values[r] * p`.
#[inline(always)]
fn add_products<S: Simd, const MR: usize, const NV: usize>(
    simd: S,
    values: &[f32],
    p: &[S::f32s; NV],
    sum: &mut [[S::f32s; NV]; MR],
) {
    for r in 0..MR {
        let v = simd.splat_f32s(values[r]);
        for n in 0..NV {
            sum[r][n] = simd.mul_add_e_f32s(v, p[n], sum[r][n]);
        }
    }
}

#[inline(always)]
fn add_rows<S: Simd, const NV: usize>(simd: S, rows: &mut [[S::f32s; NV]], more: &[[S::f32s; NV]]) {
    for (row, more) in rows.iter_mut().zip(more) {
        for n in 0..NV {
            row[n] = simd.add_f32s(row[n], more[n]);
        }
    }
}
