//! Timing one path on one problem, operands in place.

use std::time::Instant;

use wgpu_attention::{
    Attention, AttentionProblem, GpuTimer, Inputs, Operand, Operands, Outputs, Plan, Tensor, cpu,
};

use crate::backend::{self, Backend};
use crate::data::Data;
use crate::failure::{Failure, Result};

/// Times that copies are measured, of which the fastest counts.
const COPY_ROUNDS: usize = 5;
/// Copies of a submission: what it costs to submit and to wait is no part of the copy's rate.
const COPIES: usize = 16;

/// Milliseconds of one iteration.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// From the first encoded command to the end of the work.
    pub(crate) ms: f64,
    /// By timestamps on the device.
    pub(crate) gpu_ms: Option<f64>,
}

/// What was timed.
pub(crate) struct Samples {
    /// The first run, which compiles what no run before has compiled.
    pub(crate) first: Sample,
    pub(crate) rounds: Vec<Sample>,
}

/// One path, ready to run again and again.
pub(crate) enum Runner<'a> {
    /// The oracle or the fast CPU path, with its last output.
    Host(Backend, Option<Outputs>),
    /// A plan and its buffers.
    Device(Box<OnDevice<'a>>),
}

/// Buffers of every operand, filled once.
pub(crate) struct OnDevice<'a> {
    engine: &'a Attention,
    plan: Plan,
    buffers: Vec<(Operand, wgpu::Buffer)>,
    timer: Option<GpuTimer>,
}

impl<'a> Runner<'a> {
    /// Plans and uploads.
    pub(crate) fn new(
        backend: Backend,
        engine: Option<&'a Attention>,
        problem: &AttentionProblem,
        data: &Data,
    ) -> Result<Self> {
        let Some(options) = backend.plan_options() else { return Ok(Self::Host(backend, None)) };
        let engine = engine.ok_or_else(|| Failure::input("no adapter"))?;
        let plan = engine.plan_with(problem, &options)?;
        let buffers = upload(engine, problem, &data.inputs())?;
        let timer = GpuTimer::new(engine.device(), engine.queue());
        Ok(Self::Device(Box::new(OnDevice { engine, plan, buffers, timer })))
    }

    /// One timed iteration.
    pub(crate) fn iterate(&mut self, problem: &AttentionProblem, inputs: &Inputs<'_>) -> Result<Sample> {
        match self {
            Self::Host(backend, outputs) => {
                let start = Instant::now();
                match (backend, outputs) {
                    (Backend::Oracle, outputs) => *outputs = Some(backend::oracle(problem, inputs)?),
                    // Into the same memory each time, as on the device.
                    (_, Some(outputs)) => cpu::attention_into(problem, inputs, outputs)?,
                    (_, outputs) => *outputs = Some(cpu::attention(problem, inputs)?),
                }
                Ok(Sample { ms: milliseconds(start), gpu_ms: None })
            }
            Self::Device(device) => device.iterate(),
        }
    }

    /// The last output.
    pub(crate) fn output(&self, problem: &AttentionProblem) -> Result<Tensor> {
        match self {
            Self::Host(_, Some(outputs)) => Ok(outputs.o.clone()),
            Self::Host(_, None) => Err(Failure::input("nothing was computed")),
            Self::Device(device) => device.output(problem),
        }
    }

    /// Names of the kernels.
    pub(crate) fn kernel(&self) -> String {
        match self {
            Self::Host(Backend::Oracle, _) => "four_passes".into(),
            Self::Host(..) => "online_softmax".into(),
            Self::Device(device) => device.plan.kernels().join("+"),
        }
    }

    /// Device memory besides the operands.
    pub(crate) fn scratch_bytes(&self) -> u64 {
        match self {
            Self::Host(..) => 0,
            Self::Device(device) => device.plan.scratch_bytes(),
        }
    }

    /// What computes.
    pub(crate) fn adapter(&self) -> String {
        match self {
            Self::Host(..) => backend::cpu_name(),
            Self::Device(device) => device.engine.caps().adapter.clone(),
        }
    }
}

impl OnDevice<'_> {
    fn iterate(&self) -> Result<Sample> {
        let (device, queue) = (self.engine.device(), self.engine.queue());
        let operands = self.operands()?;
        let start = Instant::now();
        let mut encoder =
            device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("bench") });
        if let Some(timer) = &self.timer {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                label: Some("bench"),
                timestamp_writes: Some(timer.pass_writes()),
            });
            self.engine.encode_in_pass(&mut pass, &self.plan, &operands)?;
            drop(pass);
            timer.resolve(&mut encoder);
        } else {
            self.engine.encode(&mut encoder, &self.plan, &operands)?;
        }
        queue.submit([encoder.finish()]);
        device.poll(wgpu::PollType::wait_indefinitely()).map_err(Failure::input)?;
        let ms = milliseconds(start);
        let gpu_ms = match &self.timer {
            Some(timer) => Some(pollster::block_on(timer.read_ms(device, queue))?),
            None => None,
        };
        Ok(Sample { ms, gpu_ms })
    }

    fn slice(&self, operand: Operand) -> Option<wgpu::BufferSlice<'_>> {
        self.buffers.iter().find(|(of, _)| *of == operand).map(|(_, buffer)| buffer.slice(..))
    }

    fn need(&self, operand: Operand) -> Result<wgpu::BufferSlice<'_>> {
        self.slice(operand).ok_or_else(|| Failure::input(format!("{operand}: no buffer")))
    }

    fn operands(&self) -> Result<Operands<'_>> {
        use Operand::*;
        Ok(Operands {
            w: self.slice(W),
            wq: self.slice(Wq),
            wk: self.slice(Wk),
            score_v: self.slice(ScoreV),
            bias: self.slice(Bias),
            mask: self.slice(Mask),
            alibi_slopes: self.slice(AlibiSlopes),
            sinks: self.slice(Sinks),
            kv_lens: self.slice(KvLens),
            block_table: self.slice(BlockTable),
            lse: self.slice(Lse),
            weights: self.slice(Weights),
            ..Operands::new(self.need(Q)?, self.need(K)?, self.need(V)?, self.need(O)?)
        })
    }

    fn output(&self, problem: &AttentionProblem) -> Result<Tensor> {
        let buffer = self.need(Operand::O)?.buffer();
        let (device, queue) = (self.engine.device(), self.engine.queue());
        let bytes = pollster::block_on(wgpu_attention::read_buffer(device, queue, buffer, 0..buffer.size()))?;
        let used = problem.extent(Operand::O) as usize * problem.element_bytes(Operand::O);
        Ok(Tensor::from_bytes(problem.out_dtype, &bytes[..used.min(bytes.len())]))
    }
}

/// Gigabytes a second that a copy of so many bytes inside the device moves, read and written ones counted:
/// the best of a few.
pub(crate) fn copy_gb_s(engine: &Attention, bytes: u64) -> Result<f64> {
    let (device, queue) = (engine.device(), engine.queue());
    let size = bytes.min(engine.caps().max_buffer).next_multiple_of(4).max(4);
    let buffer = || {
        device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("copy"),
            size,
            usage: wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: false,
        })
    };
    let (from, to) = (buffer(), buffer());
    let mut best = f64::INFINITY;
    // The first writes the zeros that new buffers hold.
    for round in 0..=COPY_ROUNDS {
        let start = Instant::now();
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        for _ in 0..COPIES {
            encoder.copy_buffer_to_buffer(&from, 0, &to, 0, size);
        }
        queue.submit([encoder.finish()]);
        device.poll(wgpu::PollType::wait_indefinitely()).map_err(Failure::input)?;
        if round > 0 {
            best = best.min(milliseconds(start) / COPIES as f64);
        }
    }
    Ok(2.0 * size as f64 / (best * 1e6))
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

fn upload(
    engine: &Attention,
    problem: &AttentionProblem,
    inputs: &Inputs<'_>,
) -> Result<Vec<(Operand, wgpu::Buffer)>> {
    let (device, queue) = (engine.device(), engine.queue());
    let mut buffers = Vec::new();
    for operand in problem.operands() {
        let bytes = problem.extent(operand) as u64 * problem.element_bytes(operand) as u64;
        // wgpu copies whole words, and a binding is never empty.
        let size = bytes.next_multiple_of(4).max(4);
        if size > engine.caps().max_buffer {
            let max = engine.caps().max_buffer;
            return Err(Failure::input(format!(
                "{operand}: {size} bytes, the device's buffers end at {max}"
            )));
        }
        let scope = device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let buffer = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(&operand.to_string()),
            size,
            usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: false,
        });
        if let Some(error) = pollster::block_on(scope.pop()) {
            return Err(Failure::input(format!("{operand}: {error}")));
        }
        if let Some(data) = bytes_of(inputs, operand) {
            let whole = data.len() / 4 * 4;
            queue.write_buffer(&buffer, 0, &data[..whole]);
            if whole < data.len() {
                let mut tail = [0; 4];
                tail[..data.len() - whole].copy_from_slice(&data[whole..]);
                queue.write_buffer(&buffer, whole as u64, &tail);
            }
        }
        buffers.push((operand, buffer));
    }
    queue.submit([]);
    Ok(buffers)
}

fn bytes_of<'a>(inputs: &Inputs<'a>, operand: Operand) -> Option<&'a [u8]> {
    use wgpu_attention::TensorRef::F32;
    match operand {
        Operand::Q => Some(inputs.q.bytes()),
        Operand::K => Some(inputs.k.bytes()),
        Operand::V => Some(inputs.v.bytes()),
        Operand::W => inputs.w.map(|x| F32(x).bytes()),
        Operand::Wq => inputs.wq.map(|x| F32(x).bytes()),
        Operand::Wk => inputs.wk.map(|x| F32(x).bytes()),
        Operand::ScoreV => inputs.score_v.map(|x| F32(x).bytes()),
        Operand::Bias => inputs.bias.map(|x| x.bytes()),
        Operand::Mask => inputs.mask,
        Operand::AlibiSlopes => inputs.alibi_slopes.map(|x| F32(x).bytes()),
        Operand::Sinks => inputs.sinks.map(|x| F32(x).bytes()),
        Operand::KvLens => inputs.kv_lens.map(bytemuck::cast_slice),
        Operand::BlockTable => inputs.block_table.map(bytemuck::cast_slice),
        _ => None,
    }
}
