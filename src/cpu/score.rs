//! What happens to a block of scores between the product and the exponential: soft cap, bias,
//! ALiBi, masks.

use pulp::{Simd, as_arrays, as_arrays_mut};

use super::lanes::{Context, Tile};
use super::math::tanh;
use crate::dtype::TensorRef;

/// Applies all options to the scores of keys `start..start + scores.len()`. An excluded pair
/// becomes -inf whatever it was, one that is kept stays above it if `careful`. `extra` is scratch.
#[inline(always)]
pub(super) fn transform<S: Simd, const NV: usize>(
    simd: S,
    context: &Context<'_>,
    tile: &Tile,
    start: usize,
    scores: &mut [[S::f32s; NV]],
    extra: &mut [f32],
    careful: bool,
) {
    let p = context.problem;
    if careful {
        for s in scores.iter_mut().flatten() {
            *s = clamped(simd, *s);
        }
    }
    if let Some(cap) = p.softcap {
        let (cap, inverse) = (simd.splat_f32s(cap), simd.splat_f32s(1.0 / cap));
        for s in scores.iter_mut().flatten() {
            *s = simd.mul_f32s(cap, tanh(simd, simd.mul_f32s(*s, inverse)));
        }
    }
    let excluded = simd.splat_f32s(f32::NEG_INFINITY);
    if p.bias.is_some() || p.mask.is_some() {
        let keys = scores.len();
        fill_extra(context, tile, start, keys, NV * S::F32_LANES, extra);
        let (extra, _) = as_arrays::<NV, _>(S::as_simd_f32s(extra).0);
        for (s, extra) in scores.iter_mut().zip(extra) {
            for n in 0..NV {
                let mut sum = simd.add_f32s(s[n], extra[n]);
                if careful {
                    sum = clamped(simd, sum);
                }
                let drop = simd.equal_f32s(extra[n], excluded);
                s[n] = simd.select_f32s(drop, excluded, sum);
            }
        }
    }
    if let (true, Some(slopes)) = (p.alibi, context.inputs.alibi_slopes) {
        let slope: [S::f32s; NV] = per_lane(simd, tile, |lane| slopes[tile.lanes[lane].head]);
        let position: [S::f32s; NV] =
            per_lane(simd, tile, |lane| (tile.lanes[lane].query as i64 + tile.offset - start as i64) as f32);
        for (j, s) in scores.iter_mut().enumerate() {
            let j = simd.splat_f32s(j as f32);
            for n in 0..NV {
                let distance = simd.abs_f32s(simd.sub_f32s(position[n], j));
                let less = simd.negate_mul_add_e_f32s(slope[n], distance, s[n]);
                let dropped = simd.equal_f32s(s[n], excluded);
                s[n] = if careful { simd.select_f32s(dropped, excluded, clamped(simd, less)) } else { less };
            }
        }
    }
    if start < tile.full.start || start + scores.len() > tile.full.end {
        let edge = |at: usize| at.saturating_sub(start).min(scores.len()) as f32;
        let low: [S::f32s; NV] = per_lane(simd, tile, |lane| edge(tile.lanes[lane].range.start));
        let high: [S::f32s; NV] = per_lane(simd, tile, |lane| edge(tile.lanes[lane].range.end));
        for (j, s) in scores.iter_mut().enumerate() {
            let j = simd.splat_f32s(j as f32);
            for n in 0..NV {
                s[n] = simd.select_f32s(simd.less_than_f32s(j, low[n]), excluded, s[n]);
                s[n] = simd.select_f32s(simd.less_than_f32s(j, high[n]), s[n], excluded);
            }
        }
    }
}

/// No score below every finite f32; a NaN stays one.
#[inline(always)]
fn clamped<S: Simd>(simd: S, s: S::f32s) -> S::f32s {
    let lowest = simd.splat_f32s(f32::MIN);
    simd.select_f32s(simd.less_than_f32s(s, lowest), lowest, s)
}

/// One number for each lane, 0 beyond the last.
#[inline(always)]
pub(super) fn per_lane<S: Simd, const NV: usize>(
    simd: S,
    tile: &Tile,
    value: impl Fn(usize) -> f32,
) -> [S::f32s; NV] {
    let mut out = [simd.splat_f32s(0.0); NV];
    let mut lanes = [0.0; MAX_LANES];
    (0..tile.lanes.len()).for_each(|lane| lanes[lane] = value(lane));
    let (vectors, _) = S::as_simd_f32s(&lanes);
    out.copy_from_slice(&vectors[..NV]);
    out
}

/// Most query rows that a tile can have: three AVX-512 registers.
pub(super) const MAX_LANES: usize = 48;

/// The bias, transposed to `[keys][width]`, with -inf where the mask drops the key.
#[inline(always)]
fn fill_extra(
    context: &Context<'_>,
    tile: &Tile,
    start: usize,
    keys: usize,
    width: usize,
    extra: &mut [f32],
) {
    extra[..keys * width].fill(0.0);
    for (lane, row) in tile.lanes.iter().enumerate() {
        let at = [tile.batch, row.head, row.query, start];
        let column = extra[lane..].iter_mut().step_by(width).take(keys);
        if let (Some(bias), Some(values)) = (context.problem.bias, context.inputs.bias) {
            let (at, step) = (bias.layout.index(at), bias.layout.strides[3]);
            match values {
                TensorRef::F32(x) if step == 1 => {
                    column.zip(&x[at..]).for_each(|(to, &x)| *to = x);
                }
                _ => column.enumerate().for_each(|(j, to)| *to = values.get(at + j * step)),
            }
        }
        if let (Some(layout), Some(mask)) = (context.problem.mask, context.inputs.mask) {
            let (at, step) = (layout.index(at), layout.strides[3]);
            for j in 0..keys {
                if mask[at + j * step] == 0 {
                    extra[j * width + lane] = f32::NEG_INFINITY;
                }
            }
        }
    }
}

/// A slice as rows of `NV` vectors.
#[inline(always)]
pub(super) fn vectors<S: Simd, const NV: usize>(x: &[f32]) -> &[[S::f32s; NV]] {
    as_arrays::<NV, _>(S::as_simd_f32s(x).0).0
}

/// A slice as rows of `NV` vectors.
#[inline(always)]
pub(super) fn vectors_mut<S: Simd, const NV: usize>(x: &mut [f32]) -> &mut [[S::f32s; NV]] {
    as_arrays_mut::<NV, _>(S::as_mut_simd_f32s(x).0).0
}
