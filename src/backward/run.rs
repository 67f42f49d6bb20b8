//! Gradients from slices to vectors.

use super::encode::prepare;
use super::{BackwardOperands, BackwardProblem};
use crate::attention::Attention;
use crate::dtype::{Tensor, TensorRef};
use crate::error::{Operand, Result};
use crate::family::Family;
use crate::host::Inputs;
use crate::readback::{Wait, read_buffers};
use crate::run::Uploaded;
use crate::scope::scoped;

/// What [`Attention::run_backward`] gives: each gradient laid out as the problem says and as long as that layout
/// reaches; places between its elements are 0.
#[derive(Clone, Debug, PartialEq)]
pub struct BackwardOutputs {
    /// The gradient by q.
    pub dq: Tensor,
    /// The gradient by k.
    pub dk: Tensor,
    /// The gradient by v.
    pub dv: Tensor,
    /// The gradient by bias; `None` where the problem has none.
    pub dbias: Option<Tensor>,
    /// The gradient by the sinks; `None` where there are none.
    pub dsinks: Option<Tensor>,
}

impl BackwardOutputs {
    /// A gradient by its name.
    pub fn get(&self, gradient: Operand) -> Option<&Tensor> {
        match gradient {
            Operand::Dq => Some(&self.dq),
            Operand::Dk => Some(&self.dk),
            Operand::Dv => Some(&self.dv),
            Operand::Dbias => self.dbias.as_ref(),
            Operand::Dsinks => self.dsinks.as_ref(),
            _ => None,
        }
    }
}

impl Attention {
    /// Forward and backward pass from slices to vectors: plans, uploads, runs and reads back.
    ///
    /// ```no_run
    /// # async fn f() -> wgpu_attention::Result<()> {
    /// use wgpu_attention::{Attention, AttentionProblem, BackwardProblem, DeviceRequest, Inputs};
    /// let attention = Attention::request(&DeviceRequest::default()).await?;
    /// let x = vec![0.5_f32; 8 * 128 * 64];
    /// let problem = BackwardProblem::of(&AttentionProblem::new(1, 8, 8, 128, 128, 64, 64));
    /// let inputs = Inputs::new(&x[..], &x[..], &x[..]);
    /// let gradients = attention.run_backward(&problem, &inputs, &x[..]).await?;
    /// assert_eq!(gradients.dk.to_f32().len(), x.len());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of [`Attention::run`] and [`Attention::encode_backward`].
    pub async fn run_backward<'a>(
        &self,
        problem: &BackwardProblem,
        inputs: &Inputs<'_>,
        dout: impl Into<TensorRef<'a>>,
    ) -> Result<BackwardOutputs> {
        self.run_backward_waiting(problem, inputs, dout.into(), None, Wait::Elsewhere).await
    }

    /// [`Attention::run_backward`] by kernels of the caller's choice, as [`Attention::prepare_backward_with`] has it.
    ///
    /// # Errors
    /// Those of [`Attention::run_backward`], and [`Error::KernelUnfit`](crate::Error::KernelUnfit).
    pub async fn run_backward_with<'a>(
        &self,
        problem: &BackwardProblem,
        inputs: &Inputs<'_>,
        dout: impl Into<TensorRef<'a>>,
        family: Family,
    ) -> Result<BackwardOutputs> {
        self.run_backward_waiting(problem, inputs, dout.into(), Some(family), Wait::Elsewhere).await
    }

    /// [`Attention::run_backward`] for a thread that may block.
    ///
    /// # Errors
    /// Those of [`Attention::run_backward`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn run_backward_blocking<'a>(
        &self,
        problem: &BackwardProblem,
        inputs: &Inputs<'_>,
        dout: impl Into<TensorRef<'a>>,
    ) -> Result<BackwardOutputs> {
        pollster::block_on(self.run_backward_waiting(problem, inputs, dout.into(), None, Wait::Here))
    }

    async fn run_backward_waiting(
        &self,
        problem: &BackwardProblem,
        inputs: &Inputs<'_>,
        dout: TensorRef<'_>,
        family: Option<Family>,
        wait: Wait,
    ) -> Result<BackwardOutputs> {
        problem.check(inputs, dout)?;
        let forward = problem.forward();
        let plan = self.plan(&forward)?;
        let buffers = Uploaded::new(self, &forward, inputs)?;
        let bytes = |operand| problem.extent(operand) as usize * problem.dtype(operand).bytes();
        let (dout, outputs) = scoped(self.device(), "operand memory", || {
            let outputs =
                Operand::GRADIENTS.map(|operand| self.target(operand, problem.buffer_bytes(operand)));
            (self.upload(Operand::Dout, dout.bytes()), outputs)
        })?;
        let operands = buffers.operands();
        let mut backward = BackwardOperands::new(operands, dout.slice(..));
        for (operand, buffer) in Operand::GRADIENTS.into_iter().zip(&outputs) {
            backward.set(operand, problem.layout(operand).map(|_| buffer.slice(..)));
        }
        let gradients = prepare(&self.shared, problem, &backward, family)?;
        let prepared = self.prepare(&plan, &operands)?.then(gradients);
        let ranges = outputs.each_ref().map(|buffer| (buffer, 0..buffer.size()));
        let read = read_buffers(self.device(), self.queue(), &ranges, self.commands(prepared), wait).await?;
        let mut read = read.into_iter();
        let [dq, dk, dv, dbias, dsinks] = Operand::GRADIENTS.map(|operand| {
            let all = read.next().unwrap_or_default();
            Tensor::from_bytes(problem.dtype(operand), &all[..bytes(operand)])
        });
        let there = |operand, tensor| problem.layout(operand).map(|_| tensor);
        let (dbias, dsinks) = (there(Operand::Dbias, dbias), there(Operand::Dsinks, dsinks));
        Ok(BackwardOutputs { dq, dk, dv, dbias, dsinks })
    }
}
