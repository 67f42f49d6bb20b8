//! Pipelines, built once for each blueprint and kept; the one home of `unsafe`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::error::Result;
use crate::kernel::{Blueprint, Slot};
use crate::params::Params;
use crate::scope::scoped;
use crate::shader::compose;

/// A compiled kernel.
#[derive(Debug)]
pub(crate) struct Pipeline {
    pub(crate) pipeline: wgpu::ComputePipeline,
    pub(crate) layout: wgpu::BindGroupLayout,
}

type Cell = Arc<OnceLock<Result<Arc<Pipeline>>>>;

/// The pipelines of one device. Concurrent requests for one blueprint build it once: the others
/// wait for that build, while other blueprints go on.
#[derive(Debug, Default)]
pub(crate) struct PipelineCache {
    cells: Mutex<HashMap<Blueprint, Cell>>,
}

impl PipelineCache {
    pub(crate) fn get(
        &self,
        device: &wgpu::Device,
        blueprint: &Blueprint,
        runtime_checks: bool,
    ) -> Result<Arc<Pipeline>> {
        let cell = {
            let mut cells = self.cells.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(cells.entry(*blueprint).or_default())
        };
        let built = cell.get_or_init(|| build(device, blueprint, runtime_checks).map(Arc::new)).clone();
        if built.is_err() {
            // Memory may be there the next time: a failure is not kept.
            let mut cells = self.cells.lock().unwrap_or_else(PoisonError::into_inner);
            if cells.get(blueprint).is_some_and(|kept| Arc::ptr_eq(kept, &cell)) {
                cells.remove(blueprint);
            }
        }
        built
    }

    pub(crate) fn len(&self) -> usize {
        self.cells.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

fn build(device: &wgpu::Device, blueprint: &Blueprint, runtime_checks: bool) -> Result<Pipeline> {
    let name = blueprint.kernel.name();
    log::debug!("building {blueprint:?}");
    let entries: Vec<_> = blueprint
        .bindings()
        .iter()
        .map(|binding| wgpu::BindGroupLayoutEntry {
            binding: binding.slot.number(),
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty: match binding.slot {
                    Slot::Params => wgpu::BufferBindingType::Uniform,
                    _ => wgpu::BufferBindingType::Storage { read_only: !binding.writes },
                },
                has_dynamic_offset: binding.slot == Slot::Params,
                min_binding_size: (binding.slot == Slot::Params)
                    .then(|| wgpu::BufferSize::new(size_of::<Params>() as u64))
                    .flatten(),
            },
            count: None,
        })
        .collect();
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
        let module = module(device, blueprint, runtime_checks);
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
            cache: None,
        });
        Pipeline { pipeline, layout }
    })
}

/// What wgpu asks of those who open a device with cooperative matrices.
#[allow(unsafe_code)]
pub(crate) fn experimental_features() -> wgpu::ExperimentalFeatures {
    // SAFETY: wgpu asks for the acknowledgement that its code may have bugs. The caller of this crate has
    // given it by `DeviceRequest::matrix`, whose text repeats the warning. What this crate makes of the
    // feature is one kernel, composed here alone: every fragment lies inside the workgroup memory that is
    // declared from the same constants, workgroups are whole subgroups, and no branch but a
    // workgroup-uniform one surrounds an operation on fragments.
    unsafe { wgpu::ExperimentalFeatures::enabled() }
}

#[allow(unsafe_code)]
fn module(device: &wgpu::Device, blueprint: &Blueprint, runtime_checks: bool) -> wgpu::ShaderModule {
    let descriptor = wgpu::ShaderModuleDescriptor {
        label: Some(blueprint.kernel.name()),
        source: wgpu::ShaderSource::Wgsl(compose(blueprint).into()),
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
    // (`Error::OutOfBounds`) before the bind group, which spans exactly `Plan::window`, exists.
    // Kernels clamp or guard every row, key and column that a tile adds beyond the sizes.
    //
    // GPU-side numbers: `kv_lens` is the only one that addresses depend on, and `key_length` clamps
    // it to seq_kv. A batch entry without keys visits no tile, so `len_k - 1` is never taken of 0.
    //
    // Scratch: rows of `score_stride` elements for each of the chunk's rows, as `Plan::scratch_of`
    // allocates and `choose_chunks` bounds below u32::MAX. Scores are stored below `score_stride`
    // alone, and `values_range` ends at a multiple of the step that divides it. Carried rows, the bundle
    // and the mask's map are as large as `Plan::scratch_of` says of the indices that `end_part`, `bundle`
    // and `mask_map` make; the map is looked up for rows and keys that exist.
    //
    // The row kernel's mask on the index of a quad changes none: `stages` refuses longer k and v.
    //
    // Workgroup memory: declared with the constants that index it.
    //
    // Loops: each has a bound from params, from a constant or from `kv_range` (whole or cut to a part),
    // and a step above 0.
    //
    // The test suite runs with checks on and off, and both give the same bits.
    unsafe { device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
}
