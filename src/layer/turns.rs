//! Queries and keys of a layer on their way through norm and rotation, by the kernel of appends.

use super::{Layer, LayerOperands};
use crate::append::{AppendStep, Holds, Norm, QkNorm, Stand, Turn};
use crate::attention::Attention;
use crate::blueprint::{Io, Keys};
use crate::cache::Cache;
use crate::dtype::Dtype;
use crate::encode::{Bound, Prepared, check_window, one_dispatch};
use crate::error::{Error, Operand, Result};
use crate::params::{ParamLayout, Params};
use crate::pipeline::Recipe;
use crate::plan::Window;

/// Queries and keys of a layer, normalised and turned on their way from one buffer to another.
pub(super) struct Turns<'a> {
    pub(super) layer: &'a Layer,
    /// As in [`Layer::places`].
    pub(super) apart: bool,
    pub(super) operands: &'a LayerOperands<'a>,
    pub(super) from: &'a wgpu::Buffer,
    pub(super) to: &'a wgpu::Buffer,
}

impl Attention {
    /// The two dispatches of [`Turns`].
    pub(super) fn prepare_turns<'b>(&self, turns: &Turns<'b>) -> Result<Prepared> {
        let (layer, operands, caps) = (turns.layer, turns.operands, self.caps());
        let p = &layer.attention;
        let ([q, k, _], places, [to_k, _]) = (layer.widths(), layer.places(turns.apart), layer.turned());
        let mut all = Prepared::default();
        for (gain, gains, heads, seq, dim, total, list, [from, to], first) in [
            (
                Operand::QGain,
                operands.q_gain,
                p.heads_q,
                p.seq_q,
                p.query_dim(),
                p.total_q,
                (Operand::CuSeqlensQ, operands.options.cu_seqlens_q),
                [places.row_q, q].map(|row| Layer::heads(0, row, p.seq_q, p.query_dim())),
                layer.first_query(),
            ),
            (
                Operand::KGain,
                operands.k_gain,
                p.heads_kv,
                p.seq_kv,
                p.head_dim,
                if let Cache::Ragged { total } = p.cache { Some(total) } else { None },
                (Operand::CuSeqlensK, operands.options.cu_seqlens_k),
                [(places.k, places.row_k), (to_k, k)]
                    .map(|(at, row)| Layer::heads(at, row, p.seq_kv, p.head_dim)),
                layer.first_key(),
            ),
        ] {
            let groups = (p.batch * heads * seq) as u64;
            // A context without keys, for one, has nothing to turn.
            if groups == 0 || total == Some(0) {
                continue;
            }
            let native = p.dtype == Dtype::F16 && caps.shader_f16;
            let step = AppendStep {
                from: Some(Io { dtype: p.dtype, vec4: false, native }),
                to: Some(Io { dtype: p.dtype, vec4: to.is_vec4(dim), native }),
                is_query: true,
                stand: if first.is_some() { Stand::Rows } else { Stand::Given },
                width: dim as u32,
                keys: Keys::Contiguous,
                ragged: total.is_some(),
                norm: layer.norm.map(|norm| Norm::of(norm, gain)),
                rope: layer.rope.map(Turn::of),
                status: false,
            };
            step.fits(caps)?;
            let shape = match total {
                Some(total) => [1, heads, total, dim],
                None => [p.batch, heads, seq, dim],
            };
            let window = |layout| Window::of(layout, shape, p.dtype.bytes(), caps);
            let block =
                |layout| ParamLayout::new(layout, shape, window(layout).start as usize / p.dtype.bytes());
            let params = Params {
                batch: p.batch as u32,
                heads_q: heads as u32,
                seq_q: seq as u32,
                // Positions that there are.
                seq_kv: layer.rope.map_or(seq, |rope| rope.positions) as u32,
                row_first: first.unwrap_or(0) as u32,
                total_q: total.unwrap_or(0) as u32,
                head_dim: dim as u32,
                norm_epsilon: layer.norm.map_or(0.0, QkNorm::epsilon),
                q: block(from),
                k: block(to),
                ..Params::default()
            };
            let words = |slice: Option<wgpu::BufferSlice<'b>>, operand, elements: usize| {
                let slice = slice.ok_or(Error::MissingOperand { operand })?;
                let window = Window { start: 0, end: 4 * elements as u64 };
                check_window(operand, slice, window, caps)?;
                Ok((slice, window))
            };
            let mut bound = Vec::new();
            for (number, holds, _) in step.bindings() {
                let (slice, window) = match holds {
                    Holds::From => (turns.from.slice(..), window(from)),
                    Holds::To => (turns.to.slice(..), window(to)),
                    Holds::Operand(Operand::CuSeqlensQ) => words(list.1, list.0, p.batch + 1)?,
                    Holds::Operand(Operand::Rope) => {
                        let elements = layer.rope.map_or(0, |rope| rope.elements());
                        words(operands.rope, Operand::Rope, elements)?
                    }
                    Holds::Operand(Operand::Positions) => {
                        words(operands.options.positions, Operand::Positions, layer.tokens())?
                    }
                    Holds::Operand(operand) => words(gains, operand, dim)?,
                };
                bound.push(Bound::new(number, slice, window));
            }
            let params = bytemuck::bytes_of(&params);
            let ready = one_dispatch(&self.shared, Recipe::Append(step), params, bound, groups)?;
            all = all.then(Prepared::new(vec![ready]));
        }
        Ok(all)
    }
}
