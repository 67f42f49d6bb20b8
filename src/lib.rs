//! Attention as WGSL compute shaders over wgpu.
#![deny(missing_docs)]

mod attention;
mod caps;
#[cfg(all(feature = "cpu", not(target_arch = "wasm32")))]
pub mod cpu;
mod dtype;
mod encode;
mod error;
mod host;
mod kernel;
mod layout;
mod mask;
mod params;
mod pipeline;
mod plan;
mod problem;
mod readback;
pub mod reference;
mod run;
mod scope;
mod scratch;
mod shader;
mod timing;

pub use attention::{Attention, DeviceRequest, Operands, Options, adapters};
pub use caps::Caps;
pub use dtype::{Dtype, Tensor, TensorRef};
pub use error::{Error, Operand, Result};
pub use host::{Inputs, Outputs};
pub use kernel::Family;
pub use layout::Layout;
pub use mask::{Align, Window};
pub use plan::{Dispatch, Path, Plan, PlanOptions, Shader};
pub use problem::{AttentionProblem, Bias, Similarity};
pub use readback::read_buffer;
pub use timing::GpuTimer;
