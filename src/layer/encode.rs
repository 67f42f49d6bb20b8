//! From a layer and buffers to recorded dispatches.

use super::turns::Turns;
use super::{Layer, Projection};
use crate::append::QkNorm;
use crate::attention::{Attention, Operands};
use crate::caps::Caps;
use crate::encode::{Place, Prepared, meet, scratch_buffer};
use crate::error::{Error, Operand, Result};
use crate::linear::{LinearOperands, LinearProblem};
use crate::plan::{Plan, PlanOptions, Window};
use crate::slot::Slot;

/// The buffers of a layer, or pieces of buffers, as [`Operands`] has them; weights and biases lie as the [`Layer`] says.
#[derive(Clone, Copy, Debug)]
pub struct LayerOperands<'a> {
    /// The sequence.
    pub x: wgpu::BufferSlice<'a>,
    /// The other sequence, of cross-attention.
    pub context: Option<wgpu::BufferSlice<'a>>,
    /// Weights of q, or of q, k and v where they are packed.
    pub w_q: wgpu::BufferSlice<'a>,
    /// Weights of k.
    pub w_k: Option<wgpu::BufferSlice<'a>>,
    /// Weights of v.
    pub w_v: Option<wgpu::BufferSlice<'a>>,
    /// Weights of the output.
    pub w_o: wgpu::BufferSlice<'a>,
    /// Bias of q, or of q, k and v where they are packed.
    pub b_q: Option<wgpu::BufferSlice<'a>>,
    /// Bias of k.
    pub b_k: Option<wgpu::BufferSlice<'a>>,
    /// Bias of v.
    pub b_v: Option<wgpu::BufferSlice<'a>>,
    /// Bias of the output.
    pub b_o: Option<wgpu::BufferSlice<'a>>,
    /// Gains of the queries' norm, f32.
    pub q_gain: Option<wgpu::BufferSlice<'a>>,
    /// Gains of the keys' norm, f32.
    pub k_gain: Option<wgpu::BufferSlice<'a>>,
    /// Cosines and sines, f32.
    pub rope: Option<wgpu::BufferSlice<'a>>,
    /// The output. It may lie where x does, or the context: both have been read when it is written. Its rows behind the
    /// last offset of a ragged batch belong to no entry, and what the layer leaves there means nothing.
    pub y: wgpu::BufferSlice<'a>,
    /// What attention's options want.
    pub options: LayerOptions<'a>,
}

/// The buffers of attention's options, as [`Operands`] has them.
#[derive(Clone, Copy, Debug, Default)]
pub struct LayerOptions<'a> {
    /// The bilinear matrix.
    pub w: Option<wgpu::BufferSlice<'a>>,
    /// The additive similarity's matrix on queries.
    pub wq: Option<wgpu::BufferSlice<'a>>,
    /// The additive similarity's matrix on keys.
    pub wk: Option<wgpu::BufferSlice<'a>>,
    /// The additive similarity's weights.
    pub score_v: Option<wgpu::BufferSlice<'a>>,
    /// Positions of x's tokens, `[tokens]`, u32. One beyond rope's table counts as its last.
    pub positions: Option<wgpu::BufferSlice<'a>>,
    /// The additive bias.
    pub bias: Option<wgpu::BufferSlice<'a>>,
    /// The boolean mask.
    pub mask: Option<wgpu::BufferSlice<'a>>,
    /// ALiBi slopes.
    pub alibi_slopes: Option<wgpu::BufferSlice<'a>>,
    /// Sink logits.
    pub sinks: Option<wgpu::BufferSlice<'a>>,
    /// Valid keys.
    pub kv_lens: Option<wgpu::BufferSlice<'a>>,
    /// Where each entry's ragged queries begin, and the last end.
    pub cu_seqlens_q: Option<wgpu::BufferSlice<'a>>,
    /// Where each entry's ragged keys begin, and the last end.
    pub cu_seqlens_k: Option<wgpu::BufferSlice<'a>>,
    /// The word that reports.
    pub status: Option<wgpu::BufferSlice<'a>>,
}

impl<'a> LayerOperands<'a> {
    /// Packed weights of q, k and v, and those of the output; fill in the rest with `..`.
    pub fn new(
        x: wgpu::BufferSlice<'a>,
        w_q: wgpu::BufferSlice<'a>,
        w_o: wgpu::BufferSlice<'a>,
        y: wgpu::BufferSlice<'a>,
    ) -> Self {
        Self {
            x,
            context: None,
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
            rope: None,
            y,
            options: LayerOptions::default(),
        }
    }

    /// Those of a projection from x or the context to `y`.
    fn of(&self, layer: &Layer, of: Projection, y: wgpu::BufferSlice<'a>) -> Result<LinearOperands<'a>> {
        let context = if layer.context_width.is_some() { self.context } else { Some(self.x) };
        let (x, w, bias) = match of {
            Projection::Q | Projection::Qkv => (Some(self.x), Some(self.w_q), self.b_q),
            Projection::Kv => (context, Some(self.w_q), self.b_q),
            // Of a packed matrix, in parts.
            Projection::K | Projection::V if layer.packed => (context, Some(self.w_q), self.b_q),
            Projection::K => (context, self.w_k, self.b_k),
            Projection::V => (context, self.w_v, self.b_v),
            Projection::O => unreachable!("it reads what attention has found"),
        };
        let missing = |operand| Error::MissingOperand { operand }.of(of);
        let x = x.ok_or_else(|| missing(Operand::X))?;
        let w = w.ok_or_else(|| missing(Operand::W))?;
        if layer.packed && [self.w_k, self.w_v, self.b_k, self.b_v].iter().any(Option::is_some) {
            return Err(Error::UnexpectedOperand { operand: Operand::W }.of(of));
        }
        Ok(LinearOperands { bias, ..LinearOperands::new(x, w, y) })
    }
}

impl Layer {
    /// Whether a device has q, k and v each by themselves, and so a packed matrix read in parts: either would be too
    /// much for one binding.
    fn apart(&self, caps: &Caps) -> bool {
        let projected = self.places(false).len as u64 * self.attention.dtype.bytes() as u64;
        let packed = self.width as u64 * self.widths().iter().sum::<usize>() as u64;
        let weights = if self.packed { packed * self.weight_dtype.bytes() as u64 } else { 0 };
        projected.max(weights) > caps.max_storage_binding
    }

    /// Bytes of scratch memory that an [`Attention`] on such a device holds between the parts of this layer: projected
    /// queries, keys and values, the turned ones, and what was attended to. The plan of its attention may want more
    /// ([`Plan::scratch_bytes`](crate::Plan::scratch_bytes)).
    ///
    /// # Errors
    /// Those of [`Layer::validate`].
    pub fn scratch_bytes(&self, caps: &Caps) -> Result<u64> {
        self.validate()?;
        if self.tokens() == 0 || self.attention.rows() == 0 {
            return Ok(0);
        }
        Ok(self.between(self.apart(caps)).iter().map(|(_, bytes)| bytes).sum())
    }

    /// The buffers between its parts.
    fn between(&self, apart: bool) -> [(Slot, u64); 3] {
        let p = &self.attention;
        [
            (Slot::LayerProjected, self.places(apart).len),
            (Slot::LayerTurned, if self.turns() { self.turned()[1] } else { 0 }),
            (Slot::LayerAttended, self.tokens() * p.heads_q * p.head_dim_v),
        ]
        .map(|(slot, elements)| {
            let bytes = elements as u64 * p.dtype.bytes() as u64;
            (slot, bytes.next_multiple_of(16).max(16))
        })
    }
}

impl Attention {
    /// Records a layer, in a compute pass of its own. Submits nothing.
    ///
    /// # Errors
    /// Those of [`Attention::prepare_layer`]; then nothing has been recorded.
    pub fn encode_layer(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        layer: &Layer,
        operands: &LayerOperands<'_>,
    ) -> Result<()> {
        self.prepare_layer(layer, operands)?.encode(encoder);
        Ok(())
    }

    /// All of [`Attention::encode_layer`] but the recording. What lies between the projections is scratch memory
    /// of this object ([`Layer::scratch_bytes`]), which what was prepared keeps.
    ///
    /// # Errors
    /// Those of [`Layer::validate`], [`Attention::plan`], [`Attention::prepare_linear`] (as
    /// [`Error::Projection`], which names the map; what a driver says comes as it is) and [`Attention::prepare`].
    pub fn prepare_layer(&self, layer: &Layer, operands: &LayerOperands<'_>) -> Result<Prepared> {
        self.prepare_layer_with(layer, operands, &PlanOptions::default())
    }

    /// The same with options for the plan of its attention: a path or a kernel, a budget for that plan's own scratch.
    ///
    /// # Errors
    /// Those of [`Attention::prepare_layer`].
    pub fn prepare_layer_with(
        &self,
        layer: &Layer,
        operands: &LayerOperands<'_>,
        options: &PlanOptions,
    ) -> Result<Prepared> {
        layer.validate()?;
        let apart = layer.apart(self.caps());
        let p = layer.attention(apart);
        if layer.tokens() == 0 || p.rows() == 0 {
            return Ok(Prepared::default());
        }
        if (layer.context_width.is_some(), operands.context.is_some()) == (false, true) {
            return Err(Error::UnexpectedOperand { operand: Operand::X }.of(Projection::Kv));
        }
        let gains = matches!(layer.norm, Some(QkNorm::Rms { .. }));
        for (operand, wanted, buffer) in [
            (Operand::Rope, layer.rope.is_some(), operands.rope),
            (Operand::QGain, gains, operands.q_gain),
            (Operand::KGain, gains, operands.k_gain),
            (Operand::Positions, layer.positions, operands.options.positions),
        ] {
            operand.brought(wanted, buffer)?;
        }
        let plan = self.plan_with(&p, options)?;
        let [projected, turned, attended] = layer
            .between(apart)
            .map(|(slot, bytes)| scratch_buffer(&self.shared, slot, bytes, "between a layer's parts"));
        let [projected, turned, attended] = [projected?, turned?, attended?];

        let mut all = Prepared::default();
        let mut read = Vec::new();
        for (of, problem) in layer.projections(apart) {
            let linear = operands.of(layer, of, projected.slice(..))?;
            read.extend(read_by(of, &problem, &linear));
            all = all.then(self.prepare_linear(&problem, &linear).map_err(|e| e.of(of))?);
        }
        if layer.turns() {
            all = all.then(self.prepare_turns(&Turns {
                layer,
                apart,
                operands,
                from: &projected,
                to: &turned,
            })?);
        }
        let options = &operands.options;
        let qk = if layer.turns() { &turned } else { &projected };
        let attend = Operands {
            w: options.w,
            wq: options.wq,
            wk: options.wk,
            score_v: options.score_v,
            bias: options.bias,
            mask: options.mask,
            alibi_slopes: options.alibi_slopes,
            sinks: options.sinks,
            kv_lens: options.kv_lens,
            cu_seqlens_q: options.cu_seqlens_q,
            cu_seqlens_k: options.cu_seqlens_k,
            status: options.status,
            ..Operands::new(qk.slice(..), qk.slice(..), projected.slice(..), attended.slice(..))
        };
        all = all.then(self.prepare(&plan, &attend)?);
        let linear = LinearOperands {
            bias: operands.b_o,
            ..LinearOperands::new(attended.slice(..), operands.w_o, operands.y)
        };
        let problem = layer.projection_o();
        read.extend(read_by(Projection::O, &problem, &linear).filter(|read| read.0 != Operand::X));
        let last = self.prepare_linear(&problem, &linear);
        all = all.then(last.map_err(|e| e.of(Projection::O))?);
        check_outputs(layer, operands, &plan, &attend, read)?;
        Ok(all)
    }
}

/// What a dispatch reads: which operand, of which map, and where it lies.
type Read<'a> = (Operand, Option<Projection>, Place<'a>);

/// Where an operand of a map lies.
fn place<'a>(problem: &LinearProblem, operand: Operand, slice: wgpu::BufferSlice<'a>) -> Place<'a> {
    let first =
        problem.layout(operand).map_or(0, |(layout, dtype)| layout.offset as u64 * dtype.bytes() as u64);
    (slice, Window { start: first, end: problem.buffer_bytes(operand) })
}

fn read_by<'a>(
    of: Projection,
    problem: &LinearProblem,
    linear: &LinearOperands<'a>,
) -> impl Iterator<Item = Read<'a>> {
    [(Operand::X, Some(linear.x)), (Operand::W, Some(linear.w)), (Operand::Bias, linear.bias)]
        .into_iter()
        .filter_map(move |(operand, slice)| Some((operand, Some(of), place(problem, operand, slice?))))
}

/// That what a layer writes into the caller's buffers lies over nothing that one of its other dispatches reads, or writes:
/// each dispatch by itself has been checked. `read` is what its maps read, and `attend` the operands of its attention.
fn check_outputs<'a>(
    layer: &Layer,
    operands: &LayerOperands<'a>,
    plan: &Plan,
    attend: &Operands<'a>,
    mut read: Vec<Read<'a>>,
) -> Result<()> {
    let p = &layer.attention;
    let words = |words: usize| Window { start: 0, end: 4 * words as u64 };
    let rope = layer.rope.map_or(0, |rope| rope.elements());
    for (operand, slice, window) in [
        (Operand::Rope, operands.rope, words(rope)),
        (Operand::QGain, operands.q_gain, words(p.query_dim())),
        (Operand::KGain, operands.k_gain, words(p.head_dim)),
        (Operand::Positions, operands.options.positions, words(layer.tokens())),
    ] {
        read.extend(slice.map(|slice| (operand, None, (slice, window))));
    }
    let between = [Operand::Q, Operand::K, Operand::V, Operand::O, Operand::Status];
    let options = Operand::ALL.iter().filter(|operand| !between.contains(operand));
    read.extend(options.filter_map(|&operand| {
        let slice = attend.get(operand)?;
        Some((operand, None, (slice, plan.window(operand))))
    }));
    let y = place(&layer.projection_o(), Operand::Y, operands.y);
    let aliased = |operand, with, of: Option<Projection>| {
        let error = Error::Aliased { operand, with };
        Err(match of {
            Some(of) => error.of(of),
            None => error,
        })
    };
    if let Some(&(with, of, _)) = read.iter().find(|read| read.0 != Operand::X && meet(y, read.2)) {
        return aliased(Operand::Y, with, of);
    }
    let Some(status) = attend.status.map(|slice| (slice, plan.window(Operand::Status))) else {
        return Ok(());
    };
    read.push((Operand::Y, Some(Projection::O), y));
    match read.iter().find(|read| meet(status, read.2)) {
        Some(&(with, of, _)) => aliased(Operand::Status, with, of),
        None => Ok(()),
    }
}
