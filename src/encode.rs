//! From a plan and buffers to recorded dispatches: everything that can fail happens before the
//! first command.

use std::sync::{Arc, PoisonError};

use crate::attention::{Operands, Shared};
use crate::blueprint::Blueprint;
use crate::caps::Caps;
use crate::error::{Error, Operand, Result};
use crate::params::Params;
use crate::pipeline::{Opened, Pipeline, Recipe};
use crate::plan::{Dispatch, Plan, Window, fold};
use crate::scope::scoped;
use crate::scratch::Scratch;
use crate::slot::{Binding, Slot};

/// Recorded work of this crate with all that it binds, to be encoded as often as one likes: steps of
/// generation differ in what the buffers hold, and not in what is dispatched.
///
/// It keeps the buffers alive. Lengths and positions that lie on the GPU are read anew by each run.
///
/// ```no_run
/// # fn f(attention: &wgpu_attention::Attention, plan: &wgpu_attention::Plan,
/// #      operands: &wgpu_attention::Operands<'_>) -> wgpu_attention::Result<()> {
/// let step = attention.prepare(plan, operands)?;
/// for _ in 0..64 {
///     let mut encoder = attention.device().create_command_encoder(&Default::default());
///     // ... the model's own kernels, which write q, k and v ...
///     step.encode(&mut encoder);
///     attention.queue().submit([encoder.finish()]);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct Prepared {
    dispatches: Vec<Ready>,
}

/// A dispatch that needs nothing more.
#[derive(Clone, Debug)]
pub(crate) struct Ready {
    pub(crate) pipeline: Arc<Pipeline>,
    pub(crate) bind_group: wgpu::BindGroup,
    /// Where its uniform block begins, in bytes.
    pub(crate) params_at: u32,
    pub(crate) groups: Groups,
}

/// How many workgroups a dispatch has.
#[derive(Clone, Debug)]
pub(crate) enum Groups {
    Known([u32; 3]),
    /// As the first three words of a buffer say.
    Counted(wgpu::Buffer),
}

impl Prepared {
    pub(crate) fn new(dispatches: Vec<Ready>) -> Self {
        Self { dispatches }
    }

    /// This work, and `next` after it.
    #[must_use]
    pub fn then(mut self, next: Self) -> Self {
        self.dispatches.extend(next.dispatches);
        self
    }

    /// The same work in pieces of at most so many dispatches (at least one each), for command buffers or submissions
    /// of their own, in this order: no dispatch takes long ([`Plan`]), but some systems' watchdogs time all that is
    /// submitted together.
    ///
    /// Scratch memory is shared by all calls of an [`Attention`](crate::Attention). Between the submissions of two
    /// pieces nothing else of it may be submitted, by no thread: it could write over what the first piece left for the
    /// second.
    ///
    /// ```no_run
    /// # fn f(attention: &wgpu_attention::Attention, plan: &wgpu_attention::Plan,
    /// #      operands: &wgpu_attention::Operands<'_>) -> wgpu_attention::Result<()> {
    /// for piece in attention.prepare(plan, operands)?.split(4) {
    ///     let mut encoder = attention.device().create_command_encoder(&Default::default());
    ///     piece.encode(&mut encoder);
    ///     attention.queue().submit([encoder.finish()]);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn split(self, dispatches: usize) -> Vec<Self> {
        self.dispatches.chunks(dispatches.max(1)).map(|some| Self::new(some.to_vec())).collect()
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.dispatches.is_empty()
    }

    /// How many dispatches it records.
    pub fn dispatches(&self) -> usize {
        self.dispatches.len()
    }

    /// Records into a compute pass of its own. Submits nothing.
    pub fn encode(&self, encoder: &mut wgpu::CommandEncoder) {
        if self.is_empty() {
            return;
        }
        self.encode_in_pass(&mut encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some("attention"),
            timestamp_writes: None,
        }));
    }

    /// Records into a pass that the caller has begun. Leaves its pipeline and bind group 0 set.
    pub fn encode_in_pass(&self, pass: &mut wgpu::ComputePass<'_>) {
        for ready in &self.dispatches {
            pass.set_pipeline(&ready.pipeline.pipeline);
            pass.set_bind_group(0, &ready.bind_group, &[ready.params_at]);
            match &ready.groups {
                &Groups::Known([x, y, z]) => pass.dispatch_workgroups(x, y, z),
                Groups::Counted(buffer) => pass.dispatch_workgroups_indirect(buffer, 0),
            }
        }
    }
}

/// A plan's pipelines, in the order of its stages: for these operands, or for operands each in a buffer of its own.
pub(crate) fn pipelines(
    shared: &Shared,
    plan: &Plan,
    operands: Option<&Operands<'_>>,
) -> Result<Vec<Arc<Pipeline>>> {
    let (device, checks) = (&shared.device, shared.options.runtime_checks);
    let get = |stage: &Blueprint| {
        let bound = operands.map_or_else(Vec::new, |operands| brought(plan, stage, operands));
        let bound = bound
            .iter()
            .map(|&(operand, slice, writes)| (Slot::Operand(operand).number(), slice.buffer(), writes));
        shared.pipelines.get(device, Recipe::Attention(*stage), Opened::of(bound), checks)
    };
    plan.stages().iter().map(get).collect()
}

/// The operands with elements that a kernel binds, with the slice of each and whether it is written.
fn brought<'a>(
    plan: &Plan,
    stage: &Blueprint,
    operands: &Operands<'a>,
) -> Vec<(Operand, wgpu::BufferSlice<'a>, bool)> {
    let of = |binding: Binding| match binding.slot {
        Slot::Operand(operand) if plan.problem().extent(operand) > 0 => {
            Some((operand, operands.get(operand)?, binding.writes))
        }
        _ => None,
    };
    stage.bindings().into_iter().filter_map(of).collect()
}

/// Whether a plan was made for this device.
pub(crate) fn check_plan(shared: &Shared, plan: &Plan) -> Result<()> {
    if plan.caps() == &shared.caps {
        return Ok(());
    }
    let [plan, device] = plan.caps().difference(&shared.caps);
    Err(Error::ForeignPlan { plan, device })
}

pub(crate) fn prepare(shared: &Shared, plan: &Plan, operands: &Operands<'_>) -> Result<Prepared> {
    check_plan(shared, plan)?;
    let in_one = check(plan, operands)?;
    let dispatches: Vec<_> = plan.dispatches().collect();
    let step = plan.params_step();
    if dispatches.is_empty() {
        return Ok(Prepared::default());
    }
    let pipelines = pipelines(shared, plan, Some(operands).filter(|_| in_one))?;

    let mut params = vec![0; plan.blocks() * step as usize];
    for (index, block) in params.chunks_exact_mut(step as usize).enumerate() {
        block[..size_of::<Params>()].copy_from_slice(bytemuck::bytes_of(&plan.params(index)));
    }
    let mut scratch = shared.scratch.lock().unwrap_or_else(PoisonError::into_inner);
    let made = scoped(&shared.device, "scratch memory and bind groups", || {
        let params = scratch.params(&shared.device, params);
        plan.stages()
            .iter()
            .zip(&pipelines)
            .map(|(stage, pipeline)| {
                bind(&shared.device, plan, stage, pipeline, operands, &params, &mut scratch)
            })
            .collect::<Vec<_>>()
    });
    let groups = made.inspect_err(|_| scratch.clear())?;
    let launch = dispatches.iter().any(|dispatch| dispatch.indirect).then(|| {
        // It is there already: the kernel that writes it has been bound.
        scratch.buffer(&shared.device, Slot::Launch, plan.scratch_of(Slot::Launch))
    });
    let ready = |dispatch: &Dispatch| Ready {
        pipeline: Arc::clone(&pipelines[dispatch.stage]),
        bind_group: groups[dispatch.stage].clone(),
        params_at: dispatch.block as u32 * step,
        groups: match &launch {
            Some(buffer) if dispatch.indirect => Groups::Counted(buffer.clone()),
            _ => Groups::Known(dispatch.groups),
        },
    };
    Ok(Prepared::new(dispatches.iter().map(ready).collect()))
}

/// A buffer of a bind group: its number, and the bytes that are bound.
pub(crate) struct Bound {
    pub(crate) number: u32,
    pub(crate) buffer: wgpu::Buffer,
    pub(crate) window: Window,
}

impl Bound {
    /// Of a window of a slice.
    pub(crate) fn new(number: u32, slice: wgpu::BufferSlice<'_>, window: Window) -> Self {
        Self { number, buffer: slice.buffer().clone(), window: window.behind(slice.offset()) }
    }
}

/// A bind group of these buffers.
fn bind_group(device: &wgpu::Device, name: &str, pipeline: &Pipeline, bound: &[Bound]) -> wgpu::BindGroup {
    let entries: Vec<_> = bound
        .iter()
        .map(|bound| wgpu::BindGroupEntry {
            binding: bound.number,
            resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                buffer: &bound.buffer,
                offset: bound.window.start,
                size: wgpu::BufferSize::new(bound.window.end - bound.window.start),
            }),
        })
        .collect();
    device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: Some(name),
        layout: &pipeline.layout,
        entries: &entries,
    })
}

/// A piece of a caller's buffer, and what of it is bound.
pub(crate) type Place<'a> = (wgpu::BufferSlice<'a>, Window);

/// Whether two of them have a byte of one buffer in common.
pub(crate) fn meet(a: Place<'_>, b: Place<'_>) -> bool {
    a.0.buffer() == b.0.buffer() && a.1.behind(a.0.offset()).meets(b.1.behind(b.0.offset()))
}

/// Whether one dispatch cannot write to one of them and have the other. In browsers what is written has its buffer for
/// itself, since a compiler there takes nothing that is bound as written for uniform, and so no length: barriers behind
/// it would be refused.
pub(crate) fn clash(a: Place<'_>, b: Place<'_>) -> bool {
    if cfg!(target_arch = "wasm32") { a.0.buffer() == b.0.buffer() } else { meet(a, b) }
}

/// Whether a piece of a caller's buffer may be bound: its usage, where it begins, and that it holds what the window needs.
fn check_slice(operand: Operand, slice: wgpu::BufferSlice<'_>, need: u64, caps: &Caps) -> Result<()> {
    let got = slice.buffer().usage();
    if !got.contains(wgpu::BufferUsages::STORAGE) {
        return Err(Error::BufferUsage { operand, need: wgpu::BufferUsages::STORAGE, got });
    }
    let align = u64::from(caps.storage_alignment).max(4);
    if !slice.offset().is_multiple_of(align) {
        return Err(Error::Misaligned { operand, need: align, got: slice.offset() });
    }
    if need > slice.size() {
        let (unit, container) = ("bytes", "buffer");
        return Err(Error::OutOfBounds { operand, need, got: slice.size(), unit, container });
    }
    Ok(())
}

/// [`check_slice`] of a window, and that the device can bind as much.
pub(crate) fn check_window(
    operand: Operand,
    slice: wgpu::BufferSlice<'_>,
    window: Window,
    caps: &Caps,
) -> Result<()> {
    check_slice(operand, slice, window.end, caps)?;
    let what = || format!("{operand}: bytes of one storage binding");
    within(what, window.end - window.start, caps.max_storage_binding)
}

/// Whether a device allows what is needed.
pub(crate) fn within(what: impl FnOnce() -> String, need: u64, got: u64) -> Result<()> {
    if need > got { Err(Error::LimitExceeded { what: what(), need, got }) } else { Ok(()) }
}

/// A kernel's one dispatch of `groups` workgroups, compiled and bound: `params` is its uniform block, and
/// `bound` the rest.
pub(crate) fn one_dispatch(
    shared: &Shared,
    recipe: Recipe,
    params: &[u8],
    bound: Vec<Bound>,
    groups: u64,
) -> Result<Ready> {
    let mut all = dispatches(shared, recipe, &[(params, groups)], bound)?;
    Ok(all.remove(0))
}

/// A kernel's dispatches over the same buffers, each with a uniform block of its own and so many workgroups.
pub(crate) fn dispatches(
    shared: &Shared,
    recipe: Recipe,
    blocks: &[(&[u8], u64)],
    mut bound: Vec<Bound>,
) -> Result<Vec<Ready>> {
    let (device, caps) = (&shared.device, &shared.caps);
    let bytes = blocks.first().map_or(0, |(block, _)| block.len());
    let step =
        if blocks.len() > 1 { bytes.next_multiple_of(caps.uniform_alignment.max(4) as usize) } else { bytes };
    // Dynamic offsets of uniform blocks are u32.
    let most = caps.max_buffer.min(u64::from(u32::MAX));
    within(|| "bytes of uniform blocks for so many chunks".into(), (blocks.len() * step) as u64, most)?;
    let mut params = vec![0; blocks.len() * step];
    let mut groups = Vec::with_capacity(blocks.len());
    for (to, (block, workgroups)) in params.chunks_exact_mut(step.max(1)).zip(blocks) {
        to[..bytes].copy_from_slice(block);
        let folded = fold(*workgroups, caps.max_dispatch);
        within(|| "workgroups along z".into(), folded[2].into(), caps.max_dispatch.into())?;
        groups.push(folded);
    }
    let storage = recipe.storage();
    let used = bound
        .iter()
        .filter(|bound| bound.window.end > bound.window.start)
        .map(|bound| (bound.number, &bound.buffer, storage.contains(&(bound.number, true))));
    let opened = Opened::of(used);
    let pipeline = shared.pipelines.get(device, recipe, opened, shared.options.runtime_checks)?;
    let mut scratch = shared.scratch.lock().unwrap_or_else(PoisonError::into_inner);
    let made = scoped(device, &format!("the bind group of {}", recipe.name()), || {
        let whole = |bytes: usize| Window { start: 0, end: bytes as u64 };
        bound.push(Bound { number: 0, buffer: scratch.params(device, params), window: whole(bytes) });
        // An operand without elements could not be bound.
        for bound in bound.iter_mut().filter(|bound| bound.window.end == bound.window.start) {
            (bound.buffer, bound.window) = (scratch.empty(device), whole(16));
        }
        bind_group(device, recipe.name(), &pipeline, &bound)
    });
    let bind_group = made.inspect_err(|_| scratch.clear())?;
    let ready = |(at, groups)| Ready {
        pipeline: Arc::clone(&pipeline),
        bind_group: bind_group.clone(),
        params_at: (at * step) as u32,
        groups: Groups::Known(groups),
    };
    Ok(groups.into_iter().enumerate().map(ready).collect())
}

/// A scratch buffer of one kind, of at least so many bytes; `what` it is for.
pub(crate) fn scratch_buffer(shared: &Shared, slot: Slot, bytes: u64, what: &str) -> Result<wgpu::Buffer> {
    within(|| format!("scratch: bytes {what}"), bytes, shared.caps.max_buffer)?;
    let mut scratch = shared.scratch.lock().unwrap_or_else(PoisonError::into_inner);
    scoped(&shared.device, &format!("scratch memory {what}"), || scratch.buffer(&shared.device, slot, bytes))
        .inspect_err(|_| scratch.clear())
}

fn bind(
    device: &wgpu::Device,
    plan: &Plan,
    stage: &Blueprint,
    pipeline: &Pipeline,
    operands: &Operands<'_>,
    params: &wgpu::Buffer,
    scratch: &mut Scratch,
) -> wgpu::BindGroup {
    let buffers: Vec<_> = stage
        .bindings()
        .iter()
        .map(|binding| {
            let whole = |bytes| Window { start: 0, end: bytes };
            let (buffer, window) = match binding.slot {
                Slot::Params => (params.clone(), whole(size_of::<Params>() as u64)),
                Slot::Operand(operand) => {
                    let window = plan.window(operand);
                    match operands.get(operand).filter(|_| window.end > window.start) {
                        Some(slice) => (slice.buffer().clone(), window.behind(slice.offset())),
                        None => (scratch.empty(device), whole(16)),
                    }
                }
                slot => {
                    let bytes = plan.scratch_of(slot);
                    (scratch.buffer(device, slot, bytes), whole(bytes))
                }
            };
            Bound { number: binding.slot.number(), buffer, window }
        })
        .collect();
    bind_group(device, stage.kernel.name(), pipeline, &buffers)
}

/// Every rule about the caller's buffers; gives whether an output shares one with anything.
fn check(plan: &Plan, operands: &Operands<'_>) -> Result<bool> {
    use Operand::*;
    let problem = plan.problem();
    for &operand in Operand::ALL {
        let wanted = problem.layout(operand).is_some();
        let Some(slice) = operand.brought(wanted, operands.get(operand))? else { continue };
        check_slice(operand, slice, plan.window(operand).end, plan.caps())?;
    }
    // In whatever dispatches they are: a later one must not find an input overwritten by an earlier output.
    let mut in_one = false;
    for output in [O, Lse, Weights, Status] {
        let Some(written) = operands.get(output) else { continue };
        for other in Operand::ALL.iter().copied().filter(|&other| other != output) {
            let same = operands.get(other).filter(|slice| slice.buffer() == written.buffer());
            let Some(slice) = same else { continue };
            if meet((written, plan.window(output)), (slice, plan.window(other))) {
                return Err(Error::Aliased { operand: output, with: other });
            }
            in_one = true;
        }
    }
    // Natively that is all.
    for stage in plan.stages().iter().filter(|_| in_one && cfg!(target_arch = "wasm32")) {
        let used = brought(plan, stage, operands);
        let used =
            used.iter().map(|&(operand, slice, writes)| (operand, slice, plan.window(operand), writes));
        check_aliases(&used.collect::<Vec<_>>())?;
    }
    Ok(in_one)
}

/// Whether a dispatch can bind its operands, by the window of each and whether it is written.
pub(crate) fn check_aliases(used: &[(Operand, wgpu::BufferSlice<'_>, Window, bool)]) -> Result<()> {
    for (at, &(operand, slice, window, _)) in used.iter().enumerate().filter(|(_, used)| used.3) {
        let mut others = used[..at].iter().chain(&used[at + 1..]);
        if let Some(&(with, ..)) = others.find(|other| clash((slice, window), (other.1, other.2))) {
            return Err(Error::Aliased { operand, with });
        }
    }
    Ok(())
}
