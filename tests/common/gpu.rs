//! Devices, and runs on buffers that the test owns: each operand lies between guard zones of
//! poison, outputs are poison before.

use std::sync::{Arc, OnceLock};

use wgpu_attention::{
    Attention, Caps, DeviceRequest, Dtype, Error, Family, Layout, LinearKernel, MatrixUnits, Operand,
    Operands, Options, Outputs, PlanOptions, Tensor,
};

use super::case::Case;
use super::check::{Gap, poison};
use super::pool::Pieces;

/// How a device was opened.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// With every feature and limit that the kernels can use.
    Full,
    /// The same adapter with default limits and no optional feature: what the web's floor is, but for [`MOST_GROUPS`].
    Minimal,
}

/// How a call goes in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Door {
    /// Recorded into an encoder of the test's, on buffers of the test's.
    Encode,
    /// The same into a compute pass of the test's.
    Pass,
    /// Prepared, and each dispatch in a command buffer of its own. (Submitted at once: other tests use the same
    /// scratch memory.)
    Pieces,
    /// The one-shot call, from slices to vectors.
    Run,
}

pub struct Gpu {
    pub kind: Kind,
    /// Run-time checks in its shaders.
    pub checks: bool,
    pub attention: Attention,
}

/// Elements of poison before and after every operand. A multiple of four: it must not change
/// which kernels fit.
const GUARD: usize = 64;

/// Workgroups along a side of a dispatch of [`Kind::Minimal`]: so few that those of fifty heads are folded, and have
/// surplus workgroups, which are to store nothing. (The web's floor is 65535.)
const MOST_GROUPS: u32 = 43;

/// The device of a kind, with or without the shaders' run-time checks; `None` where there is no
/// adapter and `WGPU_ATTENTION_ALLOW_NO_ADAPTER` is 1.
///
/// # Panics
/// When there is no adapter and the environment does not allow that.
pub fn get(kind: Kind, runtime_checks: bool) -> Option<&'static Gpu> {
    static GPUS: OnceLock<Vec<Gpu>> = OnceLock::new();
    let gpus = GPUS.get_or_init(|| match open() {
        Ok(gpus) => gpus,
        Err(e) if std::env::var("WGPU_ATTENTION_ALLOW_NO_ADAPTER").is_ok_and(|x| x == "1") => {
            super::say(&format!("NOT TESTED ON A GPU: {e} (allowed by WGPU_ATTENTION_ALLOW_NO_ADAPTER)"));
            Vec::new()
        }
        Err(e) => panic!("{e}; scripts/adapters sets one up, WGPU_ATTENTION_ALLOW_NO_ADAPTER=1 does without"),
    });
    gpus.iter().find(|gpu| gpu.checks == runtime_checks && gpu.kind == kind)
}

/// What the environment asks for.
pub fn request() -> DeviceRequest {
    let adapter = std::env::var("WGPU_ATTENTION_ADAPTER").ok();
    DeviceRequest { adapter, matrix: true, ..DeviceRequest::default() }
}

fn open() -> Result<Vec<Gpu>, Error> {
    let full = pollster::block_on(Attention::request(&request()))?;
    super::say(&format!(
        "adapter: {} ({}, {:?})",
        full.caps().adapter,
        full.caps().driver,
        full.caps().backend
    ));
    // Whatever the adapter offers is under test.
    let adapter = adapter_of(&full)?;
    let offered = adapter.features() & Caps::FEATURES;
    assert!(full.device().features().contains(offered), "{offered:?} were not asked for");
    assert_eq!(full.caps().matrix.is_some(), MatrixUnits::of_adapter(&adapter).is_some());
    let families = Family::ALL.iter().map(|&family| (family.to_string(), family.lacks(full.caps())));
    let linear = LinearKernel::ALL.iter().map(|&kernel| (kernel.to_string(), kernel.lacks(full.caps())));
    for (name, lacks) in families.into_iter().chain(linear) {
        if let Some(why) = lacks {
            super::say(&format!("NOT TESTED: {name}: {why}"));
        }
    }
    let (device, queue) = minimal_device(&full)?;
    let mut gpus = Vec::new();
    for checks in [false, true] {
        let matrix = full.caps().matrix.clone();
        let options = Options { runtime_checks: checks, matrix, ..Options::default() };
        let of = |device, queue| Attention::with_options(device, queue, options.clone());
        gpus.push(Gpu { kind: Kind::Full, checks, attention: of(full.device(), full.queue()) });
        gpus.push(Gpu { kind: Kind::Minimal, checks, attention: of(&device, &queue) });
    }
    Ok(gpus)
}

/// The adapter that an object was opened on, listed anew.
pub fn adapter_of(attention: &Attention) -> Result<wgpu::Adapter, Error> {
    let caps = attention.caps();
    pollster::block_on(wgpu_attention::adapters())
        .into_iter()
        .find(|adapter| {
            let info = adapter.get_info();
            info.name == caps.adapter && info.backend == caps.backend
        })
        .ok_or_else(|| Error::NoAdapter { why: format!("{} is not listed", caps.adapter) })
}

/// A second device on the adapter of `full`, with nothing beyond the defaults.
pub fn minimal_device(full: &Attention) -> Result<(wgpu::Device, wgpu::Queue), Error> {
    let adapter = adapter_of(full)?;
    let descriptor = wgpu::DeviceDescriptor {
        label: Some("minimal"),
        required_features: wgpu::Features::empty(),
        required_limits: wgpu::Limits {
            max_compute_workgroups_per_dimension: MOST_GROUPS,
            ..wgpu::Limits::default().or_worse_values_from(&adapter.limits())
        },
        ..Default::default()
    };
    pollster::block_on(adapter.request_device(&descriptor))
        .map_err(|e| Error::NoDevice { adapter: full.caps().adapter.clone(), why: e.to_string() })
}

/// A buffer with these bytes (up to the next multiple of four).
pub fn upload(device: &wgpu::Device, label: &str, bytes: &[u8], usage: wgpu::BufferUsages) -> wgpu::Buffer {
    let buffer = device.create_buffer(&wgpu::BufferDescriptor {
        label: Some(label),
        size: (bytes.len().next_multiple_of(4) as u64).max(4),
        usage,
        mapped_at_creation: true,
    });
    let mut padded = bytes.to_vec();
    padded.resize(buffer.size() as usize, 0);
    buffer.get_mapped_range_mut(..).expect("mapped at creation").copy_from_slice(&padded);
    buffer.unmap();
    buffer
}

/// All bytes of a buffer, by the test's own copy and map.
pub fn download(device: &wgpu::Device, queue: &wgpu::Queue, buffer: &wgpu::Buffer) -> Vec<u8> {
    let staging = device.create_buffer(&wgpu::BufferDescriptor {
        label: Some("download"),
        size: buffer.size(),
        usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    encoder.copy_buffer_to_buffer(buffer, 0, &staging, 0, buffer.size());
    queue.submit([encoder.finish()]);
    staging.map_async(wgpu::MapMode::Read, .., |result| result.expect("a staging buffer maps"));
    device.poll(wgpu::PollType::wait_indefinitely()).expect("the device answers");
    let view = staging.get_mapped_range(..).expect("mapped");
    view.to_vec()
}

pub const USAGE: wgpu::BufferUsages =
    wgpu::BufferUsages::STORAGE.union(wgpu::BufferUsages::COPY_SRC).union(wgpu::BufferUsages::COPY_DST);

/// The buffers of one case, each with guard zones, and the problem moved between them.
pub struct Guarded {
    pub problem: wgpu_attention::AttentionProblem,
    q: Arc<wgpu::Buffer>,
    k: Arc<wgpu::Buffer>,
    v: Arc<wgpu::Buffer>,
    aux: Vec<(Operand, wgpu::Buffer)>,
    pub o: wgpu::Buffer,
    lse: Option<wgpu::Buffer>,
    weights: Option<wgpu::Buffer>,
}

impl Guarded {
    pub fn new(device: &wgpu::Device, case: &Case) -> Self {
        let mut problem = case.problem.clone();
        let data = &case.data;
        let moved = |layout: &mut Layout| layout.offset += GUARD;
        [&mut problem.q, &mut problem.k, &mut problem.v, &mut problem.o].into_iter().for_each(moved);
        if let Some(bias) = &mut problem.bias {
            moved(&mut bias.layout);
        }
        problem.mask.iter_mut().for_each(moved);

        // Guards of inputs are NaN (for kv_lens and masks: all ones), so that a read of one shows.
        let input = |operand: Operand, bytes: &[u8], element: usize, before: usize| {
            let mut guarded = vec![0xff; before * element];
            guarded.extend_from_slice(bytes);
            guarded.resize(guarded.len() + GUARD * element, 0xff);
            upload(device, &operand.to_string(), &guarded, USAGE)
        };
        let tensor = |operand, x: &Tensor| {
            Arc::new(input(operand, x.as_ref().bytes(), x.as_ref().dtype().bytes(), GUARD))
        };
        let q = tensor(Operand::Q, &data.q);
        let k = if Arc::ptr_eq(&data.k, &data.q) { q.clone() } else { tensor(Operand::K, &data.k) };
        let v = if Arc::ptr_eq(&data.v, &data.k) { k.clone() } else { tensor(Operand::V, &data.v) };
        let mut aux = Vec::new();
        if let Some(bias) = &data.bias {
            let bias = bias.as_ref();
            aux.push((Operand::Bias, input(Operand::Bias, bias.bytes(), bias.dtype().bytes(), GUARD)));
        }
        if let Some(mask) = &data.mask {
            aux.push((Operand::Mask, input(Operand::Mask, mask, 1, GUARD)));
        }
        for (operand, floats) in [
            (Operand::W, &data.w),
            (Operand::Wq, &data.wq),
            (Operand::Wk, &data.wk),
            (Operand::ScoreV, &data.score_v),
            (Operand::AlibiSlopes, &data.alibi_slopes),
            (Operand::Sinks, &data.sinks),
        ] {
            if let Some(floats) = floats {
                aux.push((operand, input(operand, bytemuck::cast_slice(floats), 4, 0)));
            }
        }
        for (operand, words) in [
            (Operand::KvLens, &data.kv_lens),
            (Operand::BlockTable, &data.block_table),
            (Operand::CuSeqlensQ, &data.cu_seqlens_q),
            (Operand::CuSeqlensK, &data.cu_seqlens_k),
        ] {
            if let Some(words) = words {
                aux.push((operand, input(operand, bytemuck::cast_slice(words), 4, 0)));
            }
        }

        let output = |operand: Operand, dtype: Dtype, before: usize| {
            let elements = before + case.problem.extent(operand) as usize + GUARD;
            upload(device, &operand.to_string(), &poison(dtype).repeat(elements.next_multiple_of(2)), USAGE)
        };
        Self {
            q,
            k,
            v,
            aux,
            o: output(Operand::O, problem.out_dtype, GUARD),
            lse: problem.lse.then(|| output(Operand::Lse, Dtype::F32, 0)),
            weights: problem.weights.then(|| output(Operand::Weights, Dtype::F32, 0)),
            problem,
        }
    }

    pub fn operands(&self) -> Operands<'_> {
        let aux =
            |operand| self.aux.iter().find(|(of, _)| *of == operand).map(|(_, buffer)| buffer.slice(..));
        Operands {
            w: aux(Operand::W),
            wq: aux(Operand::Wq),
            wk: aux(Operand::Wk),
            score_v: aux(Operand::ScoreV),
            bias: aux(Operand::Bias),
            mask: aux(Operand::Mask),
            alibi_slopes: aux(Operand::AlibiSlopes),
            sinks: aux(Operand::Sinks),
            kv_lens: aux(Operand::KvLens),
            block_table: aux(Operand::BlockTable),
            cu_seqlens_q: aux(Operand::CuSeqlensQ),
            cu_seqlens_k: aux(Operand::CuSeqlensK),
            lse: self.lse.as_ref().map(|b| b.slice(..)),
            weights: self.weights.as_ref().map(|b| b.slice(..)),
            ..Operands::new(self.q.slice(..), self.k.slice(..), self.v.slice(..), self.o.slice(..))
        }
    }

    /// Reads the outputs back.
    ///
    /// # Panics
    /// When a guard zone of an output was written to, or an element of lse or weights was not.
    pub fn outputs(&self, device: &wgpu::Device, queue: &wgpu::Queue, case: &Case) -> Outputs {
        let between = |operand: Operand, buffer: &wgpu::Buffer, dtype: Dtype, before: usize| -> Tensor {
            let bytes = download(device, queue, buffer);
            let (element, poison) = (dtype.bytes(), poison(dtype));
            let start = before * element;
            let end = start + case.problem.extent(operand) as usize * element;
            for (zone, at) in [(&bytes[..start], "before"), (&bytes[end..], "after")] {
                for (i, element) in zone.chunks_exact(element).enumerate() {
                    assert!(
                        element == poison,
                        "{operand}: guard element {i} {at} it was overwritten with {element:02x?}\n  {}",
                        case.name
                    );
                }
            }
            Tensor::from_bytes(dtype, &bytes[start..end])
        };
        let floats = |operand: Operand, buffer: &wgpu::Buffer| -> Vec<f32> {
            let floats = between(operand, buffer, Dtype::F32, 0).to_f32();
            let poison: u32 = bytemuck::pod_read_unaligned(poison(Dtype::F32));
            if let Some(i) = floats.iter().position(|x| x.to_bits() == poison) {
                panic!("{operand}: element {i} was never written\n  {}", case.name);
            }
            floats
        };
        Outputs {
            o: between(Operand::O, &self.o, self.problem.out_dtype, GUARD),
            lse: self.lse.as_ref().map(|buffer| floats(Operand::Lse, buffer)),
            weights: self.weights.as_ref().map(|buffer| floats(Operand::Weights, buffer)),
        }
    }
}

/// Operands in these pieces, whose order `there` says.
fn in_pieces<'a>(pieces: &'a Pieces<'_>, there: &[Operand]) -> Operands<'a> {
    let of = |operand| there.iter().position(|of| *of == operand).map(|at| pieces.slice(at));
    let need = |operand| of(operand).expect("every call has it");
    Operands {
        w: of(Operand::W),
        wq: of(Operand::Wq),
        wk: of(Operand::Wk),
        score_v: of(Operand::ScoreV),
        bias: of(Operand::Bias),
        mask: of(Operand::Mask),
        alibi_slopes: of(Operand::AlibiSlopes),
        sinks: of(Operand::Sinks),
        kv_lens: of(Operand::KvLens),
        block_table: of(Operand::BlockTable),
        cu_seqlens_q: of(Operand::CuSeqlensQ),
        cu_seqlens_k: of(Operand::CuSeqlensK),
        lse: of(Operand::Lse),
        weights: of(Operand::Weights),
        ..Operands::new(need(Operand::Q), need(Operand::K), need(Operand::V), need(Operand::O))
    }
}

impl Gpu {
    /// An object of the test's own on the same device: nothing else uses its scratch and pipelines.
    pub fn fresh(&self) -> Attention {
        let matrix = self.attention.caps().matrix.clone();
        let options = Options { matrix, ..Options::default() };
        Attention::with_options(self.attention.device(), self.attention.queue(), options)
    }

    /// The families that this device has all it takes for.
    pub fn families(&self) -> impl Iterator<Item = Family> + '_ {
        Family::ALL.iter().copied().filter(|family| family.lacks(self.attention.caps()).is_none())
    }

    pub fn run(&self, case: &Case, options: &PlanOptions, door: Door) -> Result<(Outputs, Gap), Error> {
        let (device, queue) = (self.attention.device(), self.attention.queue());
        if door == Door::Run {
            let plan = self.attention.plan_with(&case.problem, options)?;
            return Ok((self.attention.run_plan_blocking(&plan, &case.data.inputs())?, Gap::Zero));
        }
        let guarded = Guarded::new(device, case);
        let plan = self.attention.plan_with(&guarded.problem, options)?;
        // By something that is compiled in: no row of the table compiles for both.
        let pooled = case.problem.lse != case.problem.alibi;
        let own = guarded.operands();
        let there: Vec<_> = Operand::ALL.iter().copied().filter(|&of| own.get(of).is_some()).collect();
        let buffers = there.iter().filter_map(|&of| Some(own.get(of)?.buffer())).collect();
        let pieces = Pieces::new(self, buffers, pooled);
        let operands = in_pieces(&pieces, &there);
        let new = || device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        if door == Door::Pieces {
            let pieces = self.attention.prepare(&plan, &operands)?.split(1);
            queue.submit(pieces.iter().map(|piece| {
                assert_eq!(piece.dispatches(), 1);
                let mut encoder = new();
                piece.encode(&mut encoder);
                encoder.finish()
            }));
        } else {
            let mut encoder = new();
            if door == Door::Pass {
                let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
                self.attention.encode_in_pass(&mut pass, &plan, &operands)?;
            } else {
                self.attention.encode(&mut encoder, &plan, &operands)?;
            }
            queue.submit([encoder.finish()]);
        }
        let is_output = |at: &usize| matches!(there[*at], Operand::O | Operand::Lse | Operand::Weights);
        pieces.give_back(&(0..there.len()).filter(is_output).collect::<Vec<_>>());
        Ok((guarded.outputs(device, queue, case), Gap::Poison))
    }
}
