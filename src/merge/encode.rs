//! From a merge and buffers to one dispatch: everything that can fail happens before it is recorded.

use super::MergeProblem;
use super::kernel::{Binding, LANES, MergeParams, MergeStates};
use crate::attention::{Attention, Shared};
use crate::caps::Caps;
use crate::encode::{self, Bound, Prepared, check_window, one_dispatch, within};
use crate::error::{Error, Operand, Result};
use crate::pipeline::Recipe;
use crate::plan::Window;

/// The buffers of one merge, laid out as the [`MergeProblem`] says. All need `STORAGE` usage.
///
/// They may be pieces of one buffer, as [`Operands`](crate::Operands) has it: parts may even be the same.
#[derive(Clone, Copy, Debug)]
pub struct MergeOperands<'a> {
    /// o and lse for each entry of [`MergeProblem::partials`].
    pub partials: &'a [(wgpu::BufferSlice<'a>, wgpu::BufferSlice<'a>)],
    /// The output.
    pub o: wgpu::BufferSlice<'a>,
    /// Receives the logarithms of the denominators, if the problem asks for them.
    pub lse: Option<wgpu::BufferSlice<'a>>,
}

impl Attention {
    /// Records a merge of partial results, in a compute pass of its own. Submits nothing.
    ///
    /// ```no_run
    /// use wgpu_attention::{
    ///     Align, Attention, AttentionProblem, MergeOperands, MergeProblem, Operands, Partials,
    /// };
    /// # fn f(attention: &Attention, encoder: &mut wgpu::CommandEncoder, b: [wgpu::BufferSlice<'_>; 10])
    /// # -> wgpu_attention::Result<()> {
    /// # let [q, cache_k, cache_v, chunk_k, chunk_v, o_cache, lse_cache, o_chunk, lse_chunk, o] = b;
    /// // A chunk of 256 tokens against the 4096 before it, and causally against itself.
    /// let cache = AttentionProblem { lse: true, ..AttentionProblem::new(1, 32, 8, 256, 4096, 128, 128) };
    /// let chunk = AttentionProblem {
    ///     causal: Some(Align::TopLeft),
    ///     lse: true,
    ///     ..AttentionProblem::new(1, 32, 8, 256, 256, 128, 128)
    /// };
    /// let operands = Operands { lse: Some(lse_cache), ..Operands::new(q, cache_k, cache_v, o_cache) };
    /// attention.encode(encoder, &attention.plan(&cache)?, &operands)?;
    /// let operands = Operands { lse: Some(lse_chunk), ..Operands::new(q, chunk_k, chunk_v, o_chunk) };
    /// attention.encode(encoder, &attention.plan(&chunk)?, &operands)?;
    ///
    /// let merge = MergeProblem::new(vec![Partials::of(&cache), Partials::of(&chunk)], 1, 32, 256, 128);
    /// let partials = [(o_cache, lse_cache), (o_chunk, lse_chunk)];
    /// attention.merge_states(encoder, &merge, &MergeOperands { partials: &partials, o, lse: None })?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of [`MergeProblem::validate`]; [`Error::LimitExceeded`] where the device cannot bind as much;
    /// [`Error::MissingOperand`], [`Error::UnexpectedOperand`], [`Error::BufferUsage`],
    /// [`Error::OutOfBounds`], [`Error::Misaligned`] and [`Error::Aliased`], inside an [`Error::Partials`] where they are about
    /// the parts (an output that lies over a part is named first, then what of the part);
    /// [`Error::OutOfMemory`], [`Error::Driver`] and [`Error::DeviceLost`]. Then nothing has been recorded.
    pub fn merge_states(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        problem: &MergeProblem,
        operands: &MergeOperands<'_>,
    ) -> Result<()> {
        self.prepare_merge(problem, operands)?.encode(encoder);
        Ok(())
    }

    /// All of [`Attention::merge_states`] but the recording: for merges that are made again and again on the
    /// same buffers, or [after](Prepared::then) the attention that they merge, or in a pass of the caller's.
    ///
    /// # Errors
    /// Those of [`Attention::merge_states`].
    pub fn prepare_merge(&self, problem: &MergeProblem, operands: &MergeOperands<'_>) -> Result<Prepared> {
        prepare(&self.shared, problem, operands)
    }
}

/// A binding with the caller's buffer and the part of it that is bound.
struct Brought<'a> {
    of: Binding,
    buffer: wgpu::BufferSlice<'a>,
    window: Window,
}

fn prepare(shared: &Shared, problem: &MergeProblem, operands: &MergeOperands<'_>) -> Result<Prepared> {
    let caps = &shared.caps;
    problem.validate()?;
    let kernel = MergeStates::new(problem, caps);
    let bound = bound(&kernel, problem, operands, caps)?;
    check(&bound, caps)?;
    if problem.rows() == 0 {
        return Ok(Prepared::default());
    }
    check_aliases(&bound)?;
    // Fits a u32: o's elements are no more than that, and all of them in different places.
    let quads = problem.rows() as u64 * (problem.head_dim_v as u64).div_ceil(4);
    let count = quads.div_ceil(LANES.into());
    let first = |partial, operand| {
        let found = bound.iter().find(|b| (b.of.partial, b.of.operand) == (partial, operand));
        found.map_or(0, |b| (b.window.start / bytes(problem, b.of) as u64) as usize)
    };
    let params = MergeParams::new(problem, count as u32, first);
    let all = bound.iter().map(|b| Bound::new(b.of.number, b.buffer, b.window));
    let recipe = Recipe::MergeStates(kernel);
    let ready = one_dispatch(shared, recipe, bytemuck::bytes_of(&params), all.collect(), count)?;
    Ok(Prepared::new(vec![ready]))
}

/// The kernel's bindings with the buffers that the call brings.
fn bound<'a>(
    kernel: &MergeStates,
    problem: &MergeProblem,
    operands: &MergeOperands<'a>,
    caps: &Caps,
) -> Result<Vec<Brought<'a>>> {
    if operands.partials.len() > problem.partials.len() {
        let error = Error::UnexpectedOperand { operand: Operand::O };
        return Err(error.of_partials(Some(problem.partials.len())));
    }
    if operands.lse.is_some() && !problem.lse {
        return Err(Error::UnexpectedOperand { operand: Operand::Lse });
    }
    kernel
        .storage()
        .into_iter()
        .map(|of| {
            let pair = match of.partial {
                Some(at) => operands.partials.get(at).map(|&(o, lse)| (o, Some(lse))),
                None => Some((operands.o, operands.lse)),
            };
            let buffer = match of.operand {
                Operand::Lse => pair.and_then(|(_, lse)| lse),
                _ => pair.map(|(o, _)| o),
            };
            let missing = Error::MissingOperand { operand: of.operand };
            let buffer = buffer.ok_or_else(|| missing.of_partials(of.partial))?;
            Ok(Brought { of, buffer, window: window(problem, of, caps) })
        })
        .collect()
}

/// Bytes of an element.
fn bytes(problem: &MergeProblem, of: Binding) -> usize {
    match (of.operand, of.partial) {
        (Operand::Lse, _) => 4,
        (_, Some(_)) => problem.dtype.bytes(),
        (_, None) => problem.out_dtype.bytes(),
    }
}

/// The part of a buffer that is bound.
fn window(problem: &MergeProblem, of: Binding, caps: &Caps) -> Window {
    let layout = match (of.partial.and_then(|at| problem.partials.get(at)), of.operand) {
        (Some(partials), Operand::Lse) => Some(partials.lse),
        (Some(partials), _) => Some(partials.o),
        (None, Operand::Lse) => None,
        (None, _) => Some(problem.o),
    };
    let offset = layout.map_or(0, |layout| layout.offset);
    Window::between(offset, problem.extent(of.partial, of.operand), bytes(problem, of), caps)
}

/// What the device can bind, and every rule about a buffer by itself.
fn check(bound: &[Brought<'_>], caps: &Caps) -> Result<()> {
    let threads = caps.max_invocations.min(caps.max_workgroup_size[0]);
    within(|| "threads of a workgroup".into(), LANES.into(), threads.into())?;
    let most = caps.max_storage_buffers;
    within(|| "storage buffers of one kernel".into(), bound.len() as u64, most.into())?;
    for b in bound {
        let fits = check_window(b.of.operand, b.buffer, b.window, caps);
        fits.map_err(|error| error.of_partials(b.of.partial))?;
    }
    Ok(())
}

/// What is written lies where no other operand lies.
fn check_aliases(bound: &[Brought<'_>]) -> Result<()> {
    for output in bound.iter().filter(|b| b.of.writes) {
        for other in bound.iter().filter(|b| b.of != output.of) {
            let pair = [output, other].map(|b| (b.of.operand, b.buffer, b.window, b.of.writes));
            encode::check_aliases(&pair).map_err(|error| error.of_partials(other.of.partial))?;
        }
    }
    Ok(())
}
