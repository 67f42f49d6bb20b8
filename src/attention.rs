//! [`Attention`]: the prepared object over a caller's device. It plans, and records into the
//! caller's encoder; it submits nothing, and waits for nothing, unless asked to run.

use std::sync::{Arc, Mutex, PoisonError};

use crate::caps::{Caps, MatrixUnits};
use crate::encode::{Prepared, check_plan, pipelines, prepare};
use crate::error::{Error, Operand, Result};
use crate::pipeline::{PipelineBlob, PipelineCache, experimental_features};
use crate::plan::{Plan, PlanOptions};
use crate::problem::AttentionProblem;
use crate::scratch::Scratch;
use crate::tuning::Tuning;

/// How an [`Attention`] treats its device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Keep the bounds checks that wgpu injects into shaders. Off by default, because validation has
    /// already proved every bound; the results are the same bits either way. (With them, DirectX's FXC compiles some
    /// kernels for minutes.)
    pub runtime_checks: bool,
    /// The cooperative matrices of the device, which only its adapter tells: see
    /// [`MatrixUnits::of_adapter`]. Without effect on a device that was opened without
    /// [`Caps::MATRIX_FEATURE`].
    pub matrix: Option<MatrixUnits>,
    /// What was measured on the device's adapter, for plans whose options bring no table of their own.
    pub tuning: Option<Arc<Tuning>>,
    /// What an earlier run's driver has made of pipelines ([`Attention::pipeline_blob`]).
    pub pipelines: Option<PipelineBlob>,
}

/// Which adapter to ask for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceRequest {
    /// A part of the adapter's name, in any case. `None` takes the one with the highest
    /// performance.
    pub adapter: Option<String>,
    /// Also open cooperative matrices where the adapter offers them, and try them on a GPU
    /// ([`Attention::self_test`]). wgpu calls that feature experimental and warns of undefined behaviour
    /// in its own code or the driver's, hence not by default.
    pub matrix: bool,
    /// How the device is treated. [`Options::matrix`] is filled in, by `matrix` above.
    pub options: Options,
}

/// Attention on one wgpu device.
///
/// Cheap to clone (clones share pipelines and scratch memory), and `Send + Sync` natively. Scratch
/// is shared between everything that this object encodes: commands run in the order of their
/// submission, so that is safe on the device's one queue.
///
/// ```no_run
/// use wgpu_attention::{Align, Attention, AttentionProblem, Operands};
/// # fn f(device: wgpu::Device, queue: wgpu::Queue, q: wgpu::Buffer, k: wgpu::Buffer,
/// #      v: wgpu::Buffer, o: wgpu::Buffer) -> wgpu_attention::Result<()> {
/// let attention = Attention::new(&device, &queue);
/// let problem = AttentionProblem {
///     causal: Some(Align::TopLeft),
///     ..AttentionProblem::new(1, 8, 8, 2048, 2048, 64, 64)
/// };
/// let plan = attention.plan(&problem)?;
/// let mut encoder = device.create_command_encoder(&Default::default());
/// let operands = Operands::new(q.slice(..), k.slice(..), v.slice(..), o.slice(..));
/// attention.encode(&mut encoder, &plan, &operands)?;
/// queue.submit([encoder.finish()]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Attention {
    pub(crate) shared: Arc<Shared>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) device: wgpu::Device,
    pub(crate) queue: wgpu::Queue,
    pub(crate) caps: Caps,
    pub(crate) options: Options,
    pub(crate) pipelines: PipelineCache,
    pub(crate) scratch: Mutex<Scratch>,
}

/// The buffers of one call, or pieces of buffers, laid out as the problem says: offsets are in its
/// [`Layout`](crate::Layout)s, in elements from where the slice begins. Inputs and outputs need `STORAGE` usage, and
/// slices begin at multiples of the device's `min_storage_buffer_offset_alignment`, as bindings do.
///
/// All of them may be pieces of one buffer, such as a memory pool's: inputs anywhere in it, and outputs where nothing
/// else lies ([`Error::Aliased`]). An input in the buffer of an output is bound as if it were written, too, which may
/// keep a GPU from caching it. (In a browser an output has a buffer of its own.)
///
/// A 16-bit or mask operand whose last element ends inside a 4-byte word needs that whole word.
#[derive(Clone, Copy, Debug)]
pub struct Operands<'a> {
    /// Queries.
    pub q: wgpu::BufferSlice<'a>,
    /// Keys.
    pub k: wgpu::BufferSlice<'a>,
    /// Values.
    pub v: wgpu::BufferSlice<'a>,
    /// The output.
    pub o: wgpu::BufferSlice<'a>,
    /// The bilinear matrix, f32.
    pub w: Option<wgpu::BufferSlice<'a>>,
    /// The additive similarity's matrix on queries, f32.
    pub wq: Option<wgpu::BufferSlice<'a>>,
    /// The additive similarity's matrix on keys, f32.
    pub wk: Option<wgpu::BufferSlice<'a>>,
    /// The additive similarity's weights, f32.
    pub score_v: Option<wgpu::BufferSlice<'a>>,
    /// The additive bias.
    pub bias: Option<wgpu::BufferSlice<'a>>,
    /// The boolean mask, one byte an element.
    pub mask: Option<wgpu::BufferSlice<'a>>,
    /// ALiBi slopes, f32, one for each query head.
    pub alibi_slopes: Option<wgpu::BufferSlice<'a>>,
    /// Sink logits, f32, one for each query head.
    pub sinks: Option<wgpu::BufferSlice<'a>>,
    /// Valid keys, u32, one for each batch entry; clamped to seq_kv.
    pub kv_lens: Option<wgpu::BufferSlice<'a>>,
    /// Pages of each batch entry's keys, u32. An entry ends before the first page that does not exist.
    pub block_table: Option<wgpu::BufferSlice<'a>>,
    /// Where each batch entry's ragged queries begin, and the last end, u32; clamped.
    pub cu_seqlens_q: Option<wgpu::BufferSlice<'a>>,
    /// Where each batch entry's ragged keys begin, and the last end, u32; clamped.
    pub cu_seqlens_k: Option<wgpu::BufferSlice<'a>>,
    /// Gains the bits of [`Status`](crate::Status), a u32; nothing is ever taken from it.
    pub status: Option<wgpu::BufferSlice<'a>>,
    /// Receives the natural logarithm of each row's denominator, f32.
    pub lse: Option<wgpu::BufferSlice<'a>>,
    /// Receives the weights, f32.
    pub weights: Option<wgpu::BufferSlice<'a>>,
}

impl<'a> Operands<'a> {
    /// The four that every problem has; fill in the rest with `..`.
    pub fn new(
        q: wgpu::BufferSlice<'a>,
        k: wgpu::BufferSlice<'a>,
        v: wgpu::BufferSlice<'a>,
        o: wgpu::BufferSlice<'a>,
    ) -> Self {
        Self {
            q,
            k,
            v,
            o,
            w: None,
            wq: None,
            wk: None,
            score_v: None,
            bias: None,
            mask: None,
            alibi_slopes: None,
            sinks: None,
            kv_lens: None,
            block_table: None,
            cu_seqlens_q: None,
            cu_seqlens_k: None,
            status: None,
            lse: None,
            weights: None,
        }
    }

    /// The buffer of an operand; `None` of one that is not brought.
    pub fn get(&self, operand: Operand) -> Option<wgpu::BufferSlice<'a>> {
        match operand {
            Operand::Q => Some(self.q),
            Operand::K => Some(self.k),
            Operand::V => Some(self.v),
            Operand::O => Some(self.o),
            Operand::W => self.w,
            Operand::Wq => self.wq,
            Operand::Wk => self.wk,
            Operand::ScoreV => self.score_v,
            Operand::Bias => self.bias,
            Operand::Mask => self.mask,
            Operand::AlibiSlopes => self.alibi_slopes,
            Operand::Sinks => self.sinks,
            Operand::KvLens => self.kv_lens,
            Operand::BlockTable => self.block_table,
            Operand::CuSeqlensQ => self.cu_seqlens_q,
            Operand::CuSeqlensK => self.cu_seqlens_k,
            Operand::Status => self.status,
            Operand::Lse => self.lse,
            Operand::Weights => self.weights,
            // Those of other calls.
            _ => None,
        }
    }
}

impl Attention {
    /// Attention on the caller's own device. What that device lacks for the best kernels is in
    /// [`caps().missing()`](Caps::missing); every device of wgpu's default limits gets kernels that it can run.
    ///
    /// Buffers, encoders and passes must be this device's, and `queue` its queue: wgpu lets nobody ask, and reports
    /// others, if at all, as it does its own errors (of another instance's it takes one thing for another).
    pub fn new(device: &wgpu::Device, queue: &wgpu::Queue) -> Self {
        Self::with_options(device, queue, Options::default())
    }

    /// [`Attention::new`] with options.
    pub fn with_options(device: &wgpu::Device, queue: &wgpu::Queue, options: Options) -> Self {
        let enabled = device.features().contains(Caps::MATRIX_FEATURE);
        let matrix = options.matrix.clone().filter(|_| enabled);
        Self {
            shared: Arc::new(Shared {
                caps: Caps { matrix, ..Caps::of_device(device) },
                device: device.clone(),
                queue: queue.clone(),
                pipelines: PipelineCache::new(device, options.pipelines.as_ref()),
                options,
                scratch: Mutex::default(),
            }),
        }
    }

    /// Asks for an adapter, and opens it with every feature that the kernels can use and with all
    /// of its limits.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] and [`Error::NoDevice`].
    pub async fn request(request: &DeviceRequest) -> Result<Self> {
        let adapter = match &request.adapter {
            None => instance()
                .request_adapter(&wgpu::RequestAdapterOptions {
                    power_preference: wgpu::PowerPreference::HighPerformance,
                    ..Default::default()
                })
                .await
                .map_err(|error| Error::NoAdapter { why: error.to_string() })?,
            Some(part) => {
                let adapters = adapters().await;
                let names: Vec<_> = adapters.iter().map(|adapter| adapter.get_info().name).collect();
                let part = part.to_lowercase();
                let found = names.iter().position(|name| name.to_lowercase().contains(&part));
                match found.and_then(|at| adapters.into_iter().nth(at)) {
                    Some(adapter) => adapter,
                    None => {
                        let why = format!("none is named {part:?}; there are {names:?}");
                        return Err(Error::NoAdapter { why });
                    }
                }
            }
        };
        let matrix = MatrixUnits::of_adapter(&adapter).filter(|_| request.matrix);
        let mut descriptor = wgpu::DeviceDescriptor {
            label: Some("wgpu-attention"),
            required_features: Caps::FEATURES & adapter.features(),
            required_limits: adapter.limits(),
            ..Default::default()
        };
        if matrix.is_some() {
            descriptor.required_features |= Caps::MATRIX_FEATURE;
            descriptor.experimental_features = experimental_features();
        }
        let (device, queue) = adapter
            .request_device(&descriptor)
            .await
            .map_err(|error| Error::NoDevice { adapter: adapter.get_info().name, why: error.to_string() })?;
        let attention = Self::with_options(&device, &queue, Options { matrix, ..request.options.clone() });
        // On a processor no plan would choose them: they are not worth the seconds that they compile for.
        if attention.caps().on_cpu() { Ok(attention) } else { Ok(attention.self_test().await) }
    }

    /// This object, with what a test of its cooperative matrices has found.
    pub(crate) fn with_tested(&self, outcome: std::result::Result<(), String>) -> Self {
        let matrix = self.caps().matrix.clone().map(|units| MatrixUnits { tested: Some(outcome), ..units });
        let options = Options { matrix, ..self.shared.options.clone() };
        Self::with_options(self.device(), self.queue(), options)
    }

    /// The device that this object records for.
    pub fn device(&self) -> &wgpu::Device {
        &self.shared.device
    }

    /// That device's queue.
    pub fn queue(&self) -> &wgpu::Queue {
        &self.shared.queue
    }

    /// What that device can do.
    pub fn caps(&self) -> &Caps {
        &self.shared.caps
    }

    /// How many pipelines have been built so far.
    pub fn pipelines(&self) -> usize {
        self.shared.pipelines.len()
    }

    /// What the driver has made of the pipelines so far, for [`Options::pipelines`] of a later run. `None`
    /// where the device was opened without `PIPELINE_CACHE`, or the driver gives nothing.
    pub fn pipeline_blob(&self) -> Option<PipelineBlob> {
        self.shared.pipelines.blob()
    }

    /// Bytes of scratch memory that this object holds now.
    pub fn scratch_bytes(&self) -> u64 {
        self.shared.scratch.lock().unwrap_or_else(PoisonError::into_inner).bytes()
    }

    /// Gives the scratch memory back (once what uses it has run). The next call makes new.
    pub fn free_scratch(&self) {
        *self.shared.scratch.lock().unwrap_or_else(PoisonError::into_inner) = Scratch::default();
    }

    /// Plans a problem for this device.
    ///
    /// # Errors
    /// Those of [`Plan::new`].
    pub fn plan(&self, problem: &AttentionProblem) -> Result<Plan> {
        self.plan_with(problem, &PlanOptions::default())
    }

    /// [`Attention::plan`] with options.
    ///
    /// # Errors
    /// Those of [`Plan::new`].
    pub fn plan_with(&self, problem: &AttentionProblem, options: &PlanOptions) -> Result<Plan> {
        let tuning = options.tuning.clone().or(self.shared.options.tuning.clone());
        Plan::new(problem, self.caps(), &PlanOptions { tuning, ..options.clone() })
    }

    /// Compiles the pipelines of a plan that are not there yet: before a deadline, or while something else loads. (An
    /// `Attention` is cheap to clone, and may do so on another thread.) Operands that lie in the buffer of an output
    /// want pipelines of their own, which [`prepare`](Self::prepare) compiles.
    ///
    /// # Errors
    /// [`Error::ForeignPlan`], [`Error::OutOfMemory`], [`Error::Driver`] and [`Error::DeviceLost`].
    pub fn compile(&self, plan: &Plan) -> Result<()> {
        check_plan(&self.shared, plan)?;
        pipelines(&self.shared, plan, None).map(drop)
    }

    /// Records one attention call, in a compute pass of its own. Submits nothing.
    ///
    /// Pipelines that are not there yet are compiled now; [`compile`](Self::compile) does it earlier.
    ///
    /// # Errors
    /// [`Error::ForeignPlan`], [`Error::MissingOperand`], [`Error::UnexpectedOperand`],
    /// [`Error::BufferUsage`], [`Error::OutOfBounds`], [`Error::Misaligned`], [`Error::Aliased`], [`Error::OutOfMemory`],
    /// [`Error::Driver`] and [`Error::DeviceLost`]; then nothing has been recorded. Where pipelines and memory are there
    /// already, nothing asks the device, and a lost one is recorded for as wgpu itself does it: in vain, and without a
    /// word but that to the device's callback.
    pub fn encode(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        plan: &Plan,
        operands: &Operands<'_>,
    ) -> Result<()> {
        self.prepare(plan, operands)?.encode(encoder);
        Ok(())
    }

    /// Records one attention call into a pass that the caller has begun, among its own dispatches
    /// or with its own timestamps. Leaves its pipeline and bind group 0 set.
    ///
    /// # Errors
    /// Those of [`Attention::encode`]; then nothing has been recorded.
    pub fn encode_in_pass(
        &self,
        pass: &mut wgpu::ComputePass<'_>,
        plan: &Plan,
        operands: &Operands<'_>,
    ) -> Result<()> {
        self.prepare(plan, operands)?.encode_in_pass(pass);
        Ok(())
    }

    /// All of [`Attention::encode`] but the recording, for calls that are made again and again on the same
    /// buffers.
    ///
    /// What was prepared keeps the scratch memory that it was made with, also when this object has grown a
    /// larger one or has given its own back.
    ///
    /// # Errors
    /// Those of [`Attention::encode`].
    pub fn prepare(&self, plan: &Plan, operands: &Operands<'_>) -> Result<Prepared> {
        prepare(&self.shared, plan, operands)
    }
}

/// Every adapter of every backend that this build has.
pub async fn adapters() -> Vec<wgpu::Adapter> {
    instance().enumerate_adapters(wgpu::Backends::all()).await
}

/// `WGPU_BACKEND` and its kin choose among the backends, as in other wgpu programs.
fn instance() -> wgpu::Instance {
    wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env())
}
