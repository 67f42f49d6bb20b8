//! Trying what a driver may get wrong before a plan trusts it.

use crate::attention::Attention;
use crate::caps::MatrixUnits;
use crate::dtype::{Dtype, Tensor};
use crate::error::Result;
use crate::host::Inputs;
use crate::kernel::Family;
use crate::mask::Align;
use crate::plan::PlanOptions;
use crate::problem::AttentionProblem;
use crate::reference::oracle;

/// Largest error of o that rounding explains: weights and o are f16, values are at most 1.
const TOLERANCE: f64 = 4e-3;

impl Attention {
    /// Tries the device's cooperative matrices on a small problem, and returns an object that knows the
    /// outcome: where it is right, plans for f16 tensors may take [`Family::FusedMatrix`], and where it
    /// is not, none does and [`Caps::missing`](crate::Caps::missing) says why. Where the device has none,
    /// the object comes back as it was.
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
        let outcome = match self.try_matrices().await {
            Ok(error) if error <= TOLERANCE => Ok(()),
            Ok(error) => Err(format!("o is off by {error:.1e}, {TOLERANCE:.0e} is the most")),
            Err(error) => Err(error.to_string()),
        };
        if let Err(why) = &outcome {
            log::warn!("{}: cooperative matrices are not used: {why}", self.caps().adapter);
        }
        self.with_tested(outcome)
    }

    /// The largest error of o on a problem of several tiles, with edges in every direction.
    async fn try_matrices(&self) -> Result<f64> {
        let problem = AttentionProblem {
            causal: Some(Align::BottomRight),
            ..AttentionProblem::new(1, 2, 1, 75, 141, 56, 72).with_dtype(Dtype::F16)
        };
        let mut state = 1_u32;
        let mut numbers = |n: usize, amplitude: f32| {
            let numbers: Vec<f32> = (0..n)
                .map(|_| {
                    // Any generator would do (Numerical Recipes' quick and dirty one).
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    amplitude * ((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
                })
                .collect();
            Tensor::from_f32(Dtype::F16, &numbers)
        };
        // Scores of a few units: some rows rescale, and no weight is the same as another.
        let [q, k, v] = [numbers(2 * 75 * 56, 3.0), numbers(141 * 56, 3.0), numbers(141 * 72, 1.0)];
        let inputs = Inputs::new(q.as_ref(), k.as_ref(), v.as_ref());
        let options = PlanOptions { family: Some(Family::FusedMatrix), ..PlanOptions::default() };
        let plan = self.plan_with(&problem, &options)?;
        let o = self.run_plan(&plan, &inputs).await?.o_contiguous(&problem);
        let truth = oracle(&problem, &inputs)?.o;
        // A NaN is larger than anything.
        let error = |(&got, &want): (&f32, &f64)| (f64::from(got) - want).abs();
        Ok(o.iter().zip(&truth).map(error).fold(0.0, |most: f64, e| if e <= most { most } else { e }))
    }
}
