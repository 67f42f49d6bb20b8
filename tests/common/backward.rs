//! Backward passes: a case with the gradient of a loss by its o, run on a device after the forward call, and held to
//! the oracle.

use wgpu_attention::reference::{self, Gradients};
use wgpu_attention::{
    BackwardOperands, BackwardProblem, Dtype, Error, Family, Layout, Operand, Operands, PlanOptions, Tensor,
};

use super::case::{Case, fill, indices};
use super::check::poison;
use super::gpu::{Gpu, Guarded, USAGE, download, upload};
use super::pool::Pieces;
use super::rng::Rng;

/// Elements of poison before and after dout and each gradient.
const GUARD: usize = 64;

/// A backward pass and its data.
#[derive(Clone, Debug)]
pub struct Pass {
    pub case: Case,
    pub problem: BackwardProblem,
    pub dout: Tensor,
}

/// What a pass must give, and how far it may be off.
pub struct Expected {
    pub oracle: Gradients,
    pub budget: [f64; 5],
}

/// Storage of dout and of each gradient.
fn dtype(problem: &BackwardProblem, operand: Operand) -> Dtype {
    let p = &problem.attention;
    match operand {
        Operand::Dq => p.dtype,
        Operand::Dk | Operand::Dv => p.stored_kv(),
        Operand::Dbias => p.bias.map_or(Dtype::F32, |bias| bias.dtype),
        Operand::Dsinks => Dtype::F32,
        _ => p.out_dtype,
    }
}

/// One of the ways in which dout and gradients may lie, wherever q, k, v and o do.
fn lay_out([_, heads, seq, dim]: [usize; 4], rng: &mut Rng) -> Layout {
    match rng.below(4) {
        0 => Layout::bhsd(heads, seq, dim),
        1 => Layout::bshd(heads, seq, dim),
        2 => {
            let row = dim.next_multiple_of(4) + 4 * rng.below(2);
            Layout { offset: 4 * rng.below(3), strides: [heads * seq * row + 4, seq * row, row, 1] }
        }
        _ => {
            let row = dim + rng.below(3);
            Layout { offset: rng.below(7), strides: [heads * seq * row + rng.below(3), row * seq, row, 1] }
        }
    }
}

/// The same of a bias's gradient: entries and heads have one element each, or one for all. Or nobody asks for it.
fn lay_out_bias(shape @ [_, heads, seq_q, seq_kv]: [usize; 4], rng: &mut Rng) -> Option<Layout> {
    let of = [if rng.chance(0.5) { 1 } else { shape[0] }, if rng.chance(0.5) { 1 } else { heads }];
    let row = seq_kv + rng.below(3);
    let mut strides = [of[1] * seq_q * row + rng.below(3), seq_q * row, row, 1];
    (0..2).filter(|&dim| of[dim] == 1).for_each(|dim| strides[dim] = 0);
    rng.chance(0.9).then(|| Layout { offset: rng.below(7), strides })
}

impl Pass {
    /// A pass over a case, which gives up what no backward pass has.
    pub fn draw(case: Case, rng: &mut Rng) -> Self {
        let mut problem = BackwardProblem::of(&case.problem);
        if rng.chance(0.7) {
            problem.dout = lay_out(problem.shape(Operand::Dout), rng);
            problem.dq = lay_out(problem.shape(Operand::Dq), rng);
            problem.dk = lay_out(problem.shape(Operand::Dk), rng);
            problem.dv = lay_out(problem.shape(Operand::Dv), rng);
            problem.dbias = case.problem.bias.and_then(|_| lay_out_bias(problem.shape(Operand::Dbias), rng));
        }
        let (dtype, shape) = (case.problem.out_dtype, problem.shape(Operand::Dout));
        let dout = fill(dtype, problem.dout, shape, 2, |_| Some(rng.normal()));
        Self { case, problem, dout }
    }

    /// # Panics
    /// When the oracle refuses the pass.
    pub fn expected(&self) -> Expected {
        let (inputs, dout) = (self.case.data.inputs(), self.dout.as_ref());
        let said = |e: Error| -> Gradients { panic!("{}: {e}", self.case.name) };
        let oracle = reference::backward(&self.problem, &inputs, dout).unwrap_or_else(said);
        let naive = reference::backward_naive(&self.problem, &inputs, dout).unwrap_or_else(said);
        let budget = reference::backward_tolerance(&self.problem, &oracle, &naive);
        Expected { oracle, budget }
    }

    /// Forward and backward, as two submissions: the second on buffers of their own or on pieces of one, by kernels of
    /// that family. Gives the gradients in logical order, nothing of those that the pass does not have;
    /// [`Error::KernelUnfit`] where the family has none.
    ///
    /// # Panics
    /// When anything but the gradients' elements was written to, or one of those was not.
    pub fn run(&self, gpu: &Gpu, family: Family, pooled: bool) -> Result<[Vec<f64>; 5], Error> {
        let (device, queue) = (gpu.attention.device(), gpu.attention.queue());
        let guarded = Guarded::new(device, &self.case);
        let plan = gpu.attention.plan_with(&guarded.problem, &PlanOptions::default())?;
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        gpu.attention.encode(&mut encoder, &plan, &guarded.operands())?;
        queue.submit([encoder.finish()]);

        let mut problem = BackwardProblem { attention: guarded.problem.clone(), ..self.problem.clone() };
        let layouts = [&mut problem.dout, &mut problem.dq, &mut problem.dk, &mut problem.dv];
        for layout in layouts.into_iter().chain(&mut problem.dbias) {
            layout.offset += GUARD;
        }
        let dtype = |operand| dtype(&problem, operand);
        let dout = {
            let element = dtype(Operand::Dout).bytes();
            let guard = vec![0xff; GUARD * element];
            upload(device, "dout", &[&guard, self.dout.as_ref().bytes(), &guard].concat(), USAGE)
        };
        let outputs = Operand::GRADIENTS.map(|operand| {
            let elements = problem.extent(operand).max(GUARD as u128) as usize + GUARD;
            upload(device, "gradient", &poison(dtype(operand)).repeat(elements.next_multiple_of(2)), USAGE)
        });

        let own = guarded.operands();
        let there: Vec<_> = Operand::ALL.iter().copied().filter(|&of| own.get(of).is_some()).collect();
        let mut buffers: Vec<_> = there.iter().filter_map(|&of| Some(own.get(of)?.buffer())).collect();
        buffers.push(&dout);
        buffers.extend(&outputs);
        let pieces = Pieces::new(gpu, buffers, pooled);
        let at = there.len();
        let of = |operand| there.iter().position(|of| *of == operand).map(|at| pieces.slice(at));
        let need = |operand| of(operand).expect("every call has it");
        let operands = BackwardOperands {
            forward: Operands {
                bias: of(Operand::Bias),
                mask: of(Operand::Mask),
                alibi_slopes: of(Operand::AlibiSlopes),
                sinks: of(Operand::Sinks),
                kv_lens: of(Operand::KvLens),
                cu_seqlens_q: of(Operand::CuSeqlensQ),
                cu_seqlens_k: of(Operand::CuSeqlensK),
                lse: of(Operand::Lse),
                ..Operands::new(need(Operand::Q), need(Operand::K), need(Operand::V), need(Operand::O))
            },
            dout: pieces.slice(at),
            dq: Some(pieces.slice(at + 1)),
            dk: Some(pieces.slice(at + 2)),
            dv: Some(pieces.slice(at + 3)),
            dbias: problem.layout(Operand::Dbias).map(|_| pieces.slice(at + 4)),
            dsinks: problem.layout(Operand::Dsinks).map(|_| pieces.slice(at + 5)),
        };
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        gpu.attention.prepare_backward_with(&problem, &operands, family)?.encode(&mut encoder);
        queue.submit([encoder.finish()]);
        pieces.give_back(&[at + 1, at + 2, at + 3, at + 4, at + 5]);

        let mut outputs = outputs.iter();
        Ok(Operand::GRADIENTS.map(|operand| {
            let (buffer, dtype) = (outputs.next().expect("one for each"), dtype(operand));
            let Some(layout) = problem.layout(operand) else { return Vec::new() };
            let bytes = download(device, queue, buffer);
            let mut written = vec![false; bytes.len() / dtype.bytes()];
            let all: Vec<_> = indices(problem.shape(operand)).map(|at| layout.index(at)).collect();
            all.iter().for_each(|&index| written[index] = true);
            for (index, element) in bytes.chunks_exact(dtype.bytes()).enumerate() {
                let is_poison = element == poison(dtype);
                assert_eq!(
                    is_poison, !written[index],
                    "{operand}: element {index} is {element:02x?}\n  {}",
                    self.case.name
                );
            }
            let tensor = Tensor::from_bytes(dtype, &bytes);
            all.iter().map(|&index| f64::from(tensor.as_ref().get(index))).collect()
        }))
    }

    /// The same by the one call that takes slices.
    ///
    /// # Panics
    /// When it fails.
    pub fn run_from_slices(&self, gpu: &Gpu) -> [Vec<f64>; 5] {
        let inputs = self.case.data.inputs();
        let outputs = gpu.attention.run_backward_blocking(&self.problem, &inputs, self.dout.as_ref());
        let outputs = outputs.unwrap_or_else(|e| panic!("{e}\n  {}", self.case.name));
        Operand::GRADIENTS.map(|operand| {
            let Some(layout) = self.problem.layout(operand) else { return Vec::new() };
            let tensor = outputs.get(operand).expect("the pass has it");
            let all = indices(self.problem.shape(operand));
            all.map(|at| f64::from(tensor.as_ref().get(layout.index(at)))).collect()
        })
    }

    /// Whether rows are narrow enough for a thread each, whatever the way they lie.
    pub fn is_narrow_enough(&self) -> bool {
        self.case.problem.head_dim.max(self.case.problem.head_dim_v) <= 40
    }

    /// Holds what a device gave to the oracle, or to somebody else's numbers.
    ///
    /// # Errors
    /// Says what is off, and by how much.
    pub fn check(&self, got: &[Vec<f64>; 5], expected: &Expected) -> Result<(), String> {
        for (at, operand) in Operand::GRADIENTS.into_iter().enumerate() {
            let error = reference::max_error(got[at].iter().copied(), expected.oracle.get(operand));
            if error > expected.budget[at] {
                let (budget, name) = (expected.budget[at], &self.case.name);
                return Err(format!("{operand}: off by {error:e}, the budget is {budget:e}\n  {name}"));
            }
        }
        Ok(())
    }

    /// Whether a type of this pass is one that gradients are rounded to.
    pub fn is_narrow(&self) -> bool {
        let p = &self.case.problem;
        [p.dtype, p.stored_kv(), p.out_dtype].iter().any(|&dtype| dtype != Dtype::F32)
    }
}
