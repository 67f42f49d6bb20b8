//! Gradients of a random problem, held to the oracle.

use wgpu_attention::reference::{self, Gradients};
use wgpu_attention::{
    Attention, AttentionProblem, BackwardOutputs, BackwardProblem, Error, Family, Inputs, Operand, Tensor,
};

use super::random::each_index;
use super::tally::Tally;
use crate::prng::Prng;

/// The families that have kernels for gradients, and what the names of those end with.
const FAMILIES: [(Family, &str); 2] = [(Family::FusedTile, ""), (Family::FusedRow, "_row")];

/// Forward and backward pass of a problem that has gradients, by each kernel, and what they are off by in terms of their
/// budgets.
pub(crate) fn check(
    engine: &Attention,
    problem: &BackwardProblem,
    inputs: &Inputs<'_>,
    prng: &mut Prng,
    tally: &mut Tally,
    what: &str,
) -> wgpu_attention::Result<()> {
    let dtype = problem.attention.out_dtype;
    // Poison wherever no kernel may read.
    let mut dout = Tensor::from_f32(dtype, &vec![f32::NAN; problem.extent(Operand::Dout) as usize]);
    each_index(&problem.dout, problem.shape(Operand::Dout), |at| dout.set(at, prng.normal()));
    let oracle = reference::backward(problem, inputs, dout.as_ref())?;
    let naive = reference::backward_naive(problem, inputs, dout.as_ref())?;
    let budgets = reference::backward_tolerance(problem, &oracle, &naive);
    for (family, kernel) in FAMILIES {
        let got = pollster::block_on(engine.run_backward_with(problem, inputs, dout.as_ref(), family));
        let errors = match &got {
            Err(Error::KernelUnfit { .. }) => continue,
            got => got.as_ref().map(|got| errors(problem, got, &oracle)),
        };
        for (at, operand) in Operand::GRADIENTS.into_iter().enumerate() {
            if problem.layout(operand).is_none() {
                continue;
            }
            let (ratio, how) = match &errors {
                Ok(errors) if errors[at] == 0.0 => (0.0, String::new()),
                Ok(errors) => {
                    let how = format!("error {:.2e}, the budget is {:.2e}", errors[at], budgets[at]);
                    (errors[at] / budgets[at], how)
                }
                Err(error) => (f64::INFINITY, error.to_string()),
            };
            // Bias and sinks have one kernel each.
            let kernel = if matches!(operand, Operand::Dbias | Operand::Dsinks) { "" } else { kernel };
            let kernel = format!("backward_{operand}{kernel}");
            if ratio > 1.0 {
                tally.fault(format!("{what}, {kernel}: {how}"));
            }
            tally.result(&[kernel], problem.attention.dtype, ratio);
        }
    }
    Ok(())
}

/// The largest error of each gradient; infinite where something was written between its elements.
fn errors(problem: &BackwardProblem, got: &BackwardOutputs, oracle: &Gradients) -> [f64; 5] {
    let of = |operand| {
        let (Some(layout), Some(tensor)) = (problem.layout(operand), got.get(operand)) else {
            return f64::INFINITY;
        };
        let (x, want) = (tensor.as_ref(), oracle.get(operand));
        let (mut gap, mut values) = (vec![true; x.len()], Vec::with_capacity(want.len()));
        each_index(&layout, problem.shape(operand), |at| {
            gap[at] = false;
            values.push(f64::from(x.get(at)));
        });
        let touched = gap.iter().enumerate().any(|(at, &gap)| gap && x.get(at).to_bits() != 0);
        if touched { f64::INFINITY } else { reference::max_error(values, want) }
    };
    Operand::GRADIENTS.map(of)
}

/// The backward pass of a problem, if there is one.
pub(crate) fn of(problem: &AttentionProblem) -> Option<BackwardProblem> {
    let backward = BackwardProblem::of(problem);
    backward.validate().is_ok().then_some(backward)
}
