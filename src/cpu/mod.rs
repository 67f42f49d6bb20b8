//! The fast CPU path: attention without a device, on every core and with the widest vectors that
//! the machine has.
//!
//! One pass over the keys with an online softmax (Milakov & Gimelshein 2018; FlashAttention,
//! Dao 2022), tile by tile, so that memory grows with the sequence and not with its square. Query
//! rows lie across vector lanes. Query heads that share a key-value head share tiles when the
//! rows are few, and few rows with many keys split the keys over the cores (Flash-Decoding).
//!
//! [`linear()`] is the projections around it.
//!
//! Every option, element type and layout of [`AttentionProblem`] is served. Sums are f32.
//!
//! ```
//! use wgpu_attention::{AttentionProblem, Inputs, cpu};
//! let problem = AttentionProblem::new(1, 2, 2, 16, 16, 8, 8);
//! let x: Vec<f32> = (0..2 * 16 * 8).map(|i| (i as f32 * 0.37).sin()).collect();
//! let out = cpu::attention(&problem, &Inputs::new(&x[..], &x[..], &x[..]))?;
//! assert_eq!(out.o.to_f32().len(), x.len());
//! # Ok::<(), wgpu_attention::Error>(())
//! ```

mod additive;
mod cosine;
mod few;
mod kernel;
mod lanes;
mod layer;
mod linear;
mod load;
mod math;
mod output;
mod ragged;
mod schedule;
mod score;
mod scratch;
mod state;
#[cfg(test)]
mod tests;
mod tile;
mod transpose;

use crate::dtype::Tensor;
use crate::error::{Operand, Result};
use crate::host::{Inputs, Outputs};
use crate::problem::AttentionProblem;
use lanes::Context;
pub use layer::layer;
pub use linear::{linear, linear_into};
use output::{RowsOut, TileOut};
use pulp::Arch as Isa;

/// Computes one attention call on the CPU.
///
/// ```
/// use wgpu_attention::{Align, AttentionProblem, Inputs, cpu};
/// // One head, two queries, two keys; the first query sees the first key alone.
/// let problem = AttentionProblem {
///     causal: Some(Align::TopLeft),
///     lse: true,
///     ..AttentionProblem::new(1, 1, 1, 2, 2, 1, 1)
/// };
/// let (q, k, v) = ([1.0_f32, 0.0], [2.0_f32, 5.0], [3.0_f32, 4.0]);
/// let out = cpu::attention(&problem, &Inputs::new(&q[..], &k[..], &v[..]))?;
/// assert_eq!(out.o.to_f32(), [3.0, 3.5]);
/// assert_eq!(out.lse.unwrap()[0], 2.0);
/// # Ok::<(), wgpu_attention::Error>(())
/// ```
///
/// # Errors
/// Those of [`Inputs::check`].
pub fn attention(problem: &AttentionProblem, inputs: &Inputs<'_>) -> Result<Outputs> {
    inputs.check(problem)?;
    let mut outputs = Outputs::zeros(problem);
    compute(problem, inputs, &mut outputs, Isa::new());
    Ok(outputs)
}

/// [`attention`] into memory of an earlier call. Outputs that do not fit the problem are replaced;
/// in those that fit, what lies between o's elements is left as it was.
///
/// ```
/// use wgpu_attention::{AttentionProblem, Inputs, cpu};
/// let problem = AttentionProblem::new(1, 1, 1, 1, 2, 1, 1);
/// let (q, k) = ([0.0_f32], [1.0_f32, 2.0]);
/// let mut out = cpu::attention(&problem, &Inputs::new(&q[..], &k[..], &[1.0_f32, 3.0][..]))?;
/// cpu::attention_into(&problem, &Inputs::new(&q[..], &k[..], &[5.0_f32, 7.0][..]), &mut out)?;
/// assert_eq!(out.o.to_f32(), [6.0]);
/// # Ok::<(), wgpu_attention::Error>(())
/// ```
///
/// # Errors
/// Those of [`Inputs::check`]; the outputs are then untouched.
pub fn attention_into(problem: &AttentionProblem, inputs: &Inputs<'_>, outputs: &mut Outputs) -> Result<()> {
    inputs.check(problem)?;
    if !output::fits(problem, outputs) {
        *outputs = Outputs::zeros(problem);
    }
    compute(problem, inputs, outputs, Isa::new());
    Ok(())
}

/// The call itself, checks done, with a given instruction set.
fn compute(problem: &AttentionProblem, inputs: &Inputs<'_>, outputs: &mut Outputs, isa: Isa) {
    if problem.rows() == 0 {
        return;
    }
    if ragged::is_ragged(problem) {
        // Rows of the weights that no query has are zeros.
        outputs.weights.iter_mut().for_each(|weights| weights.fill(0.0));
        return ragged::run(problem, inputs, outputs, isa);
    }
    let context = Context::new(problem, inputs);
    let mut contiguous = None;
    let mut rows = match RowsOut::new(problem, &mut outputs.o) {
        Some(rows) => rows,
        None => {
            let dense = AttentionProblem {
                o: crate::Layout::bhsd(problem.heads_q, problem.seq_q, problem.head_dim_v),
                ..problem.clone()
            };
            let zeros = Tensor::zeros(problem.out_dtype, dense.extent(Operand::O) as usize);
            let Some(rows) = RowsOut::new(&dense, contiguous.insert(zeros)) else { return };
            rows
        }
    };
    let out =
        TileOut { o: rows.all(), lse: outputs.lse.as_deref_mut(), weights: outputs.weights.as_deref_mut() };
    schedule::run(&context, out, isa);
    drop(rows);
    if let Some(contiguous) = contiguous {
        output::scatter(problem, &contiguous, &mut outputs.o);
    }
}
