//! Blocks of k and v as f32 rows: borrowed where they already are that, converted otherwise.

use crate::cache::KvRows;
use crate::dtype::TensorRef;

/// k or v, of any element type, layout and cache.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) tensor: TensorRef<'a>,
    pub(super) rows: KvRows<'a>,
    pub(super) dim: usize,
}

/// Rows of f32: row `j` starts at `data[j * stride]`.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) data: &'a [f32],
    pub(super) stride: usize,
}

impl<'a> Source<'a> {
    /// `count` rows from row `start` of one head. `buffer` is used unless the rows can be borrowed
    /// (`copy` forbids that).
    #[inline(always)]
    pub(super) fn rows<'b>(
        &self,
        [batch, head, start]: [usize; 3],
        count: usize,
        copy: bool,
        buffer: &'b mut Vec<f32>,
    ) -> Rows<'b>
    where
        'a: 'b,
    {
        let at = |row: usize| self.rows.index([batch, head, start + row]);
        let step = self.rows.step();
        let unit = step == 1 || self.dim == 1;
        if let (TensorRef::F32(x), Some(stride), true, false) = (self.tensor, self.rows.stride(), unit, copy)
        {
            return Rows { data: &x[at(0)..], stride };
        }
        buffer.resize(count * self.dim, 0.0);
        for (row, to) in buffer.chunks_exact_mut(self.dim).enumerate() {
            read(&self.tensor, at(row), if unit { 1 } else { step }, to);
        }
        Rows { data: buffer, stride: self.dim }
    }
}

/// `to[i] = from[at + i * step]`, widened; all of a quantised row.
#[inline(always)]
pub(super) fn read(from: &TensorRef<'_>, at: usize, step: usize, to: &mut [f32]) {
    match from {
        TensorRef::Int8(_) | TensorRef::Int4(_) => {
            let dim = to.len();
            to.iter_mut().enumerate().for_each(|(d, to)| *to = from.element(at, 1, dim, d));
        }
        _ if step != 1 => to.iter_mut().enumerate().for_each(|(i, to)| *to = from.get(at + i * step)),
        TensorRef::F32(x) => to.copy_from_slice(&x[at..][..to.len()]),
        TensorRef::F16(x) => to.iter_mut().zip(&x[at..]).for_each(|(to, x)| *to = widen_f16(x.to_bits())),
        TensorRef::Bf16(x) => {
            to.iter_mut()
                .zip(&x[at..])
                .for_each(|(to, x)| *to = f32::from_bits(u32::from(x.to_bits()) << 16));
        }
    }
}

/// f16 to f32, exactly and without a branch, so that it becomes vector code.
#[inline(always)]
fn widen_f16(bits: u16) -> f32 {
    let bits = u32::from(bits);
    // The fields in f32's places make a number that is 2^112 times too small, subnormals included.
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * 2f32.powi(112);
    let special = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(magnitude.to_bits() | special | (bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_f16_widens_exactly() {
        for bits in 0..=u16::MAX {
            let (got, want) = (super::widen_f16(bits), half::f16::from_bits(bits).to_f32());
            assert!(got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()), "{bits:#x}");
        }
    }
}
