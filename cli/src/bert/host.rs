//! The parts of the model that stay on the host, in f32 with sums in f64.

use super::Tokens;

/// Tables of what a token, a position and a kind of text add up to.
pub(crate) struct Embeddings {
    pub(crate) words: Vec<f32>,
    pub(crate) positions: Vec<f32>,
    pub(crate) kinds: Vec<f32>,
    pub(crate) norm: Norm,
}

impl Embeddings {
    /// The rows of all texts, one after the other.
    pub(crate) fn of(&self, texts: &[Tokens]) -> Vec<f32> {
        let width = self.norm.gain.len();
        let row = |table: &'_ [f32], at: usize| -> Vec<f32> { table[at * width..][..width].to_vec() };
        let mut rows = Vec::new();
        for text in texts {
            for (position, (&id, &kind)) in text.ids.iter().zip(&text.kinds).enumerate() {
                let word = row(&self.words, id as usize);
                let kind = row(&self.kinds, kind as usize);
                let position = row(&self.positions, position);
                rows.extend(word.iter().zip(kind).zip(position).map(|((w, k), p)| w + k + p));
            }
        }
        self.norm.apply(&mut rows);
        rows
    }
}

/// Layer normalisation.
pub(crate) struct Norm {
    pub(crate) gain: Vec<f32>,
    pub(crate) bias: Vec<f32>,
    pub(crate) eps: f64,
}

impl Norm {
    /// `x = norm(x + residual)`, row by row.
    pub(crate) fn of_sums(&self, x: &mut [f32], residual: &[f32]) {
        for (x, residual) in x.iter_mut().zip(residual) {
            *x += residual;
        }
        self.apply(x);
    }

    fn apply(&self, x: &mut [f32]) {
        let width = self.gain.len();
        for row in x.chunks_exact_mut(width) {
            let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / width as f64;
            let variance = row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / width as f64;
            let scale = 1.0 / (variance + self.eps).sqrt();
            for (x, (gain, bias)) in row.iter_mut().zip(self.gain.iter().zip(&self.bias)) {
                *x = ((f64::from(*x) - mean) * scale) as f32 * gain + bias;
            }
        }
    }
}

/// GELU by the error function, not by its approximation with tanh.
pub(crate) fn gelu(x: &mut [f32]) {
    for x in x {
        *x *= 0.5 * (1.0 + libm::erff(*x * std::f32::consts::FRAC_1_SQRT_2));
    }
}

/// The mean of rows of `width`, of length 1.
pub(crate) fn mean_of_rows(rows: &[f32], width: usize) -> Vec<f32> {
    let mut sum = vec![0.0; width];
    for row in rows.chunks_exact(width) {
        for (sum, &x) in sum.iter_mut().zip(row) {
            *sum += f64::from(x);
        }
    }
    // The mean and the sum have one direction.
    let length = sum.iter().map(|x| x * x).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
    sum.into_iter().map(|x| (x / length) as f32).collect()
}
