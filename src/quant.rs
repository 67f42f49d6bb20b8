//! Quantised rows of keys and values, as caches keep them: unsigned codes with a scale and a lowest value
//! for each group of elements. `shaders/io/load_int8.wgsl` and its kin are the twins.
//!
//! A row of `dim` elements is a run of u32 words: first a word for each group, then the codes.
//!
//! | | [`Dtype::Int8`] | [`Dtype::Int4`] |
//! |---|---|---|
//! | elements of a group | the whole row | 16 |
//! | a group's word | bf16 scale below, bf16 lowest above | the same |
//! | codes of a word | 4, element `d` in bits `8 (d % 4)` | 8, element `d` in bits `4 (d % 8)` |
//!
//! An element is `lowest + scale * code`. Unused bits of the last word may be anything.
//!
//! Why so: a range that need not be symmetric about 0 is a third finer on real keys and values, and bf16
//! reaches as far as f32: a row is too large only where it spans more than f32's largest number, or ends within the last
//! 1/256 of it (it becomes NaN, as one with a number that is not finite). Of 4-bit codes a group of 16 makes up
//! for the few channels of a row that are many times larger than the others, and its range is then moved by
//! least squares to where its codes are least wrong: a fifth less error on real keys and values.

use std::borrow::Cow;

use crate::dtype::{Dtype, Tensor, TensorRef};

/// Elements that share a scale, most codes of a word, bits of a code. `None` for what is not quantised.
pub(crate) const fn format(dtype: Dtype) -> Option<(usize, usize)> {
    match dtype {
        Dtype::Int8 => Some((usize::MAX, 8)),
        Dtype::Int4 => Some((16, 4)),
        Dtype::F32 | Dtype::F16 | Dtype::Bf16 => None,
    }
}

/// How often a group's range is fitted. Two find all that there is to find on real keys and values; 255 steps
/// are so fine that one gains nothing.
pub(crate) const fn fits(dtype: Dtype) -> usize {
    match dtype {
        Dtype::Int4 => 2,
        _ => 0,
    }
}

/// Stored elements of a row of `dim` numbers: `dim` of a float type, and the words of a quantised row. It is
/// what a [`Layout`](crate::Layout) of k or v steps over.
///
/// ```
/// use wgpu_attention::{Dtype, row_elements};
/// assert_eq!(row_elements(Dtype::F16, 64), 64);
/// assert_eq!(row_elements(Dtype::Int8, 64), 1 + 64 / 4);
/// assert_eq!(row_elements(Dtype::Int4, 64), 4 + 64 / 8);
/// ```
pub const fn row_elements(dtype: Dtype, dim: usize) -> usize {
    match format(dtype) {
        None => dim,
        Some((_, bits)) => group_words(dtype, dim) + dim.div_ceil(32 / bits),
    }
}

/// Words before a row's codes.
pub(crate) const fn group_words(dtype: Dtype, dim: usize) -> usize {
    match format(dtype) {
        None => 0,
        Some((group, _)) => dim.div_ceil(group),
    }
}

/// The smallest bf16 that is not below a positive number.
fn bf16_above(x: f32) -> f32 {
    f32::from_bits(x.to_bits().saturating_add(0xffff) & 0xffff_0000)
}

/// The largest bf16 that is not above a number.
fn bf16_below(x: f32) -> f32 {
    if x < 0.0 { -bf16_above(-x) } else { f32::from_bits(x.to_bits() & 0xffff_0000) }
}

/// The nearest bf16.
fn bf16_near(x: f32) -> f32 {
    f32::from_bits(x.to_bits().saturating_add(0x8000) & 0xffff_0000)
}

/// A group's lowest value and the step from code to code.
#[derive(Clone, Copy)]
struct Range {
    lowest: f32,
    scale: f32,
    levels: f32,
}

impl Range {
    /// From the least to the most of a group; NaN where one of it is not finite.
    fn of(x: &[f32], levels: f32) -> Self {
        let least = x.iter().copied().fold(f32::INFINITY, f32::min);
        let most = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let lowest = bf16_below(least);
        let [lowest, scale] = if x.iter().all(|x| x.is_finite()) {
            [lowest, bf16_above((most - lowest) / levels)]
        } else {
            [f32::NAN; 2]
        };
        Self { lowest, scale, levels }
    }

    /// 0 where the scale is 0 or NaN.
    fn code(self, x: f32) -> f32 {
        if self.scale > 0.0 {
            ((x - self.lowest) / self.scale + 0.5).floor().clamp(0.0, self.levels)
        } else {
            0.0
        }
    }

    /// Squares of what the codes of `x` are wrong by, in steps of another range: never too large for f32.
    fn error(self, x: &[f32], step: f32) -> f32 {
        let off = |x: f32| (self.lowest + self.scale * self.code(x) - x) / step;
        x.iter().map(|&x| off(x) * off(x)).sum()
    }

    /// The line through `x` over its codes, if they are not all the same.
    fn fitted(self, x: &[f32]) -> Option<Self> {
        let mean = 1.0 / x.len() as f32;
        let place = |x: f32| (x - self.lowest) / self.scale;
        let mid_code = x.iter().map(|&x| self.code(x)).sum::<f32>() * mean;
        let mid_place = x.iter().map(|&x| place(x)).sum::<f32>() * mean;
        let (mut both, mut square) = (0.0, 0.0);
        for &x in x {
            let code = self.code(x) - mid_code;
            both += code * (place(x) - mid_place);
            square += code * code;
        }
        let step = both / square;
        (square > 0.0).then(|| Self {
            lowest: bf16_near(self.lowest + self.scale * (mid_place - step * mid_code)),
            scale: bf16_near(self.scale * step),
            ..self
        })
    }

    /// Moved so many times to where the codes are less wrong.
    fn refined(self, x: &[f32], fits: usize) -> Self {
        let mut best = self;
        let mut error = self.error(x, self.scale);
        for _ in 0..fits {
            let Some(next) = best.fitted(x) else { break };
            let of_next = next.error(x, self.scale);
            if of_next < error {
                (best, error) = (next, of_next);
            }
        }
        best
    }
}

/// Quantises one row; `words` has [`row_elements`] words. A group with an element that is not finite becomes
/// NaN as a whole.
fn quantize_row(dtype: Dtype, row: &[f32], words: &mut [u32]) {
    let Some((group, bits)) = format(dtype) else { return };
    let levels = ((1 << bits) - 1) as f32;
    words.fill(0);
    let (heads, codes) = words.split_at_mut(group_words(dtype, row.len()));
    let (group, per_word) = (group.min(row.len().max(1)), 32 / bits);
    for (at, (x, head)) in row.chunks(group).zip(heads).enumerate() {
        let range = Range::of(x, levels).refined(x, fits(dtype));
        *head = (range.scale.to_bits() >> 16) | (range.lowest.to_bits() & 0xffff_0000);
        for (i, x) in x.iter().enumerate() {
            let d = at * group + i;
            codes[d / per_word] |= (range.code(*x) as u32) << (bits * (d % per_word));
        }
    }
}

/// Element `d` of the row of `dim` elements that begins at `words[0]`.
pub(crate) fn element(dtype: Dtype, words: &[u32], dim: usize, d: usize) -> f32 {
    let Some((group, bits)) = format(dtype) else { return f32::NAN };
    let head = words[d / group];
    let word = words[group_words(dtype, dim) + d * bits / 32];
    let code = (word >> (d * bits % 32)) & ((1 << bits) - 1);
    f32::from_bits(head & 0xffff_0000) + f32::from_bits(head << 16) * code as f32
}

/// Rows of `dim` numbers as a cache of that type keeps them, one after the other. Where the last row is not whole,
/// zeros follow.
///
/// ```
/// use wgpu_attention::{Dtype, dequantize, quantize};
/// let row: Vec<f32> = (0..64).map(|i| (i as f32 * 0.7).sin()).collect();
/// let cached = quantize(Dtype::Int8, &row, 64);
/// let worst = dequantize(cached.as_ref(), 64).iter().zip(&row).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
/// assert!(worst < 2.1 / 255.0);
/// ```
pub fn quantize(dtype: Dtype, rows: &[f32], dim: usize) -> Tensor {
    let mut whole = Cow::Borrowed(rows);
    if let Some(len) = rows.len().checked_next_multiple_of(dim).filter(|&len| len > rows.len()) {
        whole.to_mut().resize(len, 0.0);
    }
    let stride = row_elements(dtype, dim);
    let mut words = vec![0; whole.len().checked_div(dim).unwrap_or(0) * stride];
    for (row, words) in whole.chunks_exact(dim.max(1)).zip(words.chunks_exact_mut(stride.max(1))) {
        quantize_row(dtype, row, words);
    }
    match dtype {
        Dtype::Int8 => Tensor::Int8(words),
        Dtype::Int4 => Tensor::Int4(words),
        Dtype::F32 | Dtype::F16 | Dtype::Bf16 => Tensor::from_f32(dtype, &whole),
    }
}

/// Rows of `dim` numbers from a cache that has them one after the other; the inverse of [`quantize`], but for
/// its rounding.
pub fn dequantize(cached: TensorRef<'_>, dim: usize) -> Vec<f32> {
    let stride = row_elements(cached.dtype(), dim).max(1);
    let rows = cached.len() / stride;
    (0..rows * dim).map(|at| cached.element(at / dim * stride, 1, dim, at % dim)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_element_is_further_off_than_a_step_or_half_of_one() {
        for dtype in [Dtype::Int8, Dtype::Int4] {
            for dim in [1, 3, 15, 16, 17, 33, 64, 129] {
                for (amplitude, shift) in [(1.0_f32, 0.0), (1e-20, 0.0), (3e30, 0.0), (0.5, 7.0), (0.0, -3.0)]
                {
                    let row: Vec<f32> =
                        (0..dim).map(|i| amplitude * (1.7 * i as f32 + 0.3).sin() + shift).collect();
                    let back = dequantize(quantize(dtype, &row, dim).as_ref(), dim);
                    let levels = if dtype == Dtype::Int8 { 255.0 } else { 15.0 };
                    let largest = row.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
                    // The lowest value may lie 2^-7 of itself lower than the least element.
                    let step = (2.0 * amplitude + largest / 128.0) / levels * 1.01;
                    // A range that was fitted leaves the outermost elements outside.
                    let steps = if dtype == Dtype::Int8 { 0.5 } else { 1.0 };
                    for (a, b) in back.iter().zip(&row) {
                        assert!(
                            (a - b).abs() <= steps * step + 1e-6 * largest,
                            "{dtype} {dim} {a} {b} {step}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn nothing_of_a_last_row_is_lost() {
        let row: Vec<f32> = (0..20).map(|i| i as f32).collect();
        for &dtype in Dtype::ALL {
            let back = dequantize(quantize(dtype, &row, 16).as_ref(), 16);
            assert_eq!(back.len(), 32, "{dtype}");
            assert!(back.iter().zip(&row).all(|(a, b)| (a - b).abs() < 1.1), "{dtype} {back:?}");
            assert_eq!(back[20..], [0.0; 12], "{dtype}");
            assert_eq!(quantize(dtype, &row, 0).as_ref().len(), if dtype.is_float() { 20 } else { 0 });
        }
    }

    #[test]
    fn a_fitted_range_is_less_wrong() {
        let (mut plain, mut fitted) = (0.0, 0.0);
        for seed in 0..200 {
            // As uneven as sums of a few uneven numbers are, and of every size.
            let numbers = |i: usize| ((seed * 16 + i) as f32 * 12.9898).sin() * 43_758.547;
            let x: Vec<f32> = (0..16)
                .map(|i| (0..3).map(|j| numbers(17 * i + j).fract()).product::<f32>())
                .map(|x| x * 10.0_f32.powi(seed as i32 % 60 - 30))
                .collect();
            let range = Range::of(&x, 15.0);
            let [of_range, of_fitted] =
                [range, range.refined(&x, fits(Dtype::Int4))].map(|r| r.error(&x, range.scale));
            assert!(of_fitted <= of_range, "{seed}: {of_fitted} {of_range}");
            (plain, fitted) = (plain + of_range, fitted + of_fitted);
        }
        assert!(fitted < 0.85 * plain, "{fitted} of {plain}");
    }

    #[test]
    fn what_is_not_finite_makes_its_group_nan_and_no_other() {
        let mut row = vec![0.25_f32; 40];
        row[20] = f32::INFINITY;
        let back = dequantize(quantize(Dtype::Int4, &row, 40).as_ref(), 40);
        assert!(back[16..32].iter().all(|x| x.is_nan()));
        assert!(back[..16].iter().chain(&back[32..]).all(|x| *x == 0.25));
    }
}
