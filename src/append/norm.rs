//! Norms of queries and keys.

use crate::error::{Error, Result};
#[cfg(doc)]
use crate::problem::AttentionProblem;

/// What queries or keys are divided by before they are turned and compared (QK-norm).
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum QkNorm {
    /// `x / sqrt(mean(x^2) + epsilon) * gain` over a head's width (Qwen 3, Gemma 3); the gains are an operand
    /// of `[head_dim]` f32 for all heads. (Gemma's checkpoints hold the gains less 1.)
    Rms {
        /// Keeps a row of zeros finite.
        epsilon: f32,
    },
    /// `x / max(|x|, epsilon)` (Henry 2020, arXiv 2010.04245), and no `1/sqrt(D)` behind it. Its learned factor is the
    /// problem's [`scale`](AttentionProblem::scale): give one, or [`Similarity::Dot`](crate::Similarity::Dot). A
    /// [`Layer`](crate::Layer) without either is an error; what [`Append`](crate::Append) writes is compared by another
    /// problem, which it does not know.
    L2 {
        /// Keeps a row of zeros finite.
        epsilon: f32,
    },
}

impl QkNorm {
    /// Normalises a row in place, as the kernels do; `gain` is 1 where there is none.
    ///
    /// # Panics
    /// When there are fewer gains than elements.
    pub fn apply(self, row: &mut [f32], gain: Option<&[f32]>) {
        let sum: f32 = row.chunks(16).map(|part| part.iter().map(|x| x * x).sum::<f32>()).sum();
        let factor = match self {
            Self::Rms { epsilon } => 1.0 / (sum / row.len() as f32 + epsilon).sqrt(),
            Self::L2 { epsilon } => 1.0 / sum.sqrt().max(epsilon),
        };
        for (d, x) in row.iter_mut().enumerate() {
            *x *= factor * gain.map_or(1.0, |gain| gain[d]);
        }
    }

    /// Whether its epsilon keeps a row of zeros finite.
    pub(crate) fn validate(self) -> Result<()> {
        let got = self.epsilon();
        // Devices flush what is not normal: a row of zeros would be divided by zero.
        let need = "a normal number above 0";
        if got.is_normal() && got > 0.0 {
            Ok(())
        } else {
            Err(Error::BadNumber { what: "norm's epsilon", got, need })
        }
    }

    pub(crate) fn epsilon(self) -> f32 {
        match self {
            Self::Rms { epsilon } | Self::L2 { epsilon } => epsilon,
        }
    }
}
