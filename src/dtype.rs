//! Element types and typed slices.

use half::{bf16, f16};

use crate::quant;

/// How q, k, v, o and the bias lie in memory. Softmax and sums are f32 whatever the storage.
///
/// k and v alone may also be quantised: [`quantize`](crate::quantize) has the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Dtype {
    /// IEEE binary32.
    #[default]
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
    /// 8-bit codes with a scale and a lowest value for each row of a head.
    Int8,
    /// 4-bit codes with a scale and a lowest value for each 16 elements.
    Int4,
}

impl Dtype {
    /// The element types that every tensor may have.
    pub const FLOATS: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// Those that k and v may have.
    pub const ALL: &'static [Self] = &[Self::F32, Self::F16, Self::Bf16, Self::Int8, Self::Int4];

    /// Whether a stored element is a number by itself.
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::Bf16)
    }

    /// Bytes of one stored element; those of a quantised row are u32 words.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 | Self::Int8 | Self::Int4 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The nearest value that this type can store (ties to even), as f32. What a quantised one stores
    /// depends on an element's neighbours: the value stays.
    pub fn round(self, x: f32) -> f32 {
        match self {
            Self::F32 | Self::Int8 | Self::Int4 => x,
            Self::F16 => f16::from_f32(x).to_f32(),
            Self::Bf16 => bf16::from_f32(x).to_f32(),
        }
    }

    /// The largest relative error of [`round`](Self::round), where a number is a normal one of this type.
    pub(crate) fn rounding(self) -> f64 {
        match self {
            Self::F32 | Self::Int8 | Self::Int4 => 0.0,
            Self::F16 => 2f64.powi(-11),
            Self::Bf16 => 2f64.powi(-8),
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        })
    }
}

/// A borrowed operand of any element type.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum TensorRef<'a> {
    /// f32 elements.
    F32(&'a [f32]),
    /// f16 elements.
    F16(&'a [f16]),
    /// bf16 elements.
    Bf16(&'a [bf16]),
    /// The words of rows of 8-bit codes.
    Int8(&'a [u32]),
    /// The words of rows of 4-bit codes.
    Int4(&'a [u32]),
}

impl<'a> TensorRef<'a> {
    /// The element type.
    pub fn dtype(&self) -> Dtype {
        match self {
            Self::F32(_) => Dtype::F32,
            Self::F16(_) => Dtype::F16,
            Self::Bf16(_) => Dtype::Bf16,
            Self::Int8(_) => Dtype::Int8,
            Self::Int4(_) => Dtype::Int4,
        }
    }

    /// Number of stored elements.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(x) => x.len(),
            Self::F16(x) => x.len(),
            Self::Bf16(x) => x.len(),
            Self::Int8(x) | Self::Int4(x) => x.len(),
        }
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One element, widened (exactly) to f32. A word of a quantised row is no number: it gives NaN
    /// ([`dequantize`](crate::dequantize) gives the row's numbers).
    ///
    /// # Panics
    /// When `index` is out of bounds.
    pub fn get(&self, index: usize) -> f32 {
        match self {
            Self::F32(x) => x[index],
            Self::F16(x) => x[index].to_f32(),
            Self::Bf16(x) => x[index].to_f32(),
            Self::Int8(_) | Self::Int4(_) => f32::NAN,
        }
    }

    /// Element `d` of the row of `dim` numbers that begins at stored element `row`, its elements `step`
    /// apart where they are floats.
    pub(crate) fn element(&self, row: usize, step: usize, dim: usize, d: usize) -> f32 {
        match self {
            Self::Int8(x) | Self::Int4(x) => quant::element(self.dtype(), &x[row..], dim, d),
            _ => self.get(row + d * step),
        }
    }

    /// The bytes, as a buffer upload wants them.
    pub fn bytes(&self) -> &'a [u8] {
        match self {
            Self::F32(x) => bytemuck::cast_slice(x),
            Self::F16(x) => bytemuck::cast_slice(x),
            Self::Bf16(x) => bytemuck::cast_slice(x),
            Self::Int8(x) | Self::Int4(x) => bytemuck::cast_slice(x),
        }
    }
}

impl<'a> From<&'a [f32]> for TensorRef<'a> {
    fn from(x: &'a [f32]) -> Self {
        Self::F32(x)
    }
}

impl<'a> From<&'a [f16]> for TensorRef<'a> {
    fn from(x: &'a [f16]) -> Self {
        Self::F16(x)
    }
}

impl<'a> From<&'a [bf16]> for TensorRef<'a> {
    fn from(x: &'a [bf16]) -> Self {
        Self::Bf16(x)
    }
}

impl<'a, T, const N: usize> From<&'a [T; N]> for TensorRef<'a>
where
    Self: From<&'a [T]>,
{
    fn from(x: &'a [T; N]) -> Self {
        x.as_slice().into()
    }
}

impl<'a, T> From<&'a Vec<T>> for TensorRef<'a>
where
    Self: From<&'a [T]>,
{
    fn from(x: &'a Vec<T>) -> Self {
        x.as_slice().into()
    }
}

impl<'a> From<&'a Tensor> for TensorRef<'a> {
    fn from(x: &'a Tensor) -> Self {
        x.as_ref()
    }
}

/// An owned tensor of any element type.
///
/// ```
/// use wgpu_attention::{Dtype, Inputs, Tensor};
/// let q = vec![0.5; 64];
/// let (k, v) = (Tensor::from_f32(Dtype::F16, &q), Tensor::zeros(Dtype::F16, 64));
/// assert_eq!((k.dtype(), v.len()), (Dtype::F16, 64));
/// let inputs = Inputs::new(&q, &k, &v);
/// # assert_eq!(inputs.q.len(), 64);
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Tensor {
    /// f32 elements.
    F32(Vec<f32>),
    /// f16 elements.
    F16(Vec<f16>),
    /// bf16 elements.
    Bf16(Vec<bf16>),
    /// The words of rows of 8-bit codes.
    Int8(Vec<u32>),
    /// The words of rows of 4-bit codes.
    Int4(Vec<u32>),
}

impl Tensor {
    /// `len` stored elements, all zero.
    pub fn zeros(dtype: Dtype, len: usize) -> Self {
        match dtype {
            Dtype::F32 => Self::F32(vec![0.0; len]),
            Dtype::F16 => Self::F16(vec![f16::ZERO; len]),
            Dtype::Bf16 => Self::Bf16(vec![bf16::ZERO; len]),
            Dtype::Int8 => Self::Int8(vec![0; len]),
            Dtype::Int4 => Self::Int4(vec![0; len]),
        }
    }

    /// `values` rounded (ties to even) to `dtype`; as one quantised row where it is none of floats.
    pub fn from_f32(dtype: Dtype, values: &[f32]) -> Self {
        match dtype {
            Dtype::F32 => Self::F32(values.to_vec()),
            Dtype::F16 => Self::F16(values.iter().map(|&x| f16::from_f32(x)).collect()),
            Dtype::Bf16 => Self::Bf16(values.iter().map(|&x| bf16::from_f32(x)).collect()),
            Dtype::Int8 | Dtype::Int4 => quant::quantize(dtype, values, values.len()),
        }
    }

    /// The little-endian bytes of a tensor, as a readback brings them; a trailing part of an
    /// element is ignored.
    pub fn from_bytes(dtype: Dtype, bytes: &[u8]) -> Self {
        fn collect<T: bytemuck::AnyBitPattern>(bytes: &[u8]) -> Vec<T> {
            let whole = bytes.len() / size_of::<T>() * size_of::<T>();
            bytes[..whole].chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
        }
        match dtype {
            Dtype::F32 => Self::F32(collect(bytes)),
            Dtype::F16 => Self::F16(collect(bytes)),
            Dtype::Bf16 => Self::Bf16(collect(bytes)),
            Dtype::Int8 => Self::Int8(collect(bytes)),
            Dtype::Int4 => Self::Int4(collect(bytes)),
        }
    }

    /// The element type.
    pub fn dtype(&self) -> Dtype {
        self.as_ref().dtype()
    }

    /// Number of stored elements.
    pub fn len(&self) -> usize {
        self.as_ref().len()
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A borrowed view.
    pub fn as_ref(&self) -> TensorRef<'_> {
        match self {
            Self::F32(x) => TensorRef::F32(x),
            Self::F16(x) => TensorRef::F16(x),
            Self::Bf16(x) => TensorRef::Bf16(x),
            Self::Int8(x) => TensorRef::Int8(x),
            Self::Int4(x) => TensorRef::Int4(x),
        }
    }

    /// Stores `value`, rounded (ties to even), at `index`; its bits where the elements are words.
    ///
    /// # Panics
    /// When `index` is out of bounds.
    pub fn set(&mut self, index: usize, value: f32) {
        match self {
            Self::F32(x) => x[index] = value,
            Self::F16(x) => x[index] = f16::from_f32(value),
            Self::Bf16(x) => x[index] = bf16::from_f32(value),
            Self::Int8(x) | Self::Int4(x) => x[index] = value.to_bits(),
        }
    }

    /// Every element, widened to f32; NaN for each word of a quantised one.
    pub fn to_f32(&self) -> Vec<f32> {
        match self {
            Self::F32(x) => x.clone(),
            Self::F16(x) => x.iter().map(|x| x.to_f32()).collect(),
            Self::Bf16(x) => x.iter().map(|x| x.to_f32()).collect(),
            Self::Int8(x) | Self::Int4(x) => vec![f32::NAN; x.len()],
        }
    }
}
