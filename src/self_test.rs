//! Trying what a driver may get wrong before a plan trusts it.

use crate::attention::Attention;
use crate::caps::MatrixUnits;
use crate::dtype::{Dtype, Tensor};
use crate::error::{Operand, Result};
use crate::family::Family;
use crate::host::Inputs;
use crate::layout::Layout;
use crate::linear::oracle::linear;
use crate::linear::{LinearInputs, LinearKernel, LinearOperands, LinearProblem};
use crate::mask::Align;
use crate::plan::PlanOptions;
use crate::problem::{AttentionProblem, Similarity};
use crate::readback::read_buffer;
use crate::reference::oracle;
use crate::scope::scoped;

/// Largest error of o that rounding explains: weights and o are f16, values are at most 1.
const TOLERANCE: f64 = 4e-3;

impl Attention {
    /// Tries the device's cooperative matrices on small problems, and returns an object that knows the
    /// outcome: where they are right, plans for f16 tensors may take [`Family::FusedMatrix`] and linear maps
    /// [`LinearKernel::Matrix`]; where they are not, none does and [`Caps::missing`](crate::Caps::missing) says
    /// why. Where the device has none, the object comes back as it was.
    ///
    /// Submits to the queue and waits. [`Attention::request`] has done it already on a GPU; this is for
    /// devices of the caller's own, opened with [`Caps::MATRIX_FEATURE`](crate::Caps::MATRIX_FEATURE),
    /// before the first plan is made.
    ///
    /// ```no_run
    /// use wgpu_attention::{Attention, MatrixUnits, Options};
    /// # async fn f(adapter: wgpu::Adapter, device: wgpu::Device, queue: wgpu::Queue) {
    /// let options = Options { matrix: MatrixUnits::of_adapter(&adapter), ..Options::default() };
    /// let attention = Attention::with_options(&device, &queue, options).self_test().await;
    /// # }
    /// ```
    pub async fn self_test(self) -> Self {
        let untested = |matrix: &MatrixUnits| matrix.tested.is_none();
        if !self.caps().matrix.as_ref().is_some_and(untested)
            || Family::FusedMatrix.lacks(self.caps()).is_some()
        {
            return self;
        }
        let outcome = self.try_both().await;
        if let Err(why) = &outcome {
            log::warn!("{}: cooperative matrices are not used: {why}", self.caps().adapter);
        }
        self.with_tested(outcome)
    }

    /// What is wrong, if something is.
    async fn try_both(&self) -> std::result::Result<(), String> {
        let wrong = |what: &str, error: Result<f64>, most: f64| match error {
            Ok(error) if error <= most => Ok(()),
            Ok(error) => Err(format!("{what} is off by {error:.1e}, {most:.0e} is the most")),
            Err(error) => Err(error.to_string()),
        };
        wrong("o", self.try_attention().await, TOLERANCE)?;
        wrong("y", self.try_linear().await, 1.0)
    }

    /// The largest error of o on problems of several tiles, with edges in every direction.
    async fn try_attention(&self) -> Result<f64> {
        let problem = AttentionProblem {
            causal: Some(Align::BottomRight),
            ..AttentionProblem::new(1, 2, 1, 75, 141, 56, 72).with_dtype(Dtype::F16)
        };
        let mut numbers = numbers();
        // Scores of a few units: some rows rescale, and no weight is the same as another.
        let [q, k, v] = [numbers(2 * 75 * 56, 3.0), numbers(141 * 56, 3.0), numbers(141 * 72, 1.0)];
        let error = self.error_of(&problem, &Inputs::new(q.as_ref(), k.as_ref(), v.as_ref())).await?;

        // What the kernel is made of where widths are large, q is projected and rows begin at odd places, and what it
        // does about a value that is not finite (behind every query here).
        let problem = AttentionProblem {
            causal: Some(Align::TopLeft),
            k: Layout { offset: 0, strides: [0, 0, 137, 1] },
            ..AttentionProblem::new(1, 1, 1, 40, 50, 136, 304)
        };
        let problem = problem
            .with_dtype(Dtype::F16)
            .with_similarity(Similarity::Bilinear { query_dim: 24, per_head: false });
        let [q, k, w] = [numbers(40 * 24, 1.0), numbers(50 * 137, 1.0), numbers(24 * 136, 0.2)];
        let mut v = numbers(50 * 304, 1.0).to_f32();
        v[45 * 304 + 7] = f32::INFINITY;
        let (v, w) = (Tensor::from_f32(Dtype::F16, &v), w.to_f32());
        let inputs = Inputs { w: Some(&w), ..Inputs::new(q.as_ref(), k.as_ref(), v.as_ref()) };
        Ok(most([error, self.error_of(&problem, &inputs).await?].into_iter()))
    }

    /// The largest error of o.
    async fn error_of(&self, problem: &AttentionProblem, inputs: &Inputs<'_>) -> Result<f64> {
        let options = PlanOptions { family: Some(Family::FusedMatrix), ..PlanOptions::default() };
        let plan = self.plan_with(problem, &options)?;
        let o = self.run_plan(&plan, inputs).await?.o_contiguous(problem);
        let truth = oracle(problem, inputs)?.o;
        let error = |(&got, &want): (&f32, &f64)| (f64::from(got) - want).abs();
        Ok(most(o.iter().zip(&truth).map(error)))
    }

    /// The same of a linear map with sums of every level, as a share of what y may be off by.
    async fn try_linear(&self) -> Result<f64> {
        let problem = LinearProblem {
            dtype: Dtype::F16,
            weight_dtype: Dtype::F16,
            kernel: Some(LinearKernel::Matrix),
            ..LinearProblem::new(75, 1100, 71)
        };
        let mut numbers = numbers();
        let (x, w) = (numbers(75 * 1100, 1.0), numbers(71 * 1100, 1.0));
        let (device, bytes) = (self.device(), 4 * 75 * 71);
        let [on_x, on_w, on_y] = scoped(device, "operand memory", || {
            let upload = |operand, tensor: &Tensor| self.upload(operand, tensor.as_ref().bytes());
            [upload(Operand::X, &x), upload(Operand::W, &w), self.target(Operand::Y, bytes)]
        })?;
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        self.encode_linear(
            &mut encoder,
            &problem,
            &LinearOperands::new(on_x.slice(..), on_w.slice(..), on_y.slice(..)),
        )?;
        self.queue().submit([encoder.finish()]);
        let y = read_buffer(device, self.queue(), &on_y, 0..bytes).await?;
        let y: Vec<f32> = bytemuck::pod_collect_to_vec(&y);
        let truth = linear(&problem, &LinearInputs::new(x.as_ref(), w.as_ref()))?;
        let error = |i: usize| (f64::from(y[i]) - truth.y[i]).abs() / truth.tolerance(&problem, i);
        Ok(most((0..truth.y.len()).map(error)))
    }
}

/// Numbers between minus and plus an amplitude. Any generator would do (Numerical Recipes' quick and dirty
/// one).
fn numbers() -> impl FnMut(usize, f32) -> Tensor {
    let mut state = 1_u32;
    move |n, amplitude| {
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            amplitude * ((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
        };
        Tensor::from_f32(Dtype::F16, &(0..n).map(|_| next()).collect::<Vec<_>>())
    }
}

/// The largest; a NaN is larger than anything.
fn most(errors: impl Iterator<Item = f64>) -> f64 {
    errors.fold(0.0, |most: f64, e| if e <= most { most } else { e })
}
