//! Pipelines, built once for each recipe and kept; the one home of `unsafe`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::append::AppendStep;
use crate::backward::kernel::Backward;
use crate::blueprint::Blueprint;
use crate::error::{Error, Result};
use crate::linear::kernel::Linear;
use crate::linear::params::LinearParams;
use crate::merge::kernel::{MergeParams, MergeStates};
use crate::params::Params;
use crate::scope::scoped;
use crate::shader::{compose, compose_append};

/// Everything that is compiled into one pipeline: what the cache tells pipelines apart by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Recipe {
    /// A kernel of an attention plan.
    Attention(Blueprint),
    /// A step of an append.
    Append(AppendStep),
    /// The kernel that merges partial results.
    MergeStates(MergeStates),
    /// A kernel of a linear map.
    Linear(Linear),
    /// A kernel of a backward pass.
    Backward(Backward),
}

impl Recipe {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Attention(blueprint) => blueprint.kernel.name(),
            Self::Append(step) => step.name(),
            Self::MergeStates(kernel) => kernel.name(),
            Self::Linear(kernel) => kernel.name(),
            Self::Backward(kernel) => kernel.name(),
        }
    }

    fn wgsl(&self) -> String {
        match self {
            Self::Attention(blueprint) => compose(blueprint),
            Self::Append(step) => compose_append(step),
            Self::MergeStates(kernel) => kernel.wgsl(),
            Self::Linear(kernel) => kernel.wgsl(),
            Self::Backward(kernel) => kernel.wgsl(),
        }
    }

    /// Bytes of its uniform block, which is binding 0 and has a dynamic offset.
    fn params_bytes(&self) -> u64 {
        match self {
            Self::Attention(_) | Self::Append(_) | Self::Backward(_) => size_of::<Params>() as u64,
            Self::MergeStates(_) => size_of::<MergeParams>() as u64,
            Self::Linear(_) => size_of::<LinearParams>() as u64,
        }
    }

    /// Numbers of its storage bindings, and which of them it writes.
    pub(crate) fn storage(&self) -> Vec<(u32, bool)> {
        match self {
            Self::Attention(blueprint) => {
                blueprint.storage().map(|binding| (binding.slot.number(), binding.writes)).collect()
            }
            Self::Append(step) => step.bindings().map(|(number, _, writes)| (number, writes)).collect(),
            Self::MergeStates(kernel) => kernel.storage().iter().map(|b| (b.number, b.writes)).collect(),
            Self::Linear(kernel) => {
                kernel.storage().into_iter().map(|(number, _, writes)| (number, writes)).collect()
            }
            Self::Backward(kernel) => {
                kernel.storage().into_iter().map(|(slot, writes)| (slot.number(), writes)).collect()
            }
        }
    }
}

/// The storage bindings, by a bit for each number, that are bound as if they were written though they are only read:
/// those whose buffer the same dispatch writes somewhere else. wgpu takes a buffer of a dispatch as written, or as read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Opened(u64);

impl Opened {
    /// Of bindings with the buffer of each and whether it is written.
    pub(crate) fn of<'a>(bound: impl Iterator<Item = (u32, &'a wgpu::Buffer, bool)> + Clone) -> Self {
        let written = |buffer| bound.clone().any(|(_, other, writes)| writes && other == buffer);
        let reads = bound.clone().filter(|&(_, buffer, writes)| !writes && written(buffer));
        Self(reads.fold(0, |bits, (number, ..)| bits | 1 << number))
    }

    fn has(self, number: u32) -> bool {
        self.0 >> number & 1 == 1
    }

    /// A text that declares them so.
    fn declare(self, wgsl: String) -> String {
        (0..u64::BITS).filter(|&number| self.has(number)).fold(wgsl, |wgsl, number| {
            let declared = format!("@binding({number}) var<storage, read");
            wgsl.replace(&format!("{declared}>"), &format!("{declared}_write>"))
        })
    }
}

/// A compiled kernel.
#[derive(Debug)]
pub(crate) struct Pipeline {
    pub(crate) pipeline: wgpu::ComputePipeline,
    pub(crate) layout: wgpu::BindGroupLayout,
}

type Cell = Arc<OnceLock<Result<Arc<Pipeline>>>>;

/// What a driver has made of pipelines, to be kept in a file: the next start compiles less.
///
/// ```no_run
/// # fn f(device: &wgpu::Device, queue: &wgpu::Queue) -> Result<(), Box<dyn std::error::Error>> {
/// use wgpu_attention::{Attention, Options, PipelineBlob};
/// // SAFETY: nobody but this program writes to that file.
/// let pipelines = std::fs::read("pipelines.bin").ok().and_then(|bytes| unsafe { PipelineBlob::from_bytes(&bytes) }.ok());
/// let attention = Attention::with_options(device, queue, Options { pipelines, ..Options::default() });
/// // ... at the end:
/// if let Some(blob) = attention.pipeline_blob() {
///     std::fs::write("pipelines.bin", blob.to_bytes())?;
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct PipelineBlob {
    data: Arc<[u8]>,
}

/// What a kept blob begins with; eight bytes of checksum follow.
const BLOB_HEAD: &[u8; 16] = b"wgpu-attention 1";

impl PipelineBlob {
    /// Takes bytes that [`PipelineBlob::to_bytes`] has given. A blob of another adapter or driver is taken,
    /// too; the driver then does without it.
    ///
    /// # Errors
    /// [`Error::PipelineBlob`] for bytes that are none, or are damaged.
    ///
    /// # Safety
    /// The bytes reach the driver, and a driver may trust them. The checksum finds accidents, but not
    /// intent: they must come from a blob of this crate, through nothing that others can write to.
    #[allow(unsafe_code)]
    pub unsafe fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let fail = |why: &str| Err(Error::PipelineBlob { why: why.into() });
        let Some(rest) = bytes.strip_prefix(BLOB_HEAD.as_slice()) else {
            return fail("it does not begin as one");
        };
        match rest.split_at_checked(8) {
            Some((sum, data)) if *sum == checksum(data).to_le_bytes() => Ok(Self { data: data.into() }),
            Some(_) => fail("its checksum is that of other bytes"),
            None => fail("it ends after its first bytes"),
        }
    }

    /// The blob as bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        [BLOB_HEAD.as_slice(), &checksum(&self.data).to_le_bytes(), &self.data].concat()
    }
}

impl std::fmt::Debug for PipelineBlob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PipelineBlob({} bytes)", self.data.len())
    }
}

/// FNV-1a.
fn checksum(data: &[u8]) -> u64 {
    data.iter()
        .fold(0xcbf2_9ce4_8422_2325, |sum, &byte| (sum ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// The pipelines of one device. Concurrent requests for one recipe build it once: the others
/// wait for that build, while other recipes go on.
#[derive(Debug)]
pub(crate) struct PipelineCache {
    cells: Mutex<HashMap<(Recipe, Opened), Cell>>,
    /// The driver's own, where the device has one.
    driver: Option<wgpu::PipelineCache>,
}

impl PipelineCache {
    /// An empty one, whose driver begins with a blob.
    #[allow(unsafe_code)]
    pub(crate) fn new(device: &wgpu::Device, blob: Option<&PipelineBlob>) -> Self {
        let driver = device.features().contains(wgpu::Features::PIPELINE_CACHE).then(|| {
            let descriptor = wgpu::PipelineCacheDescriptor {
                label: Some("attention"),
                data: blob.map(|blob| &*blob.data),
                fallback: true,
            };
            // SAFETY: the data, if any, came from `get_data`: a blob is made by `blob` below, or by a caller
            // who has promised it (`PipelineBlob::from_bytes`).
            unsafe { device.create_pipeline_cache(&descriptor) }
        });
        Self { cells: Mutex::default(), driver }
    }

    pub(crate) fn blob(&self) -> Option<PipelineBlob> {
        Some(PipelineBlob { data: self.driver.as_ref()?.get_data()?.into() })
    }

    pub(crate) fn get(
        &self,
        device: &wgpu::Device,
        recipe: Recipe,
        opened: Opened,
        runtime_checks: bool,
    ) -> Result<Arc<Pipeline>> {
        let key = (recipe, opened);
        let cell = {
            let mut cells = self.cells.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(cells.entry(key).or_default())
        };
        let built = cell
            .get_or_init(|| build(device, recipe, opened, runtime_checks, self.driver.as_ref()).map(Arc::new))
            .clone();
        if built.is_err() {
            // Memory may be there the next time: a failure is not kept.
            let mut cells = self.cells.lock().unwrap_or_else(PoisonError::into_inner);
            if cells.get(&key).is_some_and(|kept| Arc::ptr_eq(kept, &cell)) {
                cells.remove(&key);
            }
        }
        built
    }

    pub(crate) fn len(&self) -> usize {
        self.cells.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

fn build(
    device: &wgpu::Device,
    recipe: Recipe,
    opened: Opened,
    runtime_checks: bool,
    cache: Option<&wgpu::PipelineCache>,
) -> Result<Pipeline> {
    let name = recipe.name();
    log::debug!("building {recipe:?}");
    let entry = |binding, ty, dynamic: bool, bytes| wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer {
            ty,
            has_dynamic_offset: dynamic,
            min_binding_size: wgpu::BufferSize::new(bytes),
        },
        count: None,
    };
    let mut entries = vec![entry(0, wgpu::BufferBindingType::Uniform, true, recipe.params_bytes())];
    entries.extend(recipe.storage().into_iter().map(|(number, writes)| {
        let read_only = !writes && !opened.has(number);
        entry(number, wgpu::BufferBindingType::Storage { read_only }, false, 0)
    }));
    scoped(device, name, || {
        let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: Some(name),
            entries: &entries,
        });
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(name),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let module = module(device, recipe, opened, runtime_checks);
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(name),
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &[],
                // Every kernel writes each word of workgroup memory before it reads it.
                zero_initialize_workgroup_memory: runtime_checks,
            },
            cache,
        });
        Pipeline { pipeline, layout }
    })
}

/// What wgpu asks of those who open a device with cooperative matrices.
#[allow(unsafe_code)]
pub(crate) fn experimental_features() -> wgpu::ExperimentalFeatures {
    // SAFETY: wgpu asks for the acknowledgement that its code may have bugs. The caller of this crate has
    // given it by `DeviceRequest::matrix`, whose text repeats the warning. What this crate makes of the
    // feature are two kernels, composed here alone: every fragment lies inside the workgroup memory that is
    // declared from the same constants, workgroups are whole subgroups, and no branch but a
    // workgroup-uniform one surrounds an operation on fragments. (naga 30 declares Vulkan's memory model with them, but
    // marks no access as one that barriers order: https://github.com/gfx-rs/wgpu/issues/8805. No driver is known to make
    // use of that; `Attention::self_test` runs both kernels before a plan takes them.)
    unsafe { wgpu::ExperimentalFeatures::enabled() }
}

#[allow(unsafe_code)]
fn module(device: &wgpu::Device, recipe: Recipe, opened: Opened, runtime_checks: bool) -> wgpu::ShaderModule {
    let descriptor = wgpu::ShaderModuleDescriptor {
        label: Some(recipe.name()),
        source: wgpu::ShaderSource::Wgsl(opened.declare(recipe.wgsl()).into()),
    };
    if runtime_checks {
        return device.create_shader_module(descriptor);
    }
    // SAFETY: without runtime checks a shader must not index out of bounds or loop for ever.
    //
    // Text: it is composed from this crate's own parts alone; nothing of it comes from a caller.
    //
    // Operands: an index is the layout's offset (relative to the window that is bound) plus indices
    // below the problem's sizes times strides. `AttentionProblem::validate` bounds that sum by
    // u32::MAX, so that it cannot wrap, and encoding proves that the buffer holds it
    // (`Error::OutOfBounds`) before the bind group, which spans exactly `Plan::window` from the operand's place on,
    // exists. What is bound as written beside an output (`Opened`) is read by the same text.
    // Kernels clamp or guard every row, key and column that a tile adds beyond the sizes.
    //
    // GPU-side numbers: `key_length` clamps `kv_lens` to seq_kv. A batch entry without keys visits no tile, so
    // `len_k - 1` is never taken of 0. Offsets of ragged sequences are clamped to the rows that exist
    // (`query_first`, `key_first`), lengths to what lies between two of them, and a row that an entry does
    // not have to the last (`row_ragged`): problems without rows dispatch nothing. A page is looked up for
    // keys that an entry has alone, and `lengths` has ended every entry before its first page that does not
    // exist. A ring's rows are taken modulo its capacity.
    //
    // Quantised rows: `load_int8` and `load_int4` stay inside the `row_elements` words of a row that exists,
    // for the quads that begin below its width.
    //
    // Appends: `place_key` gives a row only after `has_place` has found its position below seq_kv and its page
    // to exist; angles are looked up for positions below seq_kv, which the table has (`Append::validate`).
    //
    // Scratch: rows of `score_stride` elements for each of the chunk's rows, as `Plan::scratch_of`
    // allocates and `choose_chunks` bounds below u32::MAX. Scores are stored below `score_stride`
    // alone, and `values_range` ends at a multiple of the step that divides it. Terms of keys lie at `key_term`:
    // below seq_kv for each of `key_heads`, of which a chunk has no more than `key_term_heads` says; they are
    // looked up, and made, for keys that an entry has; so are unpacked rows, each of as many quads as its width takes. A
    // head's are `whole_steps`, which `Plan::scratch_of` allocates: the row kernel reads whole steps of them, the first key
    // of which an entry has.
    // Carried rows, the bundle and the mask's map are as large as `Plan::scratch_of` says of the indices that
    // `end_part`, `bundle` and `mask_map` make; the map is looked up for rows and keys that exist.
    //
    // The row kernel's mask on the index of a quad changes none: `stages` refuses longer k and v.
    //
    // Merging partial results: a thread's number stays below 2^32, since workgroups beyond the last quad of
    // the rows end first. A part's index is its layout's plus less than `parts` times the step, and
    // `MergeProblem::validate` bounds that sum by u32::MAX; `merge::encode::check` proves that each buffer
    // holds what the bind group spans. No number on the GPU addresses anything.
    //
    // Linear maps: rows, outputs and inputs are clamped or guarded where a tile goes beyond them (the parts
    // `linear_x`, `linear_w_by_*`, `linear_bias` and `linear_end`, and where the kernels call them), quads are
    // read and written as such only where width, offset and strides are multiples of four, and
    // `LinearProblem::validate` bounds the last index of each operand by u32::MAX; `linear::encode::check`
    // proves that each buffer holds what the bind group spans. A tile's rows and outputs stay below 2^32:
    // both sizes are at most 2^28.
    //
    // A layer's queries and keys are turned where they stand: row t at position t, below the longest sequence,
    // which the table of angles has (`Layer::validate`).
    //
    // Gradients: own rows and others are clamped to, or kept below, what an entry has (`own_that_exists`, `end` of
    // `stage`), and row_terms is asked for queries that exist; the buffer of gathered rows is as large as
    // `backward::encode` says of the indices that `backward_rows` makes, and carried sums have a quad for each that a
    // chunk's threads have.
    //
    // Launches: `count` gives a dispatch at most as many workgroups as the plan says of all splits, and `merge`
    // reads the shares of those splits alone.
    //
    // Workgroup memory: declared with the constants that index it.
    //
    // Loops: each has a bound from params, from a constant or from `kv_range` (whole or cut to a part),
    // and a step above 0.
    //
    // The test suite runs with checks on and off, and both give the same bits.
    unsafe { device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
}

/// What the tests of kernels ask of a text.
#[cfg(test)]
pub(crate) mod reflection {
    use naga::valid::{Capabilities, ValidationFlags, Validator};

    use super::{Opened, Recipe};
    use crate::languages::translate;

    /// Checks that a recipe's text is valid WGSL that declares the storage bindings that it says, uses all of
    /// them, and has no more than every device binds, and that it goes into wgpu's other languages; gives the bytes
    /// of its workgroup memory.
    pub(crate) fn check(recipe: Recipe, shader_f16: bool) -> u32 {
        declares(recipe, Opened::default(), shader_f16);
        // Each of its inputs in an output's buffer.
        declares(recipe, Opened(u64::MAX), shader_f16)
    }

    fn declares(recipe: Recipe, opened: Opened, shader_f16: bool) -> u32 {
        let wgsl = opened.declare(recipe.wgsl());
        let module = naga::front::wgsl::parse_str(&wgsl)
            .unwrap_or_else(|e| panic!("{recipe:?}: {}", e.emit_to_string(&wgsl)));
        let mut capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;
        capabilities.set(Capabilities::SHADER_FLOAT16, shader_f16);
        // Only what asks for them by name has them.
        let matrices = wgsl.contains("enable wgpu_cooperative_matrix;");
        capabilities.set(Capabilities::COOPERATIVE_MATRIX, matrices);
        capabilities.set(Capabilities::SUBGROUP, matrices || recipe.name().contains("subgroup"));
        let info = Validator::new(ValidationFlags::all(), capabilities)
            .validate(&module)
            .unwrap_or_else(|e| panic!("{recipe:?}: {}", e.emit_to_string(&wgsl)));
        translate(&module, &info, &format!("{recipe:?}"));
        let (mut found, mut bytes) = (Vec::new(), 0);
        for (handle, variable) in module.global_variables.iter() {
            match variable.space {
                naga::AddressSpace::Storage { access } => {
                    let number = variable.binding.as_ref().unwrap().binding;
                    assert!(!info.get_entry_point(0)[handle].is_empty(), "{recipe:?} does not use {number}");
                    found.push((number, access.contains(naga::StorageAccess::STORE)));
                }
                naga::AddressSpace::WorkGroup => {
                    bytes += module.types[variable.ty].inner.size(module.to_ctx());
                }
                _ => {}
            }
        }
        let bound = |(number, writes)| (number, writes || opened.has(number));
        let mut said: Vec<_> = recipe.storage().into_iter().map(bound).collect();
        found.sort_unstable();
        said.sort_unstable();
        assert_eq!(found, said, "{recipe:?}");
        assert!(said.len() <= 8, "{recipe:?}");
        bytes
    }
}
