//! From a backward pass and buffers to recorded dispatches.

use super::form::{Form, LANES, Makes, SINK_QUERIES, own_and_others, parts};
use super::kernel::Backward;
use super::{BackwardProblem, like};
use crate::attention::{Attention, Operands, Shared};
use crate::caps::Caps;
use crate::encode::{self, Bound, Prepared, Ready, check_window, dispatches, scratch_buffer, within};
use crate::error::{Error, Operand, Result};
use crate::family::Family;
use crate::kernel::bundle_words;
use crate::params::{ParamLayout, Params};
use crate::pipeline::Recipe;
use crate::plan::{DEFAULT_BUDGET, DISPATCH_FLOP, Window, dispatch_flop};
use crate::slot::Slot;

/// The buffers of one backward pass, laid out as the [`BackwardProblem`] says. All need `STORAGE` usage, and may be
/// pieces of one buffer, as [`Operands`] has it. Gradients may be given the same slice, as those of a packed projection
/// are, where their layouts have no place in common.
#[derive(Clone, Copy, Debug)]
pub struct BackwardOperands<'a> {
    /// Those of the forward call: its inputs, and the o and lse that it wrote. Its weights and its status, where the
    /// problem asks for them, are passed by.
    pub forward: Operands<'a>,
    /// The gradient of the loss by o.
    pub dout: wgpu::BufferSlice<'a>,
    /// Receives the gradient by q; `None` where nobody asks for it, which saves its kernel.
    pub dq: Option<wgpu::BufferSlice<'a>>,
    /// Receives the gradient by k.
    pub dk: Option<wgpu::BufferSlice<'a>>,
    /// Receives the gradient by v.
    pub dv: Option<wgpu::BufferSlice<'a>>,
    /// Receives the gradient by bias.
    pub dbias: Option<wgpu::BufferSlice<'a>>,
    /// Receives the gradient by the sinks, f32.
    pub dsinks: Option<wgpu::BufferSlice<'a>>,
}

impl<'a> BackwardOperands<'a> {
    /// What every backward pass reads, and no gradient yet.
    pub fn new(forward: Operands<'a>, dout: wgpu::BufferSlice<'a>) -> Self {
        Self { forward, dout, dq: None, dk: None, dv: None, dbias: None, dsinks: None }
    }

    /// Where a gradient goes.
    pub(super) fn set(&mut self, gradient: Operand, to: Option<wgpu::BufferSlice<'a>>) {
        match gradient {
            Operand::Dq => self.dq = to,
            Operand::Dk => self.dk = to,
            Operand::Dv => self.dv = to,
            Operand::Dbias => self.dbias = to,
            Operand::Dsinks => self.dsinks = to,
            _ => {}
        }
    }

    fn get(&self, operand: Operand) -> Option<wgpu::BufferSlice<'a>> {
        match operand {
            Operand::Dout => Some(self.dout),
            Operand::Dq => self.dq,
            Operand::Dk => self.dk,
            Operand::Dv => self.dv,
            Operand::Dbias => self.dbias,
            Operand::Dsinks => self.dsinks,
            _ => self.forward.get(operand),
        }
    }
}

impl Attention {
    /// Records a backward pass, in a compute pass of its own. Submits nothing.
    ///
    /// ```no_run
    /// use wgpu_attention::{Align, Attention, AttentionProblem, BackwardOperands, BackwardProblem, Operands};
    /// # fn f(attention: &Attention, encoder: &mut wgpu::CommandEncoder, b: [wgpu::BufferSlice<'_>; 9])
    /// # -> wgpu_attention::Result<()> {
    /// # let [q, k, v, o, lse, dout, dq, dk, dv] = b;
    /// let problem = AttentionProblem {
    ///     causal: Some(Align::TopLeft),
    ///     lse: true, // what the backward pass computes weights from
    ///     ..AttentionProblem::new(4, 16, 4, 1024, 1024, 64, 64)
    /// };
    /// let forward = Operands { lse: Some(lse), ..Operands::new(q, k, v, o) };
    /// attention.encode(encoder, &attention.plan(&problem)?, &forward)?;
    /// // ... the loss, which writes dout ...
    /// let gradients =
    ///     BackwardOperands { dq: Some(dq), dk: Some(dk), dv: Some(dv), ..BackwardOperands::new(forward, dout) };
    /// attention.encode_backward(encoder, &BackwardProblem::of(&problem), &gradients)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of [`BackwardProblem::validate`]; [`Error::LimitExceeded`] where the device lacks what a kernel needs;
    /// [`Error::MissingOperand`], [`Error::UnexpectedOperand`], [`Error::BufferUsage`], [`Error::OutOfBounds`],
    /// [`Error::Misaligned`], [`Error::Aliased`], [`Error::OutOfMemory`], [`Error::Driver`] and [`Error::DeviceLost`].
    /// Then nothing has been recorded.
    pub fn encode_backward(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        problem: &BackwardProblem,
        operands: &BackwardOperands<'_>,
    ) -> Result<()> {
        self.prepare_backward(problem, operands)?.encode(encoder);
        Ok(())
    }

    /// All of [`Attention::encode_backward`] but the recording: for steps of training that use the same buffers.
    ///
    /// # Errors
    /// Those of [`Attention::encode_backward`].
    pub fn prepare_backward(
        &self,
        problem: &BackwardProblem,
        operands: &BackwardOperands<'_>,
    ) -> Result<Prepared> {
        prepare(&self.shared, problem, operands, None)
    }

    /// The same by kernels of the caller's choice: [`Family::FusedTile`], tiles in workgroup memory, which GPUs get, or
    /// [`Family::FusedRow`], a row a thread, which adapters on a CPU get where rows are not too wide.
    ///
    /// # Errors
    /// Those of [`Attention::encode_backward`], and [`Error::KernelUnfit`].
    pub fn prepare_backward_with(
        &self,
        problem: &BackwardProblem,
        operands: &BackwardOperands<'_>,
        family: Family,
    ) -> Result<Prepared> {
        prepare(&self.shared, problem, operands, Some(family))
    }
}

impl BackwardProblem {
    /// Bytes of scratch memory that an [`Attention`] on such a device holds for it: two numbers a query and the lists,
    /// and where long sums come in parts (on a GPU of more than 4096 terms) those of a chunk in between.
    ///
    /// # Errors
    /// Those of [`BackwardProblem::validate`], and [`Error::LimitExceeded`] where the device cannot bind as much.
    pub fn scratch_bytes(&self, caps: &Caps) -> Result<u64> {
        self.validate()?;
        if self.is_nothing() {
            return Ok(0);
        }
        let carried = self.gradients().map(|makes| {
            let kernel = Backward::new(makes, self, None, caps);
            chunks(&kernel, self, caps).carried
        });
        Ok(self.gathered_bytes(caps)? + carried.max().unwrap_or(0))
    }

    /// The gradients that have elements.
    fn gradients(&self) -> impl Iterator<Item = Makes> {
        Makes::GRADIENTS.into_iter().filter(|makes| makes.gradient().is_some_and(|of| self.extent(of) > 0))
    }

    /// No gradient has an element.
    fn is_nothing(&self) -> bool {
        self.gradients().next().is_none()
    }

    /// Rows of lse.
    fn rows(&self) -> u64 {
        self.shape(Operand::Lse).iter().map(|&n| n as u64).product()
    }

    fn gathered_bytes(&self, caps: &Caps) -> Result<u64> {
        let words = list_words(self) + 2 * self.rows();
        let need = (4 * words).next_multiple_of(16);
        // Kernels index it by u32.
        let got = caps.max_storage_binding.min(caps.max_buffer).min(4 * u64::from(u32::MAX));
        within(|| "scratch: bytes of lse and delta in one storage binding".into(), need, got)?;
        Ok(need)
    }
}

/// Words of the lists before lse and delta.
fn list_words(problem: &BackwardProblem) -> u64 {
    bundle_words(&problem.attention)
}

/// How a kernel's work is cut into dispatches.
struct Chunks {
    /// Owners (an entry's head each), and owners of a chunk.
    owners: u64,
    of_owners: u64,
    /// Own rows of an owner, and rows of a chunk.
    rows: u64,
    of_rows: u64,
    /// Bytes of the sums between two parts of the others.
    carried: u64,
}

/// Whole heads if at least one is short enough for a slow GPU's watchdog, or for a processor to have a desktop beside it,
/// else rows of one.
fn chunks(kernel: &Backward, problem: &BackwardProblem, caps: &Caps) -> Chunks {
    let p = &problem.attention;
    let [rows, others] = own_and_others(kernel.makes, problem);
    let owners = match kernel.makes {
        Makes::Dq | Makes::Rows => [p.batch, p.heads_q],
        Makes::Dk | Makes::Dv => [p.batch, p.heads_kv],
        Makes::Dbias => problem.owners_of_bias(),
        Makes::Dsinks => [1, p.heads_q],
    };
    let owners: u64 = owners.map(|n| n as u64).into_iter().product();
    let form = kernel.form;
    let tile = u64::from(form.own_rows());
    let [tiles, keys] = key_tiles(kernel, problem);
    let met = others.min(kernel.part_others(problem, caps)).max(1) * tiles * keys;
    let a_row = 2 * met * (2 * p.head_dim + p.head_dim_v) as u64;
    // The sums of a tile's row, if they are carried.
    let row_bytes = 16 * u64::from(kernel.sum_quads()) * tiles;
    let room = DEFAULT_BUDGET.min(caps.max_storage_binding) / row_bytes.max(1);
    let flop = if caps.on_cpu() { DISPATCH_FLOP / 1000 } else { dispatch_flop(caps, Family::FusedTile) };
    let most = (flop / a_row).min(if kernel.parts { room } else { u64::MAX }).max(tile);
    let whole = rows.next_multiple_of(tile);
    let (of_owners, of_rows) = match most / whole.max(1) {
        0 => (owners.min(1), most / tile * tile),
        heads => (heads.min(owners), rows),
    };
    let carried = if kernel.parts { of_owners * of_rows.next_multiple_of(tile) * row_bytes } else { 0 };
    Chunks { owners, of_owners, rows, of_rows, carried }
}

/// Workgroups beside each other for the same own rows, and keys of each: more than one where they own pairs.
fn key_tiles(kernel: &Backward, problem: &BackwardProblem) -> [u64; 2] {
    let Form::Pairs { .. } = kernel.form else { return [1; 2] };
    let keys = u64::from(kernel.form.own_rows());
    [(problem.attention.seq_kv as u64).div_ceil(keys), keys]
}

pub(super) fn prepare(
    shared: &Shared,
    problem: &BackwardProblem,
    operands: &BackwardOperands<'_>,
    family: Option<Family>,
) -> Result<Prepared> {
    let caps = &shared.caps;
    problem.validate()?;
    if let Some(family) = family {
        fits(problem, family, caps)?;
    }
    check(problem, operands, caps)?;
    let asked = |makes: &Makes| makes.gradient().is_some_and(|of| operands.get(of).is_some());
    let wanted = problem.gradients().filter(asked);
    let kernels: Vec<_> = wanted.map(|makes| Backward::new(makes, problem, family, caps)).collect();
    if kernels.is_empty() {
        return Ok(Prepared::default());
    }
    if caps.on_cpu() && operands.dsinks.is_some() {
        let need = problem.rows() / problem.attention.heads_q.max(1) as u64;
        within(|| "queries of a head for its sink's gradient, on a processor".into(), need, SINK_QUERIES)?;
    }
    let rows = Backward::new(Makes::Rows, problem, None, caps);
    for kernel in kernels.iter().chain([&rows]) {
        kernel.check(caps)?;
        // Natively `check` has seen to that.
        if cfg!(target_arch = "wasm32") {
            check_clashes(kernel, problem, operands, caps)?;
        }
    }
    let gathered_bytes = problem.gathered_bytes(caps)?;
    let gathered = scratch_buffer(shared, Slot::Gathered, gathered_bytes, "of lse and delta")?;
    let mut all = gather(shared, &rows, problem, operands, &gathered)?;
    for kernel in &kernels {
        all.extend(gradient(shared, kernel, problem, operands, &gathered)?);
    }
    Ok(Prepared::new(all))
}

/// Whether a family of the caller's choice has kernels for a problem.
fn fits(problem: &BackwardProblem, family: Family, caps: &Caps) -> Result<()> {
    let row = matches!(Backward::new(Makes::Dq, problem, Some(family), caps).form, Form::Row { .. });
    let why = match family {
        Family::FusedRow if !row => "rows are too wide for a thread",
        Family::FusedRow | Family::FusedTile => return Ok(()),
        _ => "it has no kernels for gradients",
    };
    Err(Error::KernelUnfit { kernel: family.to_string(), why: why.into() })
}

/// The dispatch that looks at each query.
fn gather(
    shared: &Shared,
    kernel: &Backward,
    problem: &BackwardProblem,
    operands: &BackwardOperands<'_>,
    gathered: &wgpu::Buffer,
) -> Result<Vec<Ready>> {
    let [entries, heads, rows, _] = problem.shape(Operand::O);
    let params = Params {
        head_count: (entries * heads) as u32,
        row_count: rows as u32,
        ..params(problem, None, &shared.caps)
    };
    let groups = problem.rows().max(list_words(problem)).div_ceil(LANES.into());
    let bound = bound(kernel, problem, operands, &shared.caps, [gathered, gathered]);
    dispatches(shared, Recipe::Backward(*kernel), &[(bytemuck::bytes_of(&params), groups)], bound)
}

/// The dispatches of a gradient.
fn gradient(
    shared: &Shared,
    kernel: &Backward,
    problem: &BackwardProblem,
    operands: &BackwardOperands<'_>,
    gathered: &wgpu::Buffer,
) -> Result<Vec<Ready>> {
    let caps = &shared.caps;
    let chunks = chunks(kernel, problem, caps);
    // Buffers for rows of ragged batches of which no entry has any.
    if chunks.owners == 0 || chunks.rows == 0 {
        return Ok(Vec::new());
    }
    let carried = match chunks.carried {
        0 => gathered.clone(),
        bytes => scratch_buffer(shared, Slot::Carried, bytes, "of sums between parts")?,
    };
    let base = params(problem, kernel.makes.gradient(), caps);
    let [key_tiles, _] = key_tiles(kernel, problem);
    let step = kernel.part_others(problem, caps);
    let parts = if kernel.parts { parts(kernel.makes, kernel.form, problem, caps) } else { 1 };
    let mut blocks = Vec::new();
    for head in (0..chunks.owners).step_by(chunks.of_owners as usize) {
        for row in (0..chunks.rows).step_by(chunks.of_rows as usize) {
            let heads = chunks.of_owners.min(chunks.owners - head);
            let rows = chunks.of_rows.min(chunks.rows - row);
            for part in 0..parts {
                let last = part + 1 == parts;
                let params = Params {
                    head_first: head as u32,
                    head_count: heads as u32,
                    row_first: row as u32,
                    row_count: rows as u32,
                    key_first: (part * step) as u32,
                    key_end: if last { u32::MAX } else { ((part + 1) * step) as u32 },
                    ..base
                };
                let tiles = rows.div_ceil(u64::from(kernel.form.own_rows())) * key_tiles;
                blocks.push((params, heads * tiles));
            }
        }
    }
    let blocks: Vec<_> =
        blocks.iter().map(|(params, groups)| (bytemuck::bytes_of(params), *groups)).collect();
    let bound = bound(kernel, problem, operands, caps, [gathered, &carried]);
    dispatches(shared, Recipe::Backward(*kernel), &blocks, bound)
}

/// What all uniform blocks of a kernel have in common.
fn params(problem: &BackwardProblem, gradient: Option<Operand>, caps: &Caps) -> Params {
    let layout = |operand: Operand| {
        problem.layout(operand).map_or(ParamLayout::default(), |layout| {
            let first = window(problem, operand, caps).start as usize / bytes(problem, operand);
            ParamLayout::new(layout, problem.shape(operand), first)
        })
    };
    Params {
        q: layout(Operand::Q),
        k: layout(Operand::K),
        v: layout(Operand::V),
        o: layout(Operand::O),
        bias: layout(Operand::Bias),
        mask: layout(Operand::Mask),
        dout: layout(Operand::Dout),
        grad: gradient.map_or(ParamLayout::default(), layout),
        ..Params::of(&problem.attention)
    }
}

/// Bytes of an element.
fn bytes(problem: &BackwardProblem, operand: Operand) -> usize {
    problem.attention.element_bytes(like(operand))
}

/// The part of an operand's slice that is bound.
fn window(problem: &BackwardProblem, operand: Operand, caps: &Caps) -> Window {
    problem.layout(operand).map_or(Window::NONE, |layout| {
        Window::of(layout, problem.shape(operand), bytes(problem, operand), caps)
    })
}

/// A kernel's buffers: the caller's, and those of gathered rows and carried sums.
fn bound(
    kernel: &Backward,
    problem: &BackwardProblem,
    operands: &BackwardOperands<'_>,
    caps: &Caps,
    [gathered, carried]: [&wgpu::Buffer; 2],
) -> Vec<Bound> {
    let whole = |slot: Slot, buffer: &wgpu::Buffer| {
        let window = Window { start: 0, end: buffer.size() };
        Bound { number: slot.number(), buffer: buffer.clone(), window }
    };
    kernel
        .storage()
        .into_iter()
        .filter_map(|(slot, _)| match slot {
            Slot::Operand(operand) => {
                let window = window(problem, operand, caps);
                Some(Bound::new(slot.number(), operands.get(operand)?, window))
            }
            Slot::Carried => Some(whole(slot, carried)),
            _ => Some(whole(slot, gathered)),
        })
        .collect()
}

/// Every operand of a backward pass.
fn all_operands() -> impl Iterator<Item = Operand> + Clone {
    Operand::ALL.iter().copied().chain([Operand::Dout]).chain(Operand::GRADIENTS)
}

/// Every rule about the caller's buffers.
fn check(problem: &BackwardProblem, operands: &BackwardOperands<'_>, caps: &Caps) -> Result<()> {
    // What only the forward call writes.
    let passed_by = [Operand::Weights, Operand::Status];
    let passed_by = |of: &Operand| passed_by.contains(of) && problem.attention.layout(*of).is_some();
    for operand in all_operands().filter(|of| !passed_by(of)) {
        let optional = Operand::GRADIENTS.contains(&operand) && operands.get(operand).is_none();
        let wanted = problem.layout(operand).is_some() && !optional;
        let Some(slice) = operand.brought(wanted, operands.get(operand))? else { continue };
        check_window(operand, slice, window(problem, operand, caps), caps)?;
    }
    // In whatever dispatches they are: a later one must not find an input overwritten by an earlier output.
    for output in Operand::GRADIENTS {
        let place = |operand| Some((operands.get(operand)?, window(problem, operand, caps)));
        let Some(written) = place(output) else { continue };
        let others = all_operands().filter(|&other| other != output);
        for (with, other) in others.filter_map(|other| Some((other, place(other)?))) {
            let packed =
                || Operand::GRADIENTS.contains(&with) && are_packed(problem, operands, [output, with]);
            if encode::meet(written, other) && !packed() {
                return Err(Error::Aliased { operand: output, with });
            }
        }
    }
    Ok(())
}

/// Whether two gradients lie in one slice without a place in common, as those of a packed projection do: each is
/// written by dispatches of its own.
fn are_packed(problem: &BackwardProblem, operands: &BackwardOperands<'_>, [a, b]: [Operand; 2]) -> bool {
    let (Some(a_slice), Some(b_slice)) = (operands.get(a), operands.get(b)) else { return false };
    let (Some(a_layout), Some(b_layout)) = (problem.layout(a), problem.layout(b)) else { return false };
    a_slice.offset() == b_slice.offset()
        && problem.dtype(a).bytes() == problem.dtype(b).bytes()
        && !a_layout.meets(problem.shape(a), &b_layout, problem.shape(b))
}

/// What one dispatch cannot bind beside its output.
fn check_clashes(
    kernel: &Backward,
    problem: &BackwardProblem,
    operands: &BackwardOperands<'_>,
    caps: &Caps,
) -> Result<()> {
    let used = kernel.storage().into_iter().filter_map(|(slot, writes)| match slot {
        Slot::Operand(operand) if problem.extent(operand) > 0 => {
            Some((operand, operands.get(operand)?, window(problem, operand, caps), writes))
        }
        _ => None,
    });
    encode::check_aliases(&used.collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;
    use crate::layout::Layout;
    use crate::problem::{AttentionProblem, Bias};

    /// Owners and rows of every chunk.
    fn cover(problem: &BackwardProblem, caps: &Caps) {
        let families = [Some(Family::FusedTile), Some(Family::FusedRow)];
        for (makes, family) in problem.gradients().flat_map(|makes| families.map(|family| (makes, family))) {
            let kernel = Backward::new(makes, problem, family, caps);
            let chunks = chunks(&kernel, problem, caps);
            assert!(chunks.of_owners > 0 && chunks.of_rows > 0);
            // Chunks of less than an owner are whole tiles.
            let tile = u64::from(kernel.form.own_rows());
            assert!(
                chunks.of_rows == chunks.rows || chunks.of_owners == 1 && chunks.of_rows.is_multiple_of(tile)
            );
            assert!(chunks.carried <= DEFAULT_BUDGET, "{} bytes", chunks.carried);
            assert_eq!(chunks.carried > 0, kernel.parts);
        }
    }

    #[test]
    fn chunks_are_whole_owners_or_whole_tiles_inside_the_budget() {
        for device_type in [wgpu::DeviceType::Cpu, wgpu::DeviceType::DiscreteGpu] {
            let caps = Caps { device_type, ..Caps::minimal() };
            for (batch, heads, seq_q, seq_kv, dim) in [
                (1, 1, 1, 1, 1),
                (3, 8, 500, 700, 64),
                (100, 64, 50, 70, 64),
                (1, 32, 8192, 8192, 128),
                (1, 1, 1 << 18, 1 << 18, 64),
                (2, 2, 3, 1 << 20, 512),
                (2, 2, 1 << 20, 3, 512),
            ] {
                let attention = AttentionProblem::new(batch, heads, heads, seq_q, seq_kv, dim, dim);
                let bias = (seq_q * seq_kv < 1 << 24)
                    .then(|| Bias { dtype: Dtype::F32, layout: Layout::broadcast([1, 1, seq_q, seq_kv]) });
                let attention = AttentionProblem { bias, sinks: true, ..attention };
                cover(&BackwardProblem::of(&attention), &caps);
            }
        }
    }
}
