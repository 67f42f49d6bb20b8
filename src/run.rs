//! One-shot calls: upload, compute, read back.

use crate::attention::{Attention, Operands};
use crate::dtype::Tensor;
use crate::encode::Prepared;
use crate::error::{Operand, Result};
use crate::host::{Inputs, Outputs};
use crate::plan::Plan;
use crate::problem::AttentionProblem;
use crate::readback::{Wait, read_buffers};
use crate::scope::scoped;

/// Dispatches of a command buffer: none takes more than a second on a slow GPU (`DISPATCH_FLOP` of plans), and some
/// watchdogs (macOS's) wait for five of each. All are submitted at once, since other threads' calls use the same scratch
/// memory.
const DISPATCHES_OF_A_BUFFER: usize = 4;

impl Attention {
    /// Computes one problem from slices to vectors: plans, uploads, runs and reads back.
    ///
    /// The first poll compiles what pipelines are not there yet, which wgpu does not do behind an `await`:
    /// [`compile`](Self::compile) does it at a time, or on a thread, of your choice.
    ///
    /// ```no_run
    /// # async fn f() -> wgpu_attention::Result<()> {
    /// use wgpu_attention::{Attention, AttentionProblem, DeviceRequest, Inputs};
    /// let attention = Attention::request(&DeviceRequest::default()).await?;
    /// let x = vec![0.5_f32; 8 * 128 * 64];
    /// let problem = AttentionProblem::new(1, 8, 8, 128, 128, 64, 64);
    /// let outputs = attention.run(&problem, &Inputs::new(&x[..], &x[..], &x[..])).await?;
    /// assert_eq!(outputs.o.to_f32().len(), x.len());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of [`Inputs::check`], [`Plan::new`] and [`Attention::encode`], and
    /// [`Error::DeviceLost`](crate::Error::DeviceLost).
    pub async fn run(&self, problem: &AttentionProblem, inputs: &Inputs<'_>) -> Result<Outputs> {
        inputs.check(problem)?;
        self.run_plan(&self.plan(problem)?, inputs).await
    }

    /// [`Attention::run`] with a plan that is there already.
    ///
    /// # Errors
    /// Those of [`Attention::run`].
    pub async fn run_plan(&self, plan: &Plan, inputs: &Inputs<'_>) -> Result<Outputs> {
        self.run_waiting(plan, inputs, Wait::Elsewhere).await
    }

    /// [`Attention::run`] for a thread that may block.
    ///
    /// # Errors
    /// Those of [`Attention::run`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn run_blocking(&self, problem: &AttentionProblem, inputs: &Inputs<'_>) -> Result<Outputs> {
        inputs.check(problem)?;
        self.run_plan_blocking(&self.plan(problem)?, inputs)
    }

    /// [`Attention::run_plan`] for a thread that may block.
    ///
    /// # Errors
    /// Those of [`Attention::run`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn run_plan_blocking(&self, plan: &Plan, inputs: &Inputs<'_>) -> Result<Outputs> {
        pollster::block_on(self.run_waiting(plan, inputs, Wait::Here))
    }

    async fn run_waiting(&self, plan: &Plan, inputs: &Inputs<'_>, wait: Wait) -> Result<Outputs> {
        let problem = plan.problem();
        inputs.check(problem)?;
        let mut outputs = Outputs::zeros(problem);
        if problem.rows() == 0 {
            return Ok(outputs);
        }
        let buffers = Uploaded::new(self, problem, inputs)?;
        let get = |operand| buffers.get(operand);
        let commands = self.commands(self.prepare(plan, &buffers.operands())?);
        let wanted: Vec<_> = [Operand::O, Operand::Lse, Operand::Weights]
            .into_iter()
            .filter_map(|operand| Some((operand, get(operand)?)))
            .collect();
        let ranges: Vec<_> = wanted.iter().map(|(_, slice)| (slice.buffer(), 0..slice.size())).collect();
        let read = read_buffers(self.device(), self.queue(), &ranges, commands, wait).await?;
        for ((operand, _), bytes) in wanted.into_iter().zip(read) {
            let bytes = &bytes[..problem.extent(operand) as usize * problem.element_bytes(operand)];
            match operand {
                Operand::O => outputs.o = Tensor::from_bytes(problem.out_dtype, bytes),
                Operand::Lse => outputs.lse = Some(bytemuck::pod_collect_to_vec(bytes)),
                _ => outputs.weights = Some(bytemuck::pod_collect_to_vec(bytes)),
            }
        }
        Ok(outputs)
    }

    /// Command buffers of prepared work, short enough for watchdogs that time those.
    pub(crate) fn commands(&self, prepared: Prepared) -> Vec<wgpu::CommandBuffer> {
        let pieces = prepared.split(DISPATCHES_OF_A_BUFFER);
        let commands = pieces.iter().map(|piece| {
            let label = Some("attention run");
            let mut encoder = self.device().create_command_encoder(&wgpu::CommandEncoderDescriptor { label });
            piece.encode(&mut encoder);
            encoder.finish()
        });
        commands.collect()
    }

    /// A new buffer with an operand's bytes.
    pub(crate) fn upload(&self, operand: Operand, bytes: &[u8]) -> wgpu::Buffer {
        let size = bytes.len().next_multiple_of(4).max(4);
        let buffer = self.device().create_buffer(&wgpu::BufferDescriptor {
            label: Some(&operand.to_string()),
            size: size as u64,
            usage: wgpu::BufferUsages::STORAGE,
            mapped_at_creation: true,
        });
        if let Ok(mut view) = buffer.get_mapped_range_mut(..) {
            view.slice(..bytes.len()).copy_from_slice(bytes);
        }
        buffer.unmap();
        buffer
    }

    /// A new buffer that a kernel writes and the host reads.
    pub(crate) fn target(&self, operand: Operand, bytes: u64) -> wgpu::Buffer {
        self.device().create_buffer(&wgpu::BufferDescriptor {
            label: Some(&operand.to_string()),
            size: bytes.next_multiple_of(4).max(4),
            usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: false,
        })
    }
}

/// New buffers of a problem's operands: inputs with their bytes, and outputs that kernels write and the host reads.
pub(crate) struct Uploaded(Vec<(Operand, wgpu::Buffer)>);

impl Uploaded {
    pub(crate) fn new(
        attention: &Attention,
        problem: &AttentionProblem,
        inputs: &Inputs<'_>,
    ) -> Result<Self> {
        let new = |operand| {
            let upload = inputs.get(operand).map(|(_, _, bytes)| attention.upload(operand, bytes));
            (operand, upload.unwrap_or_else(|| attention.target(operand, problem.buffer_bytes(operand))))
        };
        scoped(attention.device(), "operand memory", || Self(problem.operands().map(new).collect()))
    }

    pub(crate) fn get(&self, operand: Operand) -> Option<wgpu::BufferSlice<'_>> {
        let found = self.0.iter().find(|(of, _)| *of == operand);
        found.map(|(_, buffer)| buffer.slice(..))
    }

    pub(crate) fn operands(&self) -> Operands<'_> {
        let get = |operand| self.get(operand);
        let (Some(q), Some(k), Some(v), Some(o)) =
            (get(Operand::Q), get(Operand::K), get(Operand::V), get(Operand::O))
        else {
            unreachable!("every problem has q, k, v and o");
        };
        Operands {
            w: get(Operand::W),
            wq: get(Operand::Wq),
            wk: get(Operand::Wk),
            score_v: get(Operand::ScoreV),
            bias: get(Operand::Bias),
            mask: get(Operand::Mask),
            alibi_slopes: get(Operand::AlibiSlopes),
            sinks: get(Operand::Sinks),
            kv_lens: get(Operand::KvLens),
            block_table: get(Operand::BlockTable),
            cu_seqlens_q: get(Operand::CuSeqlensQ),
            cu_seqlens_k: get(Operand::CuSeqlensK),
            status: get(Operand::Status),
            lse: get(Operand::Lse),
            weights: get(Operand::Weights),
            ..Operands::new(q, k, v, o)
        }
    }
}
