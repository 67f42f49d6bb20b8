//! The two products, register-blocked. Queries lie across vector lanes, so that maxima, sums and
//! exponentials need no shuffles: a tile is `[keys or dims][NV]` vectors, and what lies in one
//! lane never meets another lane. A NaN therefore stays in its own row.
//!
//! Keys and values enter as scalars that are broadcast, straight from row-major memory: nothing
//! is packed.

use pulp::Simd;

/// Most vectors of query rows in a tile: as many as leave registers for enough keys, or dims of values, that no
/// product waits for the one before.
pub(super) const fn most_vectors<S: Simd>() -> usize {
    if S::REGISTER_COUNT >= 32 { 3 } else { 2 }
}

/// Products of q and k, which differ in sign, that are added up in one register.
const CHAIN_SCORES: usize = 128;

/// Products of p and v that are added up in one register. Values and weights may all have one sign;
/// rounding then drifts with the length of a chain of additions.
const CHAIN_VALUES: usize = 16;

/// Neighbouring scalars that are fetched with one check of the bounds: a branch for each would take longer
/// than its products.
const STEP: usize = 4;

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
    } else {
        blocks_of!(6);
    }
    blocks_of!(2);
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
    // Most heads are one chain, whose sums stay in registers.
    let (first, more) = q.split_at(CHAIN_SCORES.min(q.len()));
    let rows = part_of_rows(keys, stride, 0, first.len());
    let mut total = sum_products::<S, MR, NV>(simd, rows, first);
    for (chain, q) in more.chunks(CHAIN_SCORES).enumerate() {
        let rows = part_of_rows(keys, stride, (1 + chain) * CHAIN_SCORES, q.len());
        add_rows(simd, &mut total, &sum_products::<S, MR, NV>(simd, rows, q));
    }
    for (row, total) in scores.iter_mut().zip(&total) {
        for n in 0..NV {
            row_max[n] = simd.max_f32s(total[n], row_max[n]);
        }
        *row = *total;
    }
}

/// `len` elements of each row, from `at` on. A loop: a closure might not be inlined, and would be called for every
/// chain.
#[inline(always)]
pub(super) fn part_of_rows<const N: usize>(
    data: &[f32],
    stride: usize,
    at: usize,
    len: usize,
) -> [&[f32]; N] {
    let mut rows: [&[f32]; N] = [&[]; N];
    for (r, row) in rows.iter_mut().enumerate() {
        *row = &data[r * stride + at..][..len];
    }
    rows
}

/// The products of scalars with vectors: `sum[r] = sum over i of rows[r][i] * x[i]`.
#[inline(always)]
pub(super) fn sum_products<S: Simd, const MR: usize, const NV: usize>(
    simd: S,
    rows: [&[f32]; MR],
    x: &[[S::f32s; NV]],
) -> [[S::f32s; NV]; MR] {
    let mut sum = [[simd.splat_f32s(0.0); NV]; MR];
    let (steps, rest) = x.as_chunks::<STEP>();
    // A loop, as above.
    let mut scalars: [&[[f32; STEP]]; MR] = [&[]; MR];
    for (scalars, row) in scalars.iter_mut().zip(rows) {
        *scalars = row.as_chunks().0;
    }
    for (at, x) in steps.iter().enumerate() {
        for i in 0..STEP {
            for r in 0..MR {
                add_product(simd, scalars[r][at][i], &x[i], &mut sum[r]);
            }
        }
    }
    for (i, x) in rest.iter().enumerate() {
        for r in 0..MR {
            add_product(simd, rows[r][steps.len() * STEP + i], x, &mut sum[r]);
        }
    }
    sum
}

/// `sum += scalar * x`.
#[inline(always)]
fn add_product<S: Simd, const NV: usize>(simd: S, scalar: f32, x: &[S::f32s; NV], sum: &mut [S::f32s; NV]) {
    let scalar = simd.splat_f32s(scalar);
    for n in 0..NV {
        sum[n] = simd.mul_add_e_f32s(scalar, x[n], sum[n]);
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
    let dims = acc.len();
    let mut rest = acc;
    macro_rules! blocks_of {
        ($rows:literal, $chains:literal, $turn:literal) => {
            let (at, whole) = (dims - rest.len(), rest.len() / $rows * $rows);
            if let Some(rows) = rest.split_off_mut(..whole).filter(|rows| !rows.is_empty()) {
                const LEN: usize = $chains * CHAIN_VALUES;
                value_rows::<S, $rows, $chains, $turn, LEN, NV>(simd, &values[at..], stride, p, rows);
            }
        };
    }
    if S::REGISTER_COUNT >= 32 {
        blocks_of!(8, 1, 2);
        blocks_of!(4, 2, 2);
    } else {
        blocks_of!(6, 1, 2);
    }
    blocks_of!(2, 2, 2);
    blocks_of!(1, 4, 4);
}

/// Chains of `LEN` keys each, and one of what is left. (A length that the compiler knows spares each chain forty
/// instructions, and its products a few constants.) All dims take a chain before the next one begins: rows of values are
/// then read in order, and once. By dims first, strides of powers of two would put all keys' values into a few sets of
/// the nearest cache, which then holds none of them until the next dims come.
#[inline(always)]
fn value_rows<
    S: Simd,
    const MR: usize,
    const CHAINS: usize,
    const TURN: usize,
    const LEN: usize,
    const NV: usize,
>(
    simd: S,
    values: &[f32],
    stride: usize,
    p: &[[S::f32s; NV]],
    acc: &mut [[S::f32s; NV]],
) {
    let (whole, rest) = p.as_chunks::<LEN>();
    for (chain, p) in whole.iter().enumerate() {
        value_chain::<S, MR, CHAINS, TURN, NV>(simd, &values[chain * LEN * stride..], stride, p, acc);
    }
    if !rest.is_empty() {
        let values = &values[whole.len() * LEN * stride..];
        value_chain::<S, MR, CHAINS, TURN, NV>(simd, values, stride, rest, acc);
    }
}

/// `MR` dims at a time. `CHAINS` registers take turns for each sum; the bounds of `TURN` keys' values are checked at
/// once.
#[inline(always)]
fn value_chain<S: Simd, const MR: usize, const CHAINS: usize, const TURN: usize, const NV: usize>(
    simd: S,
    values: &[f32],
    stride: usize,
    p: &[[S::f32s; NV]],
    acc: &mut [[S::f32s; NV]],
) {
    let (turns, rest) = p.as_chunks::<TURN>();
    for (block, acc) in acc.chunks_exact_mut(MR).enumerate() {
        let values = &values[block * MR..];
        let mut sums = [[[simd.splat_f32s(0.0); NV]; MR]; CHAINS];
        for (at, p) in turns.iter().enumerate() {
            let rows = &values[TURN * at * stride..][..(TURN - 1) * stride + MR];
            for i in 0..TURN {
                add_products(simd, &rows[i * stride..][..MR], &p[i], &mut sums[i % CHAINS]);
            }
        }
        for (i, p) in rest.iter().enumerate() {
            add_products(simd, &values[(TURN * turns.len() + i) * stride..][..MR], p, &mut sums[0]);
        }
        for sum in &sums {
            add_rows(simd, acc, sum);
        }
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
        add_product(simd, values[r], p, &mut sum[r]);
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
