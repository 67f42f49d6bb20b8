//! The attention layer on every core: its linear maps, norm and rotation, and attention between them.

use rayon::prelude::*;

use super::{attention, linear, linear_into};
use crate::dtype::{Tensor, TensorRef};
use crate::error::Result;
use crate::layer::{Layer, LayerInputs, Projection};
use crate::layout::Layout;
use crate::linear::LinearInputs;

/// Computes a layer on the CPU: y as its layout says.
///
/// ```
/// use wgpu_attention::{AttentionProblem, HostWeights, Layer, LayerInputs, Tensor, cpu};
/// // Two tokens of width 2, one head; q, k and v are x, and y is what attention finds.
/// let attention = AttentionProblem::new(1, 1, 1, 2, 2, 2, 2);
/// let layer = Layer { packed: true, ..Layer::new(&attention, 2) };
/// let identity = |n: usize| Tensor::F32((0..2 * n).map(|i| f32::from(i % 2 == i / 2 % 2)).collect());
/// let weights = HostWeights::new(identity(6), identity(2));
/// let x = [1.0_f32, 0.0, 1.0, 0.0];
/// let y = cpu::layer(&layer, &LayerInputs::new(&x[..], &weights))?;
/// assert_eq!(y.to_f32(), x);
/// # Ok::<(), wgpu_attention::Error>(())
/// ```
///
/// # Errors
/// Those of [`Layer::validate`], and what is wrong with the slices.
pub fn layer(layer: &Layer, inputs: &LayerInputs<'_>) -> Result<Tensor> {
    layer.validate()?;
    inputs.check_turns(layer)?;
    let p = layer.attention(false);
    let mut projected = Tensor::zeros(p.dtype, layer.places(false).len);
    for (of, problem) in layer.projections(false) {
        let done = linear_into(&problem, &inputs.of(layer, of)?, &mut projected);
        done.map_err(|error| error.of(of))?;
    }
    let turned = layer.turns().then(|| turn(layer, inputs, projected.as_ref()));
    let qk = turned.as_ref().unwrap_or(&projected).as_ref();
    let found = attention(&p, &inputs.attention(qk, qk, projected.as_ref()))?;
    let (w, bias) = inputs.weights.of(Projection::O)?;
    let last = LinearInputs { bias, ..LinearInputs::new(found.o.as_ref(), w) };
    linear(&layer.projection_o(), &last).map_err(|error| error.of(Projection::O))
}

/// q and k, normalised and turned, in the places that [`Layer::attention`] reads them from.
fn turn(layer: &Layer, inputs: &LayerInputs<'_>, projected: TensorRef<'_>) -> Tensor {
    let p = &layer.attention;
    let ([q, k, _], places, [first_k, len]) = (layer.widths(), layer.places(false), layer.turned());
    let mut all = vec![0.0_f32; len];
    let (to_q, to_k) = all.split_at_mut(first_k);
    // What lies behind q, up to where k begins, is nobody's.
    let to_q = &mut to_q[..layer.tokens() * q];
    for (queries, to, width, dim, from, gain) in [
        (true, to_q, q, p.query_dim(), Layout::rows(places.row_q), &inputs.weights.q_gain),
        (false, to_k, k, p.head_dim, Layout::rows(places.row_k).at(places.k), &inputs.weights.k_gain),
    ] {
        let stand = inputs.stand(layer, queries);
        to.par_chunks_exact_mut(width).enumerate().for_each(|(token, row)| {
            let at = from.index([0, 0, token, 0]);
            match projected {
                TensorRef::F32(x) => row.copy_from_slice(&x[at..at + width]),
                x => row.iter_mut().enumerate().for_each(|(i, to)| *to = x.get(at + i)),
            }
            let position = stand(token);
            for head in row.chunks_exact_mut(dim) {
                if let Some(norm) = layer.norm {
                    norm.apply(head, gain.as_deref());
                }
                if let (Some(rope), Some(table)) = (layer.rope, inputs.rope) {
                    rope.turn(head, position, table);
                }
            }
        });
    }
    Tensor::from_f32(p.dtype, &all)
}
