//! Command lines of the benchmarks, in the words of `benches/peers`.

use wgpu_attention::{Align, Dtype};

pub(crate) type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// What stands behind `cargo bench --bench NAME --`.
pub(crate) struct Flags(Vec<String>);

impl Flags {
    pub(crate) fn new() -> Self {
        // Cargo adds a flag of its own.
        Self(std::env::args().skip(1).filter(|arg| arg != "--bench").collect())
    }

    pub(crate) fn get(&self, name: &str, default: &str) -> String {
        let at = self.0.iter().position(|arg| arg == name);
        at.and_then(|at| self.0.get(at + 1)).map_or(default, String::as_str).to_string()
    }

    /// Timed runs, at least one.
    pub(crate) fn repeat(&self) -> Result<usize> {
        Ok(self.get("--repeat", "10").parse::<usize>()?.max(1))
    }

    pub(crate) fn dtype(&self) -> Result<Dtype> {
        match self.get("--dtype", "f32").as_str() {
            "f32" => Ok(Dtype::F32),
            "f16" => Ok(Dtype::F16),
            "bf16" => Ok(Dtype::Bf16),
            other => Err(format!("--dtype {other}: want f32, f16 or bf16").into()),
        }
    }
}

/// The causal mask of one of `--options`.
pub(crate) fn causal(option: &str) -> Result<Option<Align>> {
    match option {
        "plain" => Ok(None),
        "causal" => Ok(Some(Align::TopLeft)),
        other => Err(format!("--options {other}: want plain or causal").into()),
    }
}
