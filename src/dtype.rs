//! Element types and typed slices.

use half::{bf16, f16};

/// How q, k, v, o and the bias lie in memory. Softmax and sums are f32 whatever the storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Dtype {
    /// IEEE binary32.
    #[default]
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
}

impl Dtype {
    /// Every element type.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The nearest value that this type can store (ties to even), as f32.
    pub fn round(self, x: f32) -> f32 {
        match self {
            Self::F32 => x,
            Self::F16 => f16::from_f32(x).to_f32(),
            Self::Bf16 => bf16::from_f32(x).to_f32(),
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}

/// A borrowed operand of any element type.
#[derive(Clone, Copy, Debug)]
pub enum TensorRef<'a> {
    /// f32 elements.
    F32(&'a [f32]),
    /// f16 elements.
    F16(&'a [f16]),
    /// bf16 elements.
    Bf16(&'a [bf16]),
}

impl<'a> TensorRef<'a> {
    /// The element type.
    pub fn dtype(&self) -> Dtype {
        match self {
            Self::F32(_) => Dtype::F32,
            Self::F16(_) => Dtype::F16,
            Self::Bf16(_) => Dtype::Bf16,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(x) => x.len(),
            Self::F16(x) => x.len(),
            Self::Bf16(x) => x.len(),
        }
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One element, widened (exactly) to f32.
    ///
    /// # Panics
    /// When `index` is out of bounds.
    pub fn get(&self, index: usize) -> f32 {
        match self {
            Self::F32(x) => x[index],
            Self::F16(x) => x[index].to_f32(),
            Self::Bf16(x) => x[index].to_f32(),
        }
    }

    /// The bytes, as a buffer upload wants them.
    pub fn bytes(&self) -> &'a [u8] {
        match self {
            Self::F32(x) => bytemuck::cast_slice(x),
            Self::F16(x) => bytemuck::cast_slice(x),
            Self::Bf16(x) => bytemuck::cast_slice(x),
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

/// An owned tensor of any element type.
#[derive(Clone, Debug, PartialEq)]
pub enum Tensor {
    /// f32 elements.
    F32(Vec<f32>),
    /// f16 elements.
    F16(Vec<f16>),
    /// bf16 elements.
    Bf16(Vec<bf16>),
}

impl Tensor {
    /// `len` zeros.
    pub fn zeros(dtype: Dtype, len: usize) -> Self {
        match dtype {
            Dtype::F32 => Self::F32(vec![0.0; len]),
            Dtype::F16 => Self::F16(vec![f16::ZERO; len]),
            Dtype::Bf16 => Self::Bf16(vec![bf16::ZERO; len]),
        }
    }

    /// `values` rounded (ties to even) to `dtype`.
    pub fn from_f32(dtype: Dtype, values: &[f32]) -> Self {
        match dtype {
            Dtype::F32 => Self::F32(values.to_vec()),
            Dtype::F16 => Self::F16(values.iter().map(|&x| f16::from_f32(x)).collect()),
            Dtype::Bf16 => Self::Bf16(values.iter().map(|&x| bf16::from_f32(x)).collect()),
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
        }
    }

    /// A borrowed view.
    pub fn as_ref(&self) -> TensorRef<'_> {
        match self {
            Self::F32(x) => TensorRef::F32(x),
            Self::F16(x) => TensorRef::F16(x),
            Self::Bf16(x) => TensorRef::Bf16(x),
        }
    }

    /// Stores `value`, rounded (ties to even), at `index`.
    ///
    /// # Panics
    /// When `index` is out of bounds.
    pub fn set(&mut self, index: usize, value: f32) {
        match self {
            Self::F32(x) => x[index] = value,
            Self::F16(x) => x[index] = f16::from_f32(value),
            Self::Bf16(x) => x[index] = bf16::from_f32(value),
        }
    }

    /// Every element, widened to f32.
    pub fn to_f32(&self) -> Vec<f32> {
        match self {
            Self::F32(x) => x.clone(),
            Self::F16(x) => x.iter().map(|x| x.to_f32()).collect(),
            Self::Bf16(x) => x.iter().map(|x| x.to_f32()).collect(),
        }
    }
}
