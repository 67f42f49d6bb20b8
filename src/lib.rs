//! Attention, `softmax(similarity(Q, K)) V`, as WGSL compute shaders over wgpu: recorded into your own
//! command encoder, on your own buffers, on any adapter that wgpu reaches.
//!
//! ```
//! # fn main() -> wgpu_attention::Result<()> {
//! use wgpu_attention::{Align, AttentionProblem, Caps, Plan, PlanOptions};
//!
//! // 32 query heads over 8 key-value heads, 128 new tokens against 4096 keys, causal.
//! let problem = AttentionProblem {
//!     causal: Some(Align::BottomRight),
//!     ..AttentionProblem::new(1, 32, 8, 128, 4096, 128, 128)
//! };
//! // Planning is pure: no device yet. `Attention::plan` does it for a device.
//! let plan = Plan::new(&problem, &Caps::minimal(), &PlanOptions::default())?;
//! println!("{plan}");
//! # Ok(()) }
//! ```
//!
//! # The flow
//! - [`AttentionProblem`] states the mathematics: sizes, types, options and layouts. Its
//!   [`validate`](AttentionProblem::validate) is the only home of shape rules.
//! - [`Plan`] is a pure function of problem and [`Caps`]: kernels, tiles, chunks, dispatches, bytes.
//! - [`Attention`] holds a device's pipelines and scratch. [`Attention::encode`] records into your
//!   encoder and never submits; [`Attention::run`] goes from slices to vectors.
//! - [`Attention::merge_states`] makes one result of partial results over disjoint keys.
//! - [`BackwardProblem`] and [`Attention::encode_backward`]: from the gradient of a loss by o to those by q, k,
//!   v, bias and sinks.
//! - [`Layer`] is a whole attention layer, from a sequence to its attended output, and
//!   [`Attention::encode_layer`] records it; [`Attention::encode_linear`] is one of its linear maps by itself.
//! - [`Append`] writes new keys and values into a [`Cache`] on the GPU; [`Prepared`] work is encoded again
//!   and again. [`PageAllocator`] and [`Sequence`] keep the books of a paged cache, on the host. The page
//!   [`generation`] puts these together: prefill, append, decode.
//! - [`reference`](mod@reference) is the f64 oracle that all of it is held to, and [`cpu`] the fast
//!   path where there is no adapter.
//!
//! # The contract
//! In this order: similarity and scale, soft cap, bias and ALiBi, masks, softmax (with sinks in the
//! denominator), weighted sum. A row that keeps no key gives zeros and `lse = -inf`, never NaN. A NaN
//! in a kept element spreads to the rows that read it and to no other. Softmax and sums are f32
//! whatever the storage. Errors are [typed](Error), name the operand, and come before anything is
//! encoded. (In a browser what the driver itself finds, a lost device or a lack of memory, comes later, as WebGPU has it:
//! to the device's own handler of errors.)
//!
//! # Limits
//! Sequences have at most 2^28 tokens, `batch * heads_q * seq_q` and the elements of each operand are at most 2^32 - 1
//! (kernels index by u32), and rows of a linear map at most 2^17 inputs; a merge takes 16384 parts. Fused kernels take a
//! `head_dim_v` of 512 at most, some of them less, and gradients a `head_dim`, too; staged kernels take any. There is no
//! dropout. What a device limits is said by [`Error::LimitExceeded`], with what was needed.
//!
//! # Features
//! - `backends` (default): wgpu's default backends.
//! - `cpu` (default): the `cpu` module. Not on wasm32.
//! - `safetensors`: [`HostWeights`] from checkpoints.
//!
//! # Sources
//! Bahdanau 2014 (arXiv 1409.0473), Graves 2014 (NTM, 1410.5401), Luong 2015 (1508.04025), Vaswani
//! 2017 (1706.03762), Milakov & Gimelshein 2018 (1805.02867), Rabe & Staats 2021 (2112.05682), Press
//! 2021 (ALiBi, 2108.12409), Dao 2022 (FlashAttention, 2205.14135), Ainslie 2023 (GQA, 2305.13245),
//! Dao 2023 (FlashAttention 2, 2307.08691), Xiao 2023 (sinks, 2309.17453), Dao 2023 (Flash-Decoding), Kwon
//! 2023 (PagedAttention, 2309.06180), Ye 2025 (FlashInfer, 2501.01005).
#![deny(missing_docs)]

mod append;
mod attention;
mod backward;
mod blueprint;
mod cache;
mod caps;
#[cfg(all(feature = "cpu", not(target_arch = "wasm32")))]
pub mod cpu;
mod dtype;
mod encode;
mod error;
mod family;
mod fused;
mod fused_matrix;
mod host;
mod kernel;
#[cfg(test)]
mod languages;
mod layer;
mod layout;
mod linear;
mod mask;
mod mask_map;
mod merge;
mod pages;
mod params;
mod pipeline;
mod plan;
mod problem;
mod quant;
mod readback;
pub mod reference;
mod rope;
mod run;
mod scope;
mod scratch;
mod self_test;
mod shader;
mod slot;
mod status;
mod tile;
mod timing;
mod tuning;
mod unroll;

pub use append::{Append, AppendOperands, QkNorm};
pub use attention::{Attention, DeviceRequest, Operands, Options, adapters};
pub use backward::{BackwardOperands, BackwardOutputs, BackwardProblem};
pub use cache::Cache;
pub use caps::{Caps, MatrixUnits};
pub use dtype::{Dtype, Tensor, TensorRef};
pub use encode::Prepared;
pub use error::{Error, Operand, Result};
pub use family::Family;
pub use host::{Inputs, Outputs};
#[cfg(feature = "safetensors")]
pub use layer::Naming;
pub use layer::{HostWeights, Layer, LayerInputs, LayerOperands, LayerOptions};
pub use layout::Layout;
pub use linear::{LinearInputs, LinearKernel, LinearOperands, LinearProblem};
pub use mask::{Align, Window};
pub use merge::{MergeOperands, MergeProblem, Partials};
pub use pages::{PageAllocator, PageCopy, Sequence};
pub use pipeline::PipelineBlob;
pub use plan::{Dispatch, Path, Plan, PlanOptions, Shader};
pub use problem::{AttentionProblem, Bias, Similarity};
pub use quant::{dequantize, quantize, row_elements};
pub use readback::read_buffer;
pub use rope::{Pairing, Rope};
pub use status::Status;
pub use tile::Tile;
pub use timing::GpuTimer;
pub use tuning::Tuning;

// The crates whose types stand in this one's API, in the versions that do.
pub use half;
#[cfg(feature = "safetensors")]
pub use safetensors;
pub use wgpu;

/// Prefill, append and decode: how caches are filled and read.
///
/// The items: [`Append`], [`AppendOperands`], [`Rope`], [`Cache`], [`Prepared`], [`Status`],
/// [`PageAllocator`], [`Sequence`], [`MergeProblem`], [`quantize`].
///
// The page's picture lies beside it, where rustdoc does not look: here it is part of the page.
/// <style>img[src="caches.svg"] { display: none } svg[role="img"] { max-width: 100%; height: auto }</style>
#[doc = include_str!("../docs/caches.svg")]
///
#[doc = include_str!("../docs/generation.md")]
pub mod generation {}

/// The README's examples, compiled as tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
