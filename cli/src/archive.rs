//! Reading safetensors files that anyone may have made: nothing is believed before it is checked.

use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use safetensors::Dtype as Stored;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::de::{IgnoredAny, MapAccess, Visitor};
use wgpu_attention::{Dtype, Tensor};

use crate::failure::{Failure, Result};
use crate::memory;

/// The format's own limit.
const MAX_HEADER: u64 = 100_000_000;

/// A safetensors file: its header in memory, its tensors read one by one as they are asked for.
pub(crate) struct Archive {
    path: PathBuf,
    file: File,
    data_start: u64,
    metadata: Metadata,
}

impl Archive {
    /// Opens a file and checks its header against its length.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let fail = |why: &dyn fmt::Display| Failure::input(format!("{}: {why}", path.display()));
        // Before it is opened: opening a pipe that nobody writes to would wait for ever.
        let meta = std::fs::metadata(path).map_err(|error| fail(&error))?;
        if !meta.is_file() {
            return Err(fail(&"is not a file"));
        }
        let mut file = File::open(path).map_err(|error| fail(&error))?;
        let length = meta.len();
        let broken = |why: &dyn fmt::Display| fail(&format_args!("not a safetensors file: {why}"));

        let mut start = [0; 8];
        file.read_exact(&mut start).map_err(|_| broken(&format_args!("{length} bytes are too few")))?;
        let header_bytes = u64::from_le_bytes(start);
        if header_bytes > MAX_HEADER || header_bytes > length.saturating_sub(8) {
            return Err(broken(&format_args!("a header of {header_bytes} bytes in a file of {length}")));
        }
        let mut header = vec![0; header_bytes as usize];
        file.read_exact(&mut header).map_err(|error| broken(&error))?;
        serde_json::from_slice::<UniqueKeys>(&header).map_err(|error| broken(&error))?;
        let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| broken(&error))?;

        // Tensors are known to lie one after the other without gaps; the last must end the file.
        let data_start = 8 + header_bytes;
        let end = metadata.tensors().values().map(|info| info.data_offsets.1 as u64).max().unwrap_or(0);
        if end != length - data_start {
            let got = length - data_start;
            return Err(broken(&format_args!("the header describes {end} bytes of data, there are {got}")));
        }
        Ok(Self { path: path.to_path_buf(), file, data_start, metadata })
    }

    /// Type and shape of a tensor, if the file has it.
    pub(crate) fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.metadata.info(name)
    }

    /// What its tensors are called.
    pub(crate) fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    /// Type and shape of a tensor that must be there.
    pub(crate) fn need(&self, name: &str) -> Result<&TensorInfo> {
        self.info(name).ok_or_else(|| {
            let mut names: Vec<String> = self.metadata.tensors().into_keys().collect();
            names.sort_unstable();
            let there = if names.is_empty() { "no tensor".into() } else { names.join(", ") };
            self.fail(format!("no tensor '{name}'; the file has {there}"))
        })
    }

    /// A failure about this file.
    pub(crate) fn fail(&self, why: impl fmt::Display) -> Failure {
        Failure::input(why).about(self.path.display())
    }

    /// The same failure, about this file.
    pub(crate) fn about(&self, failure: Failure) -> Failure {
        failure.about(self.path.display())
    }

    fn wrong_type(&self, name: &str, need: &str, got: Stored) -> Failure {
        self.fail(format!("{name}: need {need}, got {got}"))
    }

    /// Element type of a float tensor.
    pub(crate) fn float_dtype(&self, name: &str) -> Result<Dtype> {
        match self.need(name)?.dtype {
            Stored::F32 => Ok(Dtype::F32),
            Stored::F16 => Ok(Dtype::F16),
            Stored::BF16 => Ok(Dtype::Bf16),
            got => Err(self.wrong_type(name, "F32, F16 or BF16", got)),
        }
    }

    fn bytes(&mut self, name: &str) -> Result<Vec<u8>> {
        let (start, end) = self.need(name)?.data_offsets;
        // No more than the file holds (checked on opening), but a file may be mostly holes.
        memory::allows(name, 2 * (end - start) as u128).map_err(|failure| self.about(failure))?;
        let mut bytes = vec![0; end - start];
        self.file
            .seek(SeekFrom::Start(self.data_start + start as u64))
            .and_then(|_| self.file.read_exact(&mut bytes))
            .map_err(|error| self.fail(format!("{name}: {error}")))?;
        Ok(bytes)
    }

    /// The elements of a float tensor, in its own type.
    pub(crate) fn floats(&mut self, name: &str) -> Result<Tensor> {
        let dtype = self.float_dtype(name)?;
        Ok(Tensor::from_bytes(dtype, &self.bytes(name)?))
    }

    /// The elements of a float tensor, widened to f32.
    pub(crate) fn floats_f32(&mut self, name: &str) -> Result<Vec<f32>> {
        Ok(match self.floats(name)? {
            Tensor::F32(x) => x,
            narrow => narrow.to_f32(),
        })
    }

    /// The bytes of a boolean tensor; any byte but 0 keeps.
    pub(crate) fn booleans(&mut self, name: &str) -> Result<Vec<u8>> {
        match self.need(name)?.dtype {
            Stored::BOOL | Stored::U8 => self.bytes(name),
            got => Err(self.wrong_type(name, "BOOL or U8", got)),
        }
    }

    /// Integers.
    pub(crate) fn integers(&mut self, name: &str) -> Result<Vec<i64>> {
        let dtype = self.need(name)?.dtype;
        let bytes = match dtype {
            Stored::I32 | Stored::U32 | Stored::I64 => self.bytes(name)?,
            got => return Err(self.wrong_type(name, "I32, I64 or U32", got)),
        };
        let four = |b: &[u8]| [b[0], b[1], b[2], b[3]];
        Ok(match dtype {
            Stored::I32 => bytes.chunks_exact(4).map(|b| i32::from_le_bytes(four(b)).into()).collect(),
            Stored::U32 => bytes.chunks_exact(4).map(|b| u32::from_le_bytes(four(b)).into()).collect(),
            _ => bytes
                .chunks_exact(8)
                .map(|b| i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]))
                .collect(),
        })
    }
}

/// Accepts a JSON object in which no key comes twice; a map would silently keep the last.
struct UniqueKeys;

impl<'de> serde::Deserialize<'de> for UniqueKeys {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(Self)
    }
}

impl<'de> Visitor<'de> for UniqueKeys {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self, A::Error> {
        let mut seen = std::collections::HashSet::new();
        while let Some((key, IgnoredAny)) = map.next_entry::<String, _>()? {
            if seen.contains(&key) {
                return Err(serde::de::Error::custom(format_args!("two tensors are named '{key}'")));
            }
            seen.insert(key);
        }
        Ok(self)
    }
}
