//! From a linear map and buffers to one dispatch: everything that can fail happens before it is recorded.

use super::kernel::Linear;
use super::params::LinearParams;
use super::{LinearProblem, OPERANDS};
use crate::attention::{Attention, Shared};
use crate::caps::Caps;
use crate::encode::{Bound, Prepared, check_aliases, check_window, one_dispatch};
use crate::error::{Error, Operand, Result};
use crate::pipeline::Recipe;
use crate::plan::Window;

/// The buffers of one linear map, laid out as the [`LinearProblem`] says. All need `STORAGE` usage.
///
/// They may be pieces of one buffer, as [`Operands`](crate::Operands) has it. Linear maps that follow each other may
/// write into different places of one.
#[derive(Clone, Copy, Debug)]
pub struct LinearOperands<'a> {
    /// What is mapped.
    pub x: wgpu::BufferSlice<'a>,
    /// The weights.
    pub w: wgpu::BufferSlice<'a>,
    /// What is added, if the problem says so.
    pub bias: Option<wgpu::BufferSlice<'a>>,
    /// The output.
    pub y: wgpu::BufferSlice<'a>,
}

impl<'a> LinearOperands<'a> {
    /// Those that every problem has.
    pub fn new(x: wgpu::BufferSlice<'a>, w: wgpu::BufferSlice<'a>, y: wgpu::BufferSlice<'a>) -> Self {
        Self { x, w, bias: None, y }
    }

    fn get(&self, operand: Operand) -> Option<wgpu::BufferSlice<'a>> {
        match operand {
            Operand::X => Some(self.x),
            Operand::W => Some(self.w),
            Operand::Bias => self.bias,
            Operand::Y => Some(self.y),
            _ => None,
        }
    }
}

impl Attention {
    /// Records a linear map, in a compute pass of its own. Submits nothing.
    ///
    /// ```no_run
    /// use wgpu_attention::{Attention, Dtype, Layout, LinearOperands, LinearProblem};
    /// # fn f(attention: &Attention, encoder: &mut wgpu::CommandEncoder, b: [wgpu::BufferSlice<'_>; 5])
    /// # -> wgpu_attention::Result<()> {
    /// # let [x, w_q, w_k, b_k, qk] = b;
    /// // Queries and keys of 128 tokens, side by side in rows of 1280.
    /// let to_q = LinearProblem { y: Layout::rows(1280), ..LinearProblem::new(128, 1024, 1024) };
    /// let to_k = LinearProblem { y: Layout::rows(1280).at(1024), ..LinearProblem::new(128, 1024, 256) };
    /// attention.encode_linear(encoder, &to_q, &LinearOperands::new(x, w_q, qk))?;
    /// let operands = LinearOperands { bias: Some(b_k), ..LinearOperands::new(x, w_k, qk) };
    /// attention.encode_linear(encoder, &to_k.with_bias(Dtype::F32), &operands)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of [`LinearProblem::validate`]; [`Error::KernelUnfit`] for a forced kernel that the device cannot
    /// run; [`Error::MissingOperand`], [`Error::UnexpectedOperand`], [`Error::BufferUsage`],
    /// [`Error::OutOfBounds`], [`Error::Misaligned`] and [`Error::Aliased`]; [`Error::LimitExceeded`] where the device
    /// cannot bind as much; [`Error::OutOfMemory`], [`Error::Driver`] and [`Error::DeviceLost`]. Then nothing has been
    /// recorded.
    pub fn encode_linear(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        problem: &LinearProblem,
        operands: &LinearOperands<'_>,
    ) -> Result<()> {
        self.prepare_linear(problem, operands)?.encode(encoder);
        Ok(())
    }

    /// All of [`Attention::encode_linear`] but the recording: for maps that are made again and again on the
    /// same buffers, or [before](Prepared::then) the attention that reads them, or in a pass of the caller's.
    ///
    /// # Errors
    /// Those of [`Attention::encode_linear`].
    pub fn prepare_linear(&self, problem: &LinearProblem, operands: &LinearOperands<'_>) -> Result<Prepared> {
        prepare(&self.shared, problem, operands)
    }
}

fn prepare(shared: &Shared, problem: &LinearProblem, operands: &LinearOperands<'_>) -> Result<Prepared> {
    let caps = &shared.caps;
    problem.validate()?;
    let kernel = Linear::new(problem, caps);
    if let Some(why) = kernel.unfit(caps) {
        return Err(Error::KernelUnfit { kernel: kernel.name().into(), why });
    }
    let window = |operand: Operand| match problem.layout(operand) {
        Some((layout, dtype)) => Window::of(layout, problem.shape(operand), dtype.bytes(), caps),
        None => Window { start: 0, end: 0 },
    };
    check(problem, operands, window, caps)?;
    if problem.rows == 0 {
        return Ok(Prepared::default());
    }
    let used = kernel
        .storage()
        .into_iter()
        .filter_map(|(_, operand, writes)| Some((operand, operands.get(operand)?, window(operand), writes)));
    check_aliases(&used.collect::<Vec<_>>())?;
    let count = kernel.groups(problem);
    let first = |operand| {
        let bytes = problem.layout(operand).map_or(1, |(_, dtype)| dtype.bytes() as u64);
        (window(operand).start / bytes) as usize
    };
    let params = LinearParams::new(problem, count as u32, first);
    let bound = kernel
        .storage()
        .into_iter()
        .filter_map(|(number, operand, _)| Some(Bound::new(number, operands.get(operand)?, window(operand))));
    let recipe = Recipe::Linear(kernel);
    let ready = one_dispatch(shared, recipe, bytemuck::bytes_of(&params), bound.collect(), count)?;
    Ok(Prepared::new(vec![ready]))
}

/// Every rule about a buffer by itself, and that the device can bind as much of it.
fn check(
    problem: &LinearProblem,
    operands: &LinearOperands<'_>,
    window: impl Fn(Operand) -> Window,
    caps: &Caps,
) -> Result<()> {
    for operand in OPERANDS {
        let wanted = problem.layout(operand).is_some();
        if let Some(buffer) = operand.brought(wanted, operands.get(operand))? {
            check_window(operand, buffer, window(operand), caps)?;
        }
    }
    Ok(())
}
