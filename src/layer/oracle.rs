//! A layer on the host: its operands as slices, and the layer in f64, part by part.

use super::{Layer, Projection};
use crate::append::QkNorm;
use crate::dtype::{Dtype, Tensor, TensorRef};
use crate::error::{Error, Operand, Result};
use crate::host::{Inputs, entry_of};
use crate::layout::Layout;
use crate::linear::{LinearInputs, LinearProblem};
use crate::problem::AttentionProblem;
use crate::reference::{linear, naive as naive_attention, oracle as attention_oracle};

/// The weights of a layer on the host, laid out as the [`Layer`] says.
#[derive(Clone, Debug, PartialEq)]
pub struct HostWeights {
    /// Weights of q, or of q, k and v where they are packed.
    pub w_q: Tensor,
    /// Weights of k.
    pub w_k: Option<Tensor>,
    /// Weights of v.
    pub w_v: Option<Tensor>,
    /// Weights of the output.
    pub w_o: Tensor,
    /// Bias of q, or of q, k and v where they are packed.
    pub b_q: Option<Tensor>,
    /// Bias of k.
    pub b_k: Option<Tensor>,
    /// Bias of v.
    pub b_v: Option<Tensor>,
    /// Bias of the output.
    pub b_o: Option<Tensor>,
    /// Gains of the queries' norm.
    pub q_gain: Option<Vec<f32>>,
    /// Gains of the keys' norm.
    pub k_gain: Option<Vec<f32>>,
}

impl HostWeights {
    /// Packed weights of q, k and v, and those of the output; fill in the rest with `..`.
    pub fn new(w_q: Tensor, w_o: Tensor) -> Self {
        Self {
            w_q,
            w_k: None,
            w_v: None,
            w_o,
            b_q: None,
            b_k: None,
            b_v: None,
            b_o: None,
            q_gain: None,
            k_gain: None,
        }
    }

    /// Weights and bias of a projection.
    pub(crate) fn of(&self, of: Projection) -> Result<(TensorRef<'_>, Option<TensorRef<'_>>)> {
        let (w, bias) = match of {
            Projection::Q | Projection::Qkv | Projection::Kv => (Some(&self.w_q), &self.b_q),
            Projection::K => (self.w_k.as_ref(), &self.b_k),
            Projection::V => (self.w_v.as_ref(), &self.b_v),
            Projection::O => (Some(&self.w_o), &self.b_o),
        };
        let missing = || Error::MissingOperand { operand: Operand::W }.of(of);
        Ok((w.ok_or_else(missing)?.as_ref(), bias.as_ref().map(Tensor::as_ref)))
    }
}

/// The operands of a layer as slices. Those of attention's options are as [`Inputs`] has them.
#[derive(Clone, Copy, Debug)]
pub struct LayerInputs<'a> {
    /// The sequence.
    pub x: TensorRef<'a>,
    /// The other sequence, of cross-attention.
    pub context: Option<TensorRef<'a>>,
    /// The weights.
    pub weights: &'a HostWeights,
    /// Cosines and sines.
    pub rope: Option<&'a [f32]>,
    /// The bilinear matrix.
    pub w: Option<&'a [f32]>,
    /// The additive similarity's matrix on queries.
    pub wq: Option<&'a [f32]>,
    /// The additive similarity's matrix on keys.
    pub wk: Option<&'a [f32]>,
    /// The additive similarity's weights.
    pub score_v: Option<&'a [f32]>,
    /// Positions of x's tokens.
    pub positions: Option<&'a [u32]>,
    /// The additive bias.
    pub bias: Option<TensorRef<'a>>,
    /// The boolean mask.
    pub mask: Option<&'a [u8]>,
    /// ALiBi slopes.
    pub alibi_slopes: Option<&'a [f32]>,
    /// Sink logits.
    pub sinks: Option<&'a [f32]>,
    /// Valid keys.
    pub kv_lens: Option<&'a [u32]>,
    /// Where each entry's ragged queries begin, and the last end.
    pub cu_seqlens_q: Option<&'a [u32]>,
    /// Where each entry's ragged keys begin, and the last end.
    pub cu_seqlens_k: Option<&'a [u32]>,
}

impl<'a> LayerInputs<'a> {
    /// Sequence and weights; fill in the rest with `..`.
    pub fn new(x: impl Into<TensorRef<'a>>, weights: &'a HostWeights) -> Self {
        Self {
            x: x.into(),
            context: None,
            weights,
            rope: None,
            w: None,
            wq: None,
            wk: None,
            score_v: None,
            positions: None,
            bias: None,
            mask: None,
            alibi_slopes: None,
            sinks: None,
            kv_lens: None,
            cu_seqlens_q: None,
            cu_seqlens_k: None,
        }
    }

    /// The operands of a projection before attention.
    pub(crate) fn of(&self, layer: &Layer, of: Projection) -> Result<LinearInputs<'a>> {
        let (w, bias) = self.weights.of(of)?;
        let from_context = layer.context_width.is_some() && !matches!(of, Projection::Q | Projection::Qkv);
        let x = if from_context { self.context } else { Some(self.x) };
        let x = x.ok_or_else(|| Error::MissingOperand { operand: Operand::X }.of(of))?;
        Ok(LinearInputs { bias, ..LinearInputs::new(x, w) })
    }

    /// Those of the attention call.
    pub(crate) fn attention(&self, q: TensorRef<'a>, k: TensorRef<'a>, v: TensorRef<'a>) -> Inputs<'a> {
        Inputs {
            w: self.w,
            wq: self.wq,
            wk: self.wk,
            score_v: self.score_v,
            bias: self.bias,
            mask: self.mask,
            alibi_slopes: self.alibi_slopes,
            sinks: self.sinks,
            kv_lens: self.kv_lens,
            cu_seqlens_q: self.cu_seqlens_q,
            cu_seqlens_k: self.cu_seqlens_k,
            ..Inputs::new(q, k, v)
        }
    }

    /// The table of angles, the gains and the lists of ragged sequences, as the layer wants them.
    pub(crate) fn check_turns(&self, layer: &Layer) -> Result<()> {
        self.attention(self.x, self.x, self.x).check_lists(&layer.attention(false))?;
        let p = &layer.attention;
        let gains = matches!(layer.norm, Some(QkNorm::Rms { .. }));
        let positions = layer.positions.then(|| layer.tokens());
        let angles = layer.rope.map(|rope| rope.elements());
        for (operand, need, got) in [
            (Operand::Rope, angles, self.rope.map(<[f32]>::len)),
            (Operand::Positions, positions, self.positions.map(<[u32]>::len)),
            (Operand::QGain, gains.then_some(p.query_dim()), self.weights.q_gain.as_ref().map(Vec::len)),
            (Operand::KGain, gains.then_some(p.head_dim), self.weights.k_gain.as_ref().map(Vec::len)),
        ] {
            let got = operand.brought(need.is_some(), got)?;
            if let (Some(need), Some(got)) = (need, got)
                && need > got
            {
                let (need, got) = (need as u64, got as u64);
                let (unit, container) = ("elements", "slice");
                return Err(Error::OutOfBounds { operand, need, got, unit, container });
            }
        }
        let there = layer.rope.map_or(0, |rope| rope.positions);
        for (index, &got) in self.positions.iter().flat_map(|list| list[..layer.tokens()].iter().enumerate())
        {
            if got as usize >= there {
                return Err(Error::Position { index, got, positions: there });
            }
        }
        Ok(())
    }

    /// Positions of queries, or of keys: a function of the token's number. What it reads has been checked.
    pub(crate) fn stand(&self, layer: &Layer, queries: bool) -> impl Fn(usize) -> usize + Sync + use<'a> {
        let p = &layer.attention;
        let (first, seq, list) = if queries {
            (layer.first_query(), p.seq_q, self.cu_seqlens_q)
        } else {
            (layer.first_key(), p.seq_kv, self.cu_seqlens_k)
        };
        let given = self.positions.unwrap_or_default();
        move |token| match first {
            None => given[token] as usize,
            Some(first) => first + list.map_or_else(|| token % seq, |list| entry_of(list, token)[1]),
        }
    }
}

/// What [`layer`] gives.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerReference {
    /// `[tokens, out_width]`.
    pub y: Vec<f64>,
    /// For each element of y, `sum |w_o| max|v| + |b_o|`: the layer's own magnitude, which rounding errors are
    /// measured by.
    pub scale: Vec<f64>,
    /// Largest finite magnitude of a kept score.
    pub max_score: f64,
}

/// A layer part by part: each linear map in f64, norm and rotation in f64, attention by
/// [`oracle`](fn@crate::reference::oracle).
///
/// # Errors
/// Those of [`Layer::validate`], and what is wrong with the slices.
pub fn layer(layer: &Layer, inputs: &LayerInputs<'_>) -> Result<LayerReference> {
    forward(layer, inputs, &|x| x, false)
}

/// What a plain framework computes when every tensor has the type of x: each part's result is rounded to it.
///
/// # Errors
/// Those of [`layer`].
pub fn layer_naive(layer: &Layer, inputs: &LayerInputs<'_>) -> Result<LayerReference> {
    let dtype = layer.attention.dtype;
    forward(layer, inputs, &move |x| f64::from(dtype.round(x as f32)), true)
}

fn forward(
    layer: &Layer,
    inputs: &LayerInputs<'_>,
    round: &dyn Fn(f64) -> f64,
    naive: bool,
) -> Result<LayerReference> {
    layer.validate()?;
    inputs.check_turns(layer)?;
    let p = &layer.attention;
    // Each by itself, whatever is packed.
    let [q, k, v] = layer.widths();
    let mut parts: [Vec<f64>; 3] = Default::default();
    for (of, problem) in layer.projections(false) {
        let y = linear(&contiguous(&problem), &inputs.of(layer, of)?).map_err(|e| e.of(of))?.y;
        let widths: &[(usize, usize)] = match of {
            Projection::Qkv => &[(0, q), (1, k), (2, v)],
            Projection::Kv => &[(1, k), (2, v)],
            Projection::Q => &[(0, q)],
            Projection::K => &[(1, k)],
            _ => &[(2, v)],
        };
        for row in y.chunks(problem.outputs.max(1)) {
            let mut at = 0;
            for &(part, width) in widths {
                parts[part].extend(row[at..at + width].iter().map(|&x| round(x)));
                at += width;
            }
        }
    }
    turn(layer, inputs, &mut parts, round);
    // f32 holds what the kernels' own q, k and v hold, to a rounding.
    let dtype = if naive { p.dtype } else { Dtype::F32 };
    let [q, k, v] =
        parts.map(|part| Tensor::from_f32(dtype, &part.into_iter().map(|x| x as f32).collect::<Vec<_>>()));
    let heads = |heads: usize, seq, dim| Layer::heads(0, heads * dim, seq, dim);
    let attention = AttentionProblem {
        q: heads(p.heads_q, p.seq_q, p.query_dim()),
        k: heads(p.heads_kv, p.seq_kv, p.head_dim),
        v: heads(p.heads_kv, p.seq_kv, p.head_dim_v),
        o: heads(p.heads_q, p.seq_q, p.head_dim_v),
        ..p.clone()
    }
    .with_dtype(dtype);
    let attend = inputs.attention(q.as_ref(), k.as_ref(), v.as_ref());
    let found =
        if naive { naive_attention(&attention, &attend)? } else { attention_oracle(&attention, &attend)? };
    // The oracle's rows are [.., heads, tokens]; a layer's are tokens.
    let [entries, heads, queries, dim] = attention.shape(Operand::O);
    let mut o = vec![0.0_f32; entries * heads * queries * dim];
    for (at, &x) in found.o.iter().enumerate() {
        let (row, d) = (at / dim, at % dim);
        let (b, h, i) = (row / queries / heads, row / queries % heads, row % queries);
        o[attention.o.index([b, h, i, d])] = round(x) as f32;
    }
    let o = Tensor::from_f32(dtype, &o);
    let last = LinearProblem { dtype, ..contiguous(&layer.projection_o()) };
    let (w, bias) = inputs.weights.of(Projection::O)?;
    let of = |x| LinearInputs { bias, ..LinearInputs::new(x, w) };
    let y = linear(&last, &of(o.as_ref())).map_err(|e| e.of(Projection::O))?;
    let largest = Tensor::from_f32(dtype, &vec![found.max_value as f32; last.inputs * last.rows]);
    let scale = linear(&last, &of(largest.as_ref()))?.scale;
    Ok(LayerReference { y: y.y.into_iter().map(round).collect(), scale, max_score: found.max_score })
}

/// The same linear map with y by itself.
fn contiguous(problem: &LinearProblem) -> LinearProblem {
    LinearProblem { y: Layout::rows(problem.outputs), ..*problem }
}

/// Norm and rotation of q and k, `[tokens, heads, dim]`.
fn turn(layer: &Layer, inputs: &LayerInputs<'_>, parts: &mut [Vec<f64>; 3], round: &dyn Fn(f64) -> f64) {
    let p = &layer.attention;
    for (part, heads, dim, gain) in [
        (0, p.heads_q, p.query_dim(), &inputs.weights.q_gain),
        (1, p.heads_kv, p.head_dim, &inputs.weights.k_gain),
    ] {
        let stand = inputs.stand(layer, part == 0);
        for (at, row) in parts[part].chunks_mut(dim).enumerate() {
            let token = at / heads;
            let position = stand(token);
            normalise(layer.norm, row, gain.as_deref(), round);
            if let (Some(rope), Some(table)) = (layer.rope, inputs.rope) {
                for i in 0..rope.width / 2 {
                    let [a, b] = rope.pair(i);
                    let at = position * rope.width + 2 * i;
                    let (cos, sin) = (f64::from(table[at]), f64::from(table[at + 1]));
                    (row[a], row[b]) =
                        (round(row[a] * cos - row[b] * sin), round(row[b] * cos + row[a] * sin));
                }
            }
        }
    }
}

fn normalise(norm: Option<QkNorm>, row: &mut [f64], gain: Option<&[f32]>, round: &dyn Fn(f64) -> f64) {
    let Some(norm) = norm else { return };
    let sum: f64 = row.iter().map(|x| x * x).sum();
    let factor = match norm {
        QkNorm::Rms { epsilon } => 1.0 / (sum / row.len() as f64 + f64::from(epsilon)).sqrt(),
        QkNorm::L2 { epsilon } => 1.0 / sum.sqrt().max(f64::from(epsilon)),
    };
    for (d, x) in row.iter_mut().enumerate() {
        *x = round(*x * factor * gain.map_or(1.0, |gain| f64::from(gain[d])));
    }
}
