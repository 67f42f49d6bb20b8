//! Online softmax (Milakov & Gimelshein 2018, FlashAttention 2) over one tile of query rows:
//!
//! ```text
//! for each block of keys:
//!     s = q k^T                                  (tile_kv, tile_q), queries in the lanes
//!     m' = max(m, max s) if that rises by more than LAZY, else m;  a = exp(m - m')
//!     p = exp(s - m');  row_sum = a row_sum + sum p;  acc = a acc + p v;  m = m'
//! o = acc / row_sum;  lse = m + ln(row_sum)
//! ```

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::Isa;
use super::additive::Additive;
use super::cosine;
use super::few::{self, is_few};
use super::kernel;
use super::lanes::{Context, Lane, Tile};
use super::load::{Rows, Source, read};
use super::math::exp2;
use super::score::{per_lane, transform, vectors, vectors_mut};
use super::scratch::Scratch;
use super::state::{State, take_apart};
use super::transpose::transpose;
use crate::cache::KvRows;
use crate::error::Operand;
use crate::problem::Similarity;

/// Keys of a block.
pub(super) const TILE_KV: usize = 128;

/// Blocks whose sums are gathered before they join the far sums, which carry their rounding errors
/// along (Kahan). Together with the short chains of the kernels this keeps rounding errors from
/// growing with the number of keys.
const BLOCKS_NEAR: usize = 4;

/// How far a lane's scores may rise above its maximum, in powers of two, before all its sums are scaled anew
/// (FlashAttention 4): nearly every block has some lane whose maximum rises, but hardly any lane's by much.
const LAZY: f32 = 8.0;

/// A lane's maximum before it has seen a key. Finite, so that -inf minus it is -inf.
pub(super) const NO_MAX: f32 = f32::MIN;

/// The computation of a tile's [`State`] over `keys`.
pub(super) struct TileRun<'a> {
    pub(super) context: &'a Context<'a>,
    pub(super) tile: &'a Tile,
    pub(super) keys: Range<usize>,
    /// The sink joins here (one part of a split tile alone has it).
    pub(super) with_sink: bool,
    pub(super) scratch: &'a mut Scratch,
    pub(super) state: &'a mut State,
    /// `[lanes][seq_kv]`: receives the scores.
    pub(super) scores_out: Option<&'a mut [f32]>,
}

impl TileRun<'_> {
    /// Computes it. If NaN or infinity comes out, again with care: a product of 0 and NaN would
    /// else reach rows that drop the NaN's key. Likewise if a row that keeps keys weighs nothing:
    /// its scores are below every f32. At last without laziness, whose sums are larger.
    pub(super) fn run(mut self, isa: Isa) {
        for (careful, lazy) in [(false, LAZY), (true, LAZY), (true, 0.0)] {
            self.state.non_finite.clear();
            let tainted = isa.dispatch(Pass { run: &mut self, careful, lazy });
            if !tainted && !self.sank() {
                break;
            }
        }
    }

    /// Whether a row that keeps keys has no weight.
    fn sank(&self) -> bool {
        let sums = &self.state.acc[self.context.problem.head_dim_v * self.state.width..];
        let keeps = |lane: usize| self.keys.clone().any(|key| self.context.keeps(self.tile, lane, key));
        (sums.iter().take(self.tile.lanes.len()).enumerate()).any(|(lane, &sum)| sum == 0.0 && keeps(lane))
    }
}

/// One pass over the keys; gives whether some output would be NaN or infinite.
struct Pass<'p, 'a> {
    run: &'p mut TileRun<'a>,
    /// Takes NaN and infinities in v apart, and keeps kept scores finite below. Slower.
    careful: bool,
    /// How far maxima may rise before sums are scaled, in powers of two.
    lazy: f32,
}

impl WithSimd for Pass<'_, '_> {
    type Output = bool;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> bool {
        match self.run.tile.lanes.len().div_ceil(S::F32_LANES) {
            0 | 1 => self.run.pass::<S, 1>(simd, self.careful, self.lazy),
            3 if kernel::most_vectors::<S>() == 3 => self.run.pass::<S, 3>(simd, self.careful, self.lazy),
            _ => self.run.pass::<S, 2>(simd, self.careful, self.lazy),
        }
    }
}

impl TileRun<'_> {
    #[inline(always)]
    fn pass<S: Simd, const NV: usize>(&mut self, simd: S, careful: bool, lazy: f32) -> bool {
        let (context, tile, p) = (self.context, self.tile, self.context.problem);
        let (width, dims) = (NV * S::F32_LANES, p.head_dim_v);
        self.load_q::<S, NV>(simd);
        let rows = |operand| KvRows::new(p, context.inputs, operand);
        let k = Source { tensor: context.inputs.k, rows: rows(Operand::K), dim: p.head_dim };
        let v = Source { tensor: context.inputs.v, rows: rows(Operand::V), dim: dims };
        let cosine = p.similarity == Similarity::Cosine;
        let additive = Additive::new(context, tile);
        let product = !cosine && additive.is_none();
        let plain = product && p.softcap.is_none() && p.bias.is_none() && p.mask.is_none() && !p.alibi;

        let lanes = tile.lanes.len();
        let few = is_few::<S>(lanes, p.head_dim, dims) && additive.is_none();

        let Scratch {
            q,
            q_rows,
            inverse_norms,
            projected,
            scores,
            extra,
            acc,
            far,
            lost,
            k: k_buffer,
            v: v_buffer,
            ..
        } = &mut *self.scratch;
        let q = q.get(p.compared_dim() * width);
        if few {
            q_rows.resize(lanes * p.head_dim, 0.0);
            transpose([p.head_dim, lanes], q, width, q_rows, p.head_dim);
        }
        let q = vectors::<S, NV>(q);
        let acc = vectors_mut::<S, NV>(acc.get((dims + 1) * width));
        let far = vectors_mut::<S, NV>(far.get((dims + 1) * width));
        let lost = vectors_mut::<S, NV>(lost.get((dims + 1) * width));
        let scores = vectors_mut::<S, NV>(scores.get(TILE_KV * width));
        let extra = extra.get(if plain { 0 } else { TILE_KV * width });
        let zero = [simd.splat_f32s(0.0); NV];
        acc.fill(zero);

        let to_log2 = simd.splat_f32s(context.to_log2);
        let lazy = simd.splat_f32s(lazy);
        let mut row_max = [simd.splat_f32s(NO_MAX); NV];
        if let (true, Some(sinks)) = (self.with_sink, context.inputs.sinks) {
            let sink = |lane: usize| sinks[tile.lanes[lane].head];
            row_max = per_lane(simd, tile, |lane| if sink(lane).is_finite() { sink(lane) } else { NO_MAX });
            // A sink of -inf is none, one of +inf or NaN leaves no number.
            acc[dims] = per_lane(simd, tile, |lane| match sink(lane) {
                f32::NEG_INFINITY => 0.0,
                sink if sink.is_finite() => 1.0,
                _ => f32::NAN,
            });
        }

        let mut start = self.keys.start;
        let mut near = 0;
        // Rows of the far sums, which hold nothing before the first blocks have joined them.
        let mut reached = 0;
        while start < self.keys.end {
            if near == BLOCKS_NEAR {
                near = 0;
                if reached == 0 {
                    reached = far.len();
                    far.copy_from_slice(acc);
                    lost.fill(zero);
                } else {
                    for ((far, lost), acc) in far.iter_mut().zip(lost.iter_mut()).zip(acc.iter()) {
                        for n in 0..NV {
                            let more = simd.sub_f32s(acc[n], lost[n]);
                            let sum = simd.add_f32s(far[n], more);
                            lost[n] = simd.sub_f32s(simd.sub_f32s(sum, far[n]), more);
                            far[n] = sum;
                        }
                    }
                }
                acc.fill(zero);
            }
            near += 1;
            let count = TILE_KV.min(self.keys.end - start);
            let scores = &mut scores[..count];
            if few {
                scores.fill(zero);
            }
            let at = [tile.batch, tile.kv_head, start];
            let keys = k.rows(at, count, false, k_buffer);
            let mut new_max = row_max;
            if let Some(additive) = &additive {
                additive.scores(simd, keys, q, projected, scores);
            } else if few {
                let scores = bytemuck::cast_slice_mut(scores.as_flattened_mut());
                few::scores(simd, keys, q_rows, p.head_dim, scores, width);
            } else {
                kernel::scores(simd, keys.data, keys.stride, q, scores, &mut new_max);
            }
            if cosine {
                cosine::inverse_norms(keys, p.head_dim, count, inverse_norms);
                cosine::divide(simd, scores, inverse_norms);
            }
            let edge = start < tile.full.start || start + count > tile.full.end;
            if few || edge || !plain || careful {
                transform(simd, context, tile, start, scores, extra, careful);
                new_max = row_max;
                for s in scores.iter() {
                    for n in 0..NV {
                        new_max[n] = simd.max_f32s(s[n], new_max[n]);
                    }
                }
            }
            if let Some(out) = &mut self.scores_out {
                let scores = bytemuck::cast_slice(scores.as_flattened());
                transpose([count, lanes], scores, width, &mut out[start..], p.seq_kv);
            }

            for n in 0..NV {
                let rise = simd.mul_f32s(simd.sub_f32s(new_max[n], row_max[n]), to_log2);
                new_max[n] = simd.select_f32s(simd.less_than_f32s(lazy, rise), new_max[n], row_max[n]);
            }
            if bytes_differ::<S, NV>(&new_max, &row_max) {
                let mut factor = row_max;
                for n in 0..NV {
                    let change = simd.sub_f32s(row_max[n], new_max[n]);
                    factor[n] = exp2(simd, simd.mul_f32s(change, to_log2));
                }
                row_max = new_max;
                for row in acc.iter_mut().chain(&mut far[..reached]).chain(&mut lost[..reached]) {
                    for n in 0..NV {
                        row[n] = simd.mul_f32s(row[n], factor[n]);
                    }
                }
            }

            exponentials(simd, scores, &row_max, to_log2, &mut acc[dims]);

            let mut values = v.rows(at, count, careful, v_buffer);
            if careful {
                let stride = values.stride;
                take_apart(context, tile, start, dims, width, v_buffer, &mut self.state.non_finite);
                values = Rows { data: v_buffer, stride };
            }
            if few {
                let p = bytemuck::cast_slice(scores.as_flattened());
                let acc = bytemuck::cast_slice_mut(acc[..dims].as_flattened_mut());
                few::weighted_sum(simd, values, lanes, p, acc, width);
            } else {
                kernel::weighted_sum(simd, values.data, values.stride, scores, &mut acc[..dims]);
            }
            start += count;
        }

        let state = &mut *self.state;
        state.width = width;
        state.row_max.resize(width, 0.0);
        vectors_mut::<S, NV>(&mut state.row_max)[0] = row_max;
        state.acc.resize((dims + 1) * width, 0.0);
        let sums = vectors_mut::<S, NV>(&mut state.acc);
        sums.copy_from_slice(acc);
        for ((sum, far), lost) in sums.iter_mut().zip(&far[..reached]).zip(&lost[..reached]) {
            for n in 0..NV {
                sum[n] = simd.add_f32s(far[n], simd.sub_f32s(sum[n], lost[n]));
            }
        }
        // A sum that no finite numbers give; the products with 0 keep the sign of finite ones out.
        let mut taint = zero;
        for sum in sums.iter() {
            for n in 0..NV {
                taint[n] = simd.mul_add_e_f32s(sum[n], zero[n], taint[n]);
            }
        }
        bytemuck::cast_slice::<_, f32>(&taint)[..lanes].iter().any(|x| x.is_nan())
    }

    /// q, scaled and transposed into the lanes; for the bilinear similarity `W^T q`, for the cosine at length 1,
    /// for the additive `Wq q`, not scaled.
    #[inline(always)]
    fn load_q<S: Simd, const NV: usize>(&mut self, simd: S) {
        let (context, tile, p) = (self.context, self.tile, self.context.problem);
        let (width, query_dim) = (NV * S::F32_LANES, p.query_dim());
        let Scratch { q, q_raw, rows, .. } = &mut *self.scratch;
        let shape = [tile.lanes.len(), query_dim];
        rows.resize(shape[0] * shape[1], 0.0);
        for (row, Lane { head, query, .. }) in rows.chunks_exact_mut(query_dim).zip(&tile.lanes) {
            let at = p.q.index([tile.batch, *head, *query, 0]);
            read(&context.inputs.q, at, p.q.strides[3], row);
            if p.similarity == Similarity::Cosine {
                cosine::normalize(row);
            }
        }
        let transpose = |to: &mut [f32]| {
            if shape[0] < width {
                to.fill(0.0);
            }
            transpose(shape, rows, query_dim, to, width);
        };
        let q = q.get(p.compared_dim() * width);
        if let Some(additive) = Additive::new(context, tile) {
            let raw = q_raw.get(query_dim * width);
            transpose(raw);
            additive.project_q::<S, NV>(simd, vectors::<S, NV>(raw), vectors_mut::<S, NV>(q));
            return;
        }
        if let (Similarity::Bilinear { per_head, .. }, Some(w)) = (p.similarity, context.inputs.w) {
            let raw = q_raw.get(query_dim * width);
            transpose(raw);
            q.fill(0.0);
            let head = if per_head { tile.lanes[0].head } else { 0 };
            let (w, raw) = (&w[head * query_dim * p.head_dim..], vectors::<S, NV>(raw));
            kernel::weighted_sum(simd, w, p.head_dim, raw, vectors_mut::<S, NV>(q));
        } else {
            transpose(q);
        }
        let scale = simd.splat_f32s(context.q_scale);
        let q = vectors_mut::<S, NV>(q);
        for q in q.iter_mut().flatten() {
            *q = simd.mul_f32s(*q, scale);
        }
    }
}

/// `p = exp(s - m)` in place, and its sum over the block added to `row_sum`.
#[inline(always)]
fn exponentials<S: Simd, const NV: usize>(
    simd: S,
    scores: &mut [[S::f32s; NV]],
    row_max: &[S::f32s; NV],
    to_log2: S::f32s,
    row_sum: &mut [S::f32s; NV],
) {
    let mut block = [simd.splat_f32s(0.0); NV];
    for chain in scores.chunks_mut(16) {
        let mut sum = [simd.splat_f32s(0.0); NV];
        for s in chain {
            for n in 0..NV {
                s[n] = exp2(simd, simd.mul_f32s(simd.sub_f32s(s[n], row_max[n]), to_log2));
                sum[n] = simd.add_f32s(sum[n], s[n]);
            }
        }
        for n in 0..NV {
            block[n] = simd.add_f32s(block[n], sum[n]);
        }
    }
    for n in 0..NV {
        row_sum[n] = simd.add_f32s(row_sum[n], block[n]);
    }
}

#[inline(always)]
fn bytes_differ<S: Simd, const NV: usize>(a: &[S::f32s; NV], b: &[S::f32s; NV]) -> bool {
    bytemuck::cast_slice::<_, u8>(a.as_slice()) != bytemuck::cast_slice::<_, u8>(b.as_slice())
}
