//! Attention in a browser, held to the oracle: each kernel on one problem, and random ones of the test suite.
#![cfg(target_arch = "wasm32")]

// The suite's own cases and comparison.
#[allow(dead_code)]
#[path = "../../../tests/common/case.rs"]
mod case;
#[allow(dead_code)]
#[path = "../../../tests/common/check.rs"]
mod check;
#[allow(dead_code)]
#[path = "../../../tests/common/rng.rs"]
mod rng;

use case::{Axes, Case, values};
use check::{Expected, Gap};
use rng::Rng;
use wasm_bindgen::prelude::*;
use wgpu_attention::{
    Align, Attention, BackwardProblem, DeviceRequest, Error, Family, Operand, Path, Plan, PlanOptions,
    reference,
};

/// Multiplications that the oracle may spend on a random problem.
const WORK: usize = 1_000_000;

/// Draws of a problem until the drawn kernel fits one.
const DRAWS: usize = 64;

/// A device, and what is asked of it.
#[wasm_bindgen]
pub struct Page {
    attention: Attention,
    families: Vec<Family>,
    /// The problem of each kernel.
    case: Case,
    expected: Expected,
}

#[wasm_bindgen]
impl Page {
    /// Opens a device.
    pub async fn open() -> Result<Page, String> {
        console_error_panic_hook::set_once();
        let attention = Attention::request(&DeviceRequest::default()).await.map_err(|e| e.to_string())?;
        let caps = attention.caps();
        let families = Family::ALL.iter().copied().filter(|family| family.lacks(caps).is_none()).collect();
        let axes = Axes {
            heads: (8, 8),
            seq_q: 256,
            seq_kv: 256,
            head_dim: 64,
            head_dim_v: 64,
            causal: Some(Align::TopLeft),
            ..Axes::default()
        };
        let case = axes.build(1);
        Ok(Self { expected: Expected::of(&case), attention, families, case })
    }

    /// What it runs on.
    pub fn device(&self) -> String {
        let caps = self.attention.caps();
        let (f16, memory) = (caps.shader_f16, caps.max_workgroup_bytes);
        format!("{:?}, {:?}, f16 {f16}, workgroup memory {memory} bytes", caps.backend, caps.device_type)
    }

    /// The problem of [`Page::run`].
    pub fn problem(&self) -> String {
        let p = &self.case.problem;
        format!("{} heads, {} tokens, width {}, causal, {}", p.heads_q, p.seq_q, p.head_dim, p.dtype)
    }

    /// The kernels that the device can run.
    pub fn kernels(&self) -> Vec<String> {
        self.families.iter().map(Family::to_string).collect()
    }

    /// Attention by one kernel, from slices to vectors: the largest error as a share of its budget.
    pub async fn run(&self, kernel: usize) -> Result<f64, String> {
        let options = PlanOptions { family: Some(self.families[kernel]), ..PlanOptions::default() };
        let plan = self.attention.plan_with(&self.case.problem, &options).map_err(|e| e.to_string())?;
        self.check(&plan, &self.case, &self.expected).await
    }

    /// A random problem with random options on a random kernel: a line for it, an error if it is wrong.
    pub async fn draw(&self, seed: u64) -> Result<String, String> {
        let mut rng = Rng::new(seed);
        let family = self.families.get(rng.below(self.families.len() + 1)).copied();
        let splits = (family.is_some_and(|f| f.path() == Path::Fused) && rng.chance(0.5)).then_some(3);
        let options = PlanOptions { family, splits, indirect: splits.is_some(), ..PlanOptions::default() };
        for _ in 0..DRAWS {
            let mut case = values::draw(&mut rng).shrunk_to(WORK).build(seed);
            // No kernel without a score matrix makes the weights.
            case.problem.weights &= family.is_none_or(|family| family.path() == Path::Staged);
            let plan = match self.attention.plan_with(&case.problem, &options) {
                Err(Error::KernelUnfit { .. }) if family.is_some() => continue,
                plan => plan.map_err(|e| format!("{e}\n  {}", case.name))?,
            };
            let share = self.check(&plan, &case, &Expected::of(&case)).await?;
            let line = format!("{seed:#018x} {}: {share:.2} of the error budget", plan.family());
            return Ok(match self.gradients(&case, &mut rng).await? {
                Some(share) => format!("{line}, {share:.2} of the gradients'"),
                None => line,
            });
        }
        Err(format!("{seed:#018x}: {family:?} fits none of {DRAWS} problems"))
    }

    async fn check(&self, plan: &Plan, case: &Case, expected: &Expected) -> Result<f64, String> {
        let wrong = |what: String| format!("{}: {what}\n  {}", plan.family(), case.name);
        let outputs = self.attention.run_plan(plan, &case.data.inputs()).await;
        expected.check(case, &outputs.map_err(|e| wrong(e.to_string()))?, Gap::Zero).map_err(wrong)
    }

    /// The gradients of a problem that has any: the largest error as a share of its budget.
    async fn gradients(&self, case: &Case, rng: &mut Rng) -> Result<Option<f64>, String> {
        let (problem, inputs) = (BackwardProblem::of(&case.problem), case.data.inputs());
        if problem.validate().is_err() {
            return Ok(None);
        }
        let shape = problem.shape(Operand::Dout);
        let dout = case::fill(case.problem.out_dtype, problem.dout, shape, 0, |_| Some(rng.normal()));
        let wrong = |e: Error| format!("gradients: {e}\n  {}", case.name);
        let oracle = reference::backward(&problem, &inputs, dout.as_ref()).map_err(wrong)?;
        let naive = reference::backward_naive(&problem, &inputs, dout.as_ref()).map_err(wrong)?;
        let budgets = reference::backward_tolerance(&problem, &oracle, &naive);
        let family = if rng.chance(0.5) { Family::FusedTile } else { Family::FusedRow };
        let got = match self.attention.run_backward_with(&problem, &inputs, dout.as_ref(), family).await {
            Err(Error::KernelUnfit { .. }) => return Ok(None),
            got => got.map_err(wrong)?,
        };
        let mut worst = 0.0_f64;
        for (operand, budget) in Operand::GRADIENTS.into_iter().zip(budgets) {
            let (Some(layout), Some(tensor)) = (problem.layout(operand), got.get(operand)) else { continue };
            let number = |at| f64::from(tensor.as_ref().get(layout.index(at)));
            let all = case::indices(problem.shape(operand)).map(number);
            let error = reference::max_error(all, oracle.get(operand));
            if error > budget {
                return Err(format!(
                    "{operand}: off by {error:e}, the budget is {budget:e}\n  {}",
                    case.name
                ));
            }
            worst = if budget > 0.0 { worst.max(error / budget) } else { worst };
        }
        Ok(Some(worst))
    }
}
