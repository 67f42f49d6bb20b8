//! Reads the `.npy` arrays of the fixtures: little-endian, C order, the element types they use.

use std::path::Path;

use half::{bf16, f16};
use wgpu_attention::{Dtype, Tensor};

pub enum Elements {
    F32(Vec<f32>),
    F64(Vec<f64>),
    F16(Vec<f16>),
    /// How the fixtures store bf16.
    U16(Vec<u16>),
    Bool(Vec<u8>),
}

pub struct Npy {
    pub shape: Vec<usize>,
    pub elements: Elements,
}

impl Npy {
    /// # Panics
    /// When the file is missing or is no such array: a fixture that cannot be read is a failure.
    pub fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Self::parse(&bytes).unwrap_or_else(|| panic!("{}: not an array of the fixtures", path.display()))
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let rest = bytes.strip_prefix(b"\x93NUMPY\x01\x00")?;
        let header_len = u16::from_le_bytes([*rest.first()?, *rest.get(1)?]) as usize;
        let header = std::str::from_utf8(rest.get(2..2 + header_len)?).ok()?;
        let data = rest.get(2 + header_len..)?;
        let field = |name: &str| header.split(&format!("'{name}':")).nth(1).map(str::trim_start);
        if !field("fortran_order")?.starts_with("False") {
            return None;
        }
        let shape: Vec<usize> = field("shape")?
            .strip_prefix('(')?
            .split(')')
            .next()?
            .split(',')
            .map(str::trim)
            .filter(|s| !s.is_empty())
            .map(|s| s.parse().ok())
            .collect::<Option<_>>()?;
        let elements = match field("descr")?.split('\'').nth(1)? {
            "<f4" => Elements::F32(bytemuck::pod_collect_to_vec(data)),
            "<f8" => Elements::F64(bytemuck::pod_collect_to_vec(data)),
            "<f2" => Elements::F16(bytemuck::pod_collect_to_vec(data)),
            "<u2" => Elements::U16(bytemuck::pod_collect_to_vec(data)),
            "|b1" => Elements::Bool(data.to_vec()),
            _ => return None,
        };
        let npy = Self { shape, elements };
        (npy.len() == npy.shape.iter().product::<usize>()).then_some(npy)
    }

    pub fn len(&self) -> usize {
        match &self.elements {
            Elements::F32(x) => x.len(),
            Elements::F64(x) => x.len(),
            Elements::F16(x) => x.len(),
            Elements::U16(x) => x.len(),
            Elements::Bool(x) => x.len(),
        }
    }

    /// The elements as an operand.
    pub fn tensor(&self) -> Tensor {
        match &self.elements {
            Elements::F32(x) => Tensor::F32(x.clone()),
            Elements::F16(x) => Tensor::F16(x.clone()),
            Elements::U16(x) => Tensor::Bf16(x.iter().map(|&bits| bf16::from_bits(bits)).collect()),
            Elements::F64(_) | Elements::Bool(_) => panic!("an expected output or a mask, not an operand"),
        }
    }

    /// The elements as an expected output.
    pub fn expected(&self) -> Vec<f64> {
        match &self.elements {
            Elements::F64(x) => x.clone(),
            Elements::Bool(_) => panic!("a mask, not an expected output"),
            _ => self.tensor().to_f32().into_iter().map(f64::from).collect(),
        }
    }

    pub fn f32s(&self) -> Vec<f32> {
        match self.tensor() {
            Tensor::F32(x) => x,
            other => panic!("{} where f32 was expected", other.as_ref().dtype()),
        }
    }

    pub fn dtype(&self) -> Dtype {
        self.tensor().as_ref().dtype()
    }
}
