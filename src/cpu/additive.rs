//! The additive similarity `vT tanh(Wq q + Wk k)` (Bahdanau 2014): keys are projected block by block, anew for
//! each tile of queries, beside whose tanh that is little.

use pulp::Simd;

use super::few;
use super::kernel;
use super::lanes::{Context, Tile};
use super::load::Rows;
use super::math::tanh;
use crate::problem::Similarity;

/// Terms that are added up in one register.
const CHAIN: usize = 32;

/// The matrices of one tile's head, or those of all heads.
pub(super) struct Additive<'a> {
    /// `[hidden][query_dim]`.
    wq: &'a [f32],
    query_dim: usize,
    /// `[hidden][head_dim]`.
    wk: &'a [f32],
    head_dim: usize,
    /// `[hidden]`.
    v: &'a [f32],
    /// Factor on v.
    scale: f32,
}

impl<'a> Additive<'a> {
    /// `None` where the similarity is another.
    pub(super) fn new(context: &Context<'a>, tile: &Tile) -> Option<Self> {
        let (p, inputs) = (context.problem, context.inputs);
        let Similarity::Additive { query_dim, hidden, per_head } = p.similarity else { return None };
        let (wq, wk, v) = (inputs.wq?, inputs.wk?, inputs.score_v?);
        // Such tiles have rows of one head.
        let head = if per_head { tile.lanes[0].head } else { 0 };
        let own = |x: &'a [f32], len: usize| &x[head * len..][..len];
        Some(Self {
            wq: own(wq, hidden * query_dim),
            query_dim,
            wk: own(wk, hidden * p.head_dim),
            head_dim: p.head_dim,
            v: own(v, hidden),
            scale: context.q_scale,
        })
    }

    /// `(hidden, query_dim) @ (query_dim, tile_q) -> (hidden, tile_q)`.
    #[inline(always)]
    pub(super) fn project_q<S: Simd, const NV: usize>(
        &self,
        simd: S,
        q: &[[S::f32s; NV]],
        to: &mut [[S::f32s; NV]],
    ) {
        let mut unused = [simd.splat_f32s(0.0); NV];
        kernel::scores(simd, self.wq, self.query_dim, q, to, &mut unused);
    }

    /// Scores of `scores.len()` keys and the projected queries, scaled.
    #[inline(always)]
    pub(super) fn scores<S: Simd, const NV: usize>(
        &self,
        simd: S,
        keys: Rows<'_>,
        q: &[[S::f32s; NV]],
        projected: &mut Vec<f32>,
        scores: &mut [[S::f32s; NV]],
    ) {
        let hidden = self.v.len();
        projected.clear();
        projected.resize(scores.len() * hidden, 0.0);
        few::scores(simd, keys, self.wk, self.head_dim, projected, hidden);
        for (scores, k) in scores.iter_mut().zip(projected.chunks_exact(hidden)) {
            let mut total = [simd.splat_f32s(0.0); NV];
            for ((k, v), q) in k.chunks(CHAIN).zip(self.v.chunks(CHAIN)).zip(q.chunks(CHAIN)) {
                let mut sum = [simd.splat_f32s(0.0); NV];
                for ((&k, &v), q) in k.iter().zip(v).zip(q) {
                    let (k, v) = (simd.splat_f32s(k), simd.splat_f32s(v * self.scale));
                    for n in 0..NV {
                        sum[n] = simd.mul_add_e_f32s(v, tanh(simd, simd.add_f32s(q[n], k)), sum[n]);
                    }
                }
                for n in 0..NV {
                    total[n] = simd.add_f32s(total[n], sum[n]);
                }
            }
            *scores = total;
        }
    }
}
