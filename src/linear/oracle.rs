//! The linear map in f64, element by element: what the kernels and the CPU path are held to.

use super::{LinearProblem, OPERANDS};
use crate::dtype::TensorRef;
use crate::error::{Error, Operand, Result};

/// The operands of a linear map as slices, laid out as the [`LinearProblem`] says.
#[derive(Clone, Copy, Debug)]
pub struct LinearInputs<'a> {
    /// What is mapped.
    pub x: TensorRef<'a>,
    /// The weights.
    pub w: TensorRef<'a>,
    /// What is added, if the problem says so.
    pub bias: Option<TensorRef<'a>>,
}

impl<'a> LinearInputs<'a> {
    /// Those that every problem has.
    pub fn new(x: impl Into<TensorRef<'a>>, w: impl Into<TensorRef<'a>>) -> Self {
        Self { x: x.into(), w: w.into(), bias: None }
    }

    fn get(&self, operand: Operand) -> Option<TensorRef<'a>> {
        match operand {
            Operand::X => Some(self.x),
            Operand::W => Some(self.w),
            Operand::Bias => self.bias,
            _ => None,
        }
    }

    /// Checks the problem, and these slices against it.
    ///
    /// # Errors
    /// Those of [`LinearProblem::validate`], and [`Error::MissingOperand`], [`Error::UnexpectedOperand`],
    /// [`Error::DtypeMismatch`] and [`Error::OutOfBounds`].
    pub fn check(&self, problem: &LinearProblem) -> Result<()> {
        problem.validate()?;
        for operand in OPERANDS.into_iter().filter(|&operand| operand != Operand::Y) {
            let layout = problem.layout(operand);
            let tensor = operand.brought(layout.is_some(), self.get(operand))?;
            let (Some((_, dtype)), Some(tensor)) = (layout, tensor) else { continue };
            let (need, got) = (dtype, tensor.dtype());
            if need != got {
                return Err(Error::DtypeMismatch { operand, need, got });
            }
            let (need, got) = (problem.extent(operand) as u64, tensor.len() as u64);
            if need > got {
                let (unit, container) = ("elements", "slice");
                return Err(Error::OutOfBounds { operand, need, got, unit, container });
            }
        }
        Ok(())
    }
}

/// What [`linear`] gives.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearReference {
    /// `[rows, outputs]`.
    pub y: Vec<f64>,
    /// The same with every product and the bias by their magnitudes: `sum |x| |w| + |b|`, the scale of
    /// rounding errors.
    pub scale: Vec<f64>,
}

impl LinearReference {
    /// The largest error that a path may have in element `i`: that of f32 sums, and of one rounding to a
    /// narrower [`LinearProblem::out_dtype`].
    pub fn tolerance(&self, problem: &LinearProblem, i: usize) -> f64 {
        let rounding = problem.out_dtype.rounding();
        // Numbers below the smallest normal one lose relative precision.
        8.0 * 2f64.powi(-24) * self.scale[i] + rounding * (self.y[i].abs() + 1e-4)
    }
}

/// The linear map of [`LinearProblem`] in f64.
///
/// ```
/// use wgpu_attention::{LinearInputs, LinearProblem, reference};
/// let (x, w) = ([1.0_f32, 2.0], [3.0_f32, 4.0, 5.0, 6.0]);
/// let inputs = LinearInputs::new(&x[..], &w[..]);
/// let problem = LinearProblem::new(1, 2, 2);
/// assert_eq!(reference::linear(&problem, &inputs)?.y, [11.0, 17.0]);
/// assert_eq!(reference::linear(&problem.with_transposed_weights(), &inputs)?.y, [13.0, 16.0]);
/// # Ok::<(), wgpu_attention::Error>(())
/// ```
///
/// # Errors
/// Those of [`LinearInputs::check`].
pub fn linear(problem: &LinearProblem, inputs: &LinearInputs<'_>) -> Result<LinearReference> {
    inputs.check(problem)?;
    let p = problem;
    let mut out = LinearReference { y: Vec::new(), scale: Vec::new() };
    for row in 0..p.rows {
        for output in 0..p.outputs {
            let bias = match (p.bias, inputs.bias) {
                (Some(bias), Some(values)) => values.get(bias.layout.index([0, 0, row, output])).into(),
                _ => 0.0,
            };
            let (mut sum, mut scale) = (bias, f64::abs(bias));
            for input in 0..p.inputs {
                let x = f64::from(inputs.x.get(p.x.index([0, 0, row, input])));
                let product = x * f64::from(inputs.w.get(p.w.index([0, 0, output, input])));
                sum += product;
                scale += product.abs();
            }
            out.y.push(sum);
            out.scale.push(scale);
        }
    }
    Ok(out)
}
