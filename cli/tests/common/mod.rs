//! Starting the program, and making and reading the files that it takes and gives.
#![allow(dead_code, reason = "each test binary uses a part")]

pub(crate) mod bert;
pub(crate) mod npy;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

/// A tensor of a test file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stored {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

impl Stored {
    pub(crate) fn f32(shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        Self { dtype: Dtype::F32, shape: shape.to_vec(), bytes }
    }

    pub(crate) fn f16(shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect();
        Self { dtype: Dtype::F16, shape: shape.to_vec(), bytes }
    }

    pub(crate) fn bf16(shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect();
        Self { dtype: Dtype::BF16, shape: shape.to_vec(), bytes }
    }

    pub(crate) fn bytes(dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Self {
        Self { dtype, shape: shape.to_vec(), bytes: bytes.to_vec() }
    }

    pub(crate) fn i64(values: &[i64]) -> Self {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        Self { dtype: Dtype::I64, shape: vec![values.len()], bytes }
    }

    pub(crate) fn i32(values: &[i32]) -> Self {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        Self { dtype: Dtype::I32, shape: vec![values.len()], bytes }
    }

    /// Every element as f64.
    pub(crate) fn values(&self) -> Vec<f64> {
        match self.dtype {
            Dtype::F32 => {
                self.bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()).into()).collect()
            }
            Dtype::F64 => {
                self.bytes.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
            }
            Dtype::F16 => self
                .bytes
                .chunks_exact(2)
                .map(|b| half::f16::from_le_bytes(b.try_into().unwrap()).to_f64())
                .collect(),
            Dtype::BF16 => self
                .bytes
                .chunks_exact(2)
                .map(|b| half::bf16::from_le_bytes(b.try_into().unwrap()).to_f64())
                .collect(),
            other => panic!("no values of {other}"),
        }
    }
}

pub(crate) type Tensors = HashMap<String, Stored>;

/// Tensors by name.
pub(crate) fn tensors<const N: usize>(list: [(&str, Stored); N]) -> Tensors {
    list.into_iter().map(|(name, tensor)| (name.to_string(), tensor)).collect()
}

/// The bytes of a safetensors file.
pub(crate) fn file(tensors: &Tensors) -> Vec<u8> {
    let views = tensors.iter().map(|(name, tensor)| {
        (name.as_str(), TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes).unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

/// A file whose header is any text.
pub(crate) fn raw_file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// Reads what the program wrote.
pub(crate) fn read(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap();
    let archive = SafeTensors::deserialize(&bytes).unwrap();
    archive
        .iter()
        .map(|(name, view)| {
            let tensor =
                Stored { dtype: view.dtype(), shape: view.shape().to_vec(), bytes: view.data().to_vec() };
            (name.to_string(), tensor)
        })
        .collect()
}

/// A folder that goes when the test ends.
pub(crate) struct Folder(tempfile::TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_string()
    }

    pub(crate) fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> String {
        std::fs::write(self.path(name), bytes).unwrap();
        self.text(name)
    }

    /// Names of all files, hidden ones too.
    pub(crate) fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// Runs the program.
pub(crate) fn program(args: &[&str]) -> Output {
    let binary = env!("CARGO_BIN_EXE_wgpu-attention");
    // Where tests run through another loader, so must what they start.
    let runner = std::env::var("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER").unwrap_or_default();
    let mut words = runner.split_whitespace().chain([binary]);
    let mut command = Command::new(words.next().unwrap());
    command.args(words).args(args).env_remove("RUST_LOG").env_remove("RUST_BACKTRACE");
    command.output().unwrap()
}

/// Runs the program, which must succeed, and gives its stdout.
pub(crate) fn succeed(args: &[&str]) -> String {
    let output = program(args);
    assert!(output.status.success(), "{args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs the program, which must refuse with exit code 2 and one line, and gives that line.
pub(crate) fn refuse(what: &str, args: &[&str]) -> String {
    let output = program(args);
    let stderr = String::from_utf8(output.stderr).expect("stderr is text");
    assert_eq!(output.status.code(), Some(2), "{what}: {args:?}: {stderr}");
    let lines: Vec<&str> = stderr.lines().collect();
    assert_eq!(lines.len(), 1, "{what}: {args:?}: {stderr}");
    assert!(lines[0].starts_with("error: ") && lines[0].len() > 10, "{what}: {stderr}");
    assert!(!stderr.contains("panicked"), "{what}: {stderr}");
    lines[0].to_string()
}

/// The paths that this machine has. No adapter is a failure unless the variable allows it.
pub(crate) fn paths() -> Vec<&'static str> {
    if !succeed(&["adapters"]).starts_with("no adapter") {
        return vec!["oracle", "cpu", "staged", "fused", "decode"];
    }
    let allowed = std::env::var("WGPU_ATTENTION_ALLOW_NO_ADAPTER").is_ok_and(|value| value == "1");
    assert!(allowed, "no adapter; WGPU_ATTENTION_ALLOW_NO_ADAPTER=1 leaves the GPU paths out");
    println!("no adapter: the GPU paths are left out");
    vec!["oracle", "cpu"]
}

/// What a path can give besides o and lse: the fused ones have no weights.
pub(crate) fn weights_flag(path: &str) -> &'static [&'static str] {
    if ["fused", "decode"].contains(&path) { &[] } else { &["--weights"] }
}

/// Numbers that look random and are the same every time.
pub(crate) fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed;
    (0..n).map(|_| (next(&mut state) >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect()
}

/// SplitMix64.
pub(crate) fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// q, k and v of `[B,H,S,D]` shapes.
pub(crate) fn qkv(q: [usize; 4], k: [usize; 4], v: [usize; 4]) -> Tensors {
    let tensor = |seed, shape: [usize; 4]| Stored::f32(&shape, &noise(seed, shape.iter().product()));
    tensors([("q", tensor(1, q)), ("k", tensor(2, k)), ("v", tensor(3, v))])
}

/// Largest difference; NaN or another length is infinite.
pub(crate) fn distance(a: &[f64], b: &[f64]) -> f64 {
    if a.len() != b.len() {
        return f64::INFINITY;
    }
    let far = |(a, b): (&f64, &f64)| {
        if a == b || (a.is_nan() && b.is_nan()) { 0.0 } else { (a - b).abs() }
    };
    a.iter().zip(b).map(far).fold(0.0, |m, d| if d.is_nan() { f64::INFINITY } else { m.max(d) })
}
