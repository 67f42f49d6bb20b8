//! What a device can do, distilled from its features and limits. Constructible by hand, so that
//! planning is tested without a device.

/// What a kernel of subgroups lacks where the device has none.
pub(crate) const NO_SUBGROUPS: &str =
    "it needs subgroup operations, which the device does not offer (SUBGROUP)";

/// The capabilities that a plan depends on.
///
/// ```
/// use wgpu_attention::{AttentionProblem, Caps, Plan, PlanOptions};
/// let problem = AttentionProblem::new(1, 8, 8, 512, 512, 64, 64);
/// let plan = Plan::new(&problem, &Caps::minimal(), &PlanOptions::default())?;
/// println!("{plan}");
/// # Ok::<(), wgpu_attention::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Caps {
    /// The adapter's name. Empty in browsers, which do not tell it: [`Tuning`](crate::Tuning) takes their adapters
    /// for one.
    pub adapter: String,
    /// The driver's name and version, where the backend tells.
    pub driver: String,
    /// The API behind wgpu.
    pub backend: wgpu::Backend,
    /// Discrete, integrated, on a CPU, ...
    pub device_type: wgpu::DeviceType,
    /// Shaders can name f16 (else f16 storage is read as pairs in a u32).
    pub shader_f16: bool,
    /// Compute passes can write timestamps.
    pub timestamps: bool,
    /// Smallest and largest subgroup, where subgroup operations are enabled.
    pub subgroup: Option<(u32, u32)>,
    /// Cooperative matrices of f16 with f32 sums, where they are enabled.
    pub matrix: Option<MatrixUnits>,
    /// Bytes that one storage binding may span.
    pub max_storage_binding: u64,
    /// Bytes that one buffer may have.
    pub max_buffer: u64,
    /// Storage buffers of one kernel.
    pub max_storage_buffers: u32,
    /// Bytes of workgroup memory.
    pub max_workgroup_bytes: u32,
    /// Threads of a workgroup.
    pub max_invocations: u32,
    /// Threads of a workgroup along each dimension.
    pub max_workgroup_size: [u32; 3],
    /// f32 registers of a thread that kernels may count on before a GPU's compiler spills. No API tells; this is from
    /// the name and the size of subgroups.
    pub max_registers: u32,
    /// Vector registers of the processor that an adapter on a CPU runs on: this program's, as far as it can tell, else 16.
    pub vector_registers: u32,
    /// Bytes of the instruction cache of a core of that processor; where no system tells, 32 KiB.
    pub instruction_cache: u32,
    /// Workgroups along each dimension of a dispatch.
    pub max_dispatch: u32,
    /// Alignment of a storage binding's offset, in bytes.
    pub storage_alignment: u32,
    /// Alignment of a dynamic uniform offset, in bytes.
    pub uniform_alignment: u32,
}

/// Cooperative matrices as a device has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MatrixUnits {
    /// Rows and columns of a matrix.
    pub edge: u32,
    /// Threads of the subgroups that they run in. Where a driver has several sizes, the largest: in smaller ones the
    /// kernels give the same results and do part of the work twice.
    pub subgroup: u32,
    /// They are read from arrays of scalars alone, and not of vectors: as naga writes it for Metal.
    pub scalars: bool,
    /// What [`Attention::self_test`](crate::Attention::self_test) has found; `None` before.
    pub tested: Option<Result<(), String>>,
}

impl MatrixUnits {
    /// The largest matrices that the kernels can use (square, f16 factors, f32 sums); `None` where the
    /// adapter offers none.
    pub fn of_adapter(adapter: &wgpu::Adapter) -> Option<Self> {
        use wgpu::CooperativeScalarType::{F16, F32};
        let suits = |p: &&wgpu::CooperativeMatrixProperties| {
            let square = p.m_size == p.n_size && p.n_size == p.k_size;
            p.ab_type == F16 && p.cr_type == F32 && square && [8, 16].contains(&p.m_size)
        };
        // lavapipe 26.1 crashes on matrices in vectors of 512 bits (LP_NATIVE_VECTOR_WIDTH=512).
        let info = adapter.get_info();
        if info.name.starts_with("llvmpipe") && info.subgroup_max_size > 8 {
            return None;
        }
        let sizes = adapter.cooperative_matrix_properties();
        let edge = sizes.iter().filter(suits).map(|p| p.m_size).max()?;
        let (_, subgroup) = subgroups(&info);
        let scalars = info.backend == wgpu::Backend::Metal;
        let units = Self { edge, subgroup, scalars, tested: None };
        adapter.features().contains(Caps::MATRIX_FEATURE).then_some(units)
    }
}

/// The Mesa from which on lavapipe takes an address for uniform that comes from a loop's counter.
pub(crate) const NEWER_MESA: u32 = 25;

/// Registers of a thread on NVIDIA's and AMD's GPUs, which have 255 or 256: a multiprocessor of 65536 then has three warps
/// for each of its schedulers.
pub(crate) const MANY_REGISTERS: u32 = 160;

/// Vector registers that every processor has.
const FEW_VECTOR_REGISTERS: u32 = 16;

/// Vector registers of the processor that this runs on. With AVX-512VL there are 32 also of vectors of 256 bits.
fn vector_registers() -> u32 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512vl") {
        return 32;
    }
    if cfg!(target_arch = "aarch64") { 32 } else { FEW_VECTOR_REGISTERS }
}

/// Bytes of the instruction cache that most processors have.
const USUAL_INSTRUCTION_CACHE: u32 = 32 << 10;

/// Bytes of the instruction cache of a core that this runs on, as Linux tells it of the first.
fn instruction_cache() -> u32 {
    if !cfg!(target_os = "linux") {
        return USUAL_INSTRUCTION_CACHE;
    }
    let caches = "/sys/devices/system/cpu/cpu0/cache";
    let of = |index: u32, what: &str| std::fs::read_to_string(format!("{caches}/index{index}/{what}")).ok();
    let index = (0..4).find(|&index| of(index, "type").is_some_and(|kind| kind.trim() == "Instruction"));
    let size = index.and_then(|index| of(index, "size"));
    let kib = size.and_then(|size| size.trim().strip_suffix('K')?.parse::<u16>().ok());
    kib.filter(|&kib| kib > 0).map_or(USUAL_INSTRUCTION_CACHE, |kib| u32::from(kib) << 10)
}

fn is_apples(info: &wgpu::AdapterInfo) -> bool {
    info.device_type != wgpu::DeviceType::Cpu && info.name.starts_with("Apple")
}

/// The smallest and the largest subgroup of an adapter.
fn subgroups(info: &wgpu::AdapterInfo) -> (u32, u32) {
    // wgpu says 4 to 64 of everything that Metal runs on. All of Apple's own GPUs have 32.
    if is_apples(info) { (32, 32) } else { (info.subgroup_min_size, info.subgroup_max_size) }
}

/// Registers that a thread has there, as kernels price them: from what Mesa's compilers spill of the tile kernels.
fn registers(info: &wgpu::AdapterInfo) -> u32 {
    match subgroups(info) {
        _ if info.device_type == wgpu::DeviceType::Cpu => MANY_REGISTERS,
        // Intel's GPUs have 128 for a subgroup of 8 and half for 16: none is spilled at a price of 88, a hundred at 120.
        // Mali has 64.
        (least, most) if least <= 16 && most <= 32 => 96,
        // Apple's have 128: none of tile's at 120, 35 at 136. Adreno's have 192: none of tile's at 120.
        (64, 128) => 120,
        _ if is_apples(info) => 120,
        // (Browsers say 4 to 128 of all.)
        _ => MANY_REGISTERS,
    }
}

impl Caps {
    /// The feature behind [`Caps::matrix`]. wgpu calls it experimental: a device that has it was opened
    /// with [`wgpu::ExperimentalFeatures`].
    pub const MATRIX_FEATURE: wgpu::Features = wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX;

    /// The features that any kernel, the timer or the kept pipelines of this crate can use.
    pub const FEATURES: wgpu::Features = wgpu::Features::SHADER_F16
        .union(wgpu::Features::SUBGROUP)
        .union(wgpu::Features::PIPELINE_CACHE)
        .union(wgpu::Features::TIMESTAMP_QUERY);

    /// An opened device's capabilities. A device does not tell which cooperative matrices it has: those
    /// come from [`Options::matrix`](crate::Options::matrix).
    pub fn of_device(device: &wgpu::Device) -> Self {
        Self::distil(&device.adapter_info(), device.features(), &device.limits())
    }

    /// What a device with everything that the adapter offers would have.
    pub fn of_adapter(adapter: &wgpu::Adapter) -> Self {
        let matrix = MatrixUnits::of_adapter(adapter);
        Self { matrix, ..Self::distil(&adapter.get_info(), adapter.features(), &adapter.limits()) }
    }

    /// A device with wgpu's default limits and no optional feature.
    pub fn minimal() -> Self {
        Self {
            adapter: "a device with default limits".into(),
            driver: String::new(),
            backend: wgpu::Backend::Noop,
            device_type: wgpu::DeviceType::Other,
            ..Self::from_limits(wgpu::Features::empty(), &wgpu::Limits::default())
        }
    }

    /// The first capability that two devices do not share, as each has it.
    pub(crate) fn difference(&self, other: &Self) -> [String; 2] {
        macro_rules! each {
            ($caps:expr, $($name:ident)*) => {{
                let Self { $($name),* } = $caps; // all of them
                [$(format!("{} {:?}", stringify!($name), $name)),*]
            }};
        }
        let [a, b] = [self, other].map(|caps| {
            each!(caps, adapter driver backend device_type shader_f16 timestamps subgroup matrix
                max_storage_binding max_buffer max_storage_buffers max_workgroup_bytes max_invocations
                max_workgroup_size max_registers vector_registers instruction_cache max_dispatch storage_alignment uniform_alignment)
        });
        let first = a.into_iter().zip(b).find(|(a, b)| a != b);
        first.map_or_else(Default::default, |(a, b)| [a, b])
    }

    fn distil(info: &wgpu::AdapterInfo, features: wgpu::Features, limits: &wgpu::Limits) -> Self {
        let mut caps = Self::from_limits(features, limits);
        caps.adapter = info.name.clone();
        caps.driver = format!("{} {}", info.driver, info.driver_info).trim().to_owned();
        caps.backend = info.backend;
        caps.device_type = info.device_type;
        caps.max_registers = registers(info);
        if caps.on_cpu() {
            caps.vector_registers = vector_registers();
            caps.instruction_cache = instruction_cache();
        }
        caps.subgroup = features.contains(wgpu::Features::SUBGROUP).then_some(subgroups(info));
        caps
    }

    fn from_limits(features: wgpu::Features, limits: &wgpu::Limits) -> Self {
        Self {
            adapter: String::new(),
            driver: String::new(),
            backend: wgpu::Backend::Noop,
            device_type: wgpu::DeviceType::Other,
            shader_f16: features.contains(wgpu::Features::SHADER_F16),
            timestamps: features.contains(wgpu::Features::TIMESTAMP_QUERY),
            subgroup: None,
            matrix: None,
            max_storage_binding: limits.max_storage_buffer_binding_size,
            max_buffer: limits.max_buffer_size,
            max_storage_buffers: limits.max_storage_buffers_per_shader_stage,
            max_workgroup_bytes: limits.max_compute_workgroup_storage_size,
            max_invocations: limits.max_compute_invocations_per_workgroup,
            max_workgroup_size: [
                limits.max_compute_workgroup_size_x,
                limits.max_compute_workgroup_size_y,
                limits.max_compute_workgroup_size_z,
            ],
            max_registers: MANY_REGISTERS,
            vector_registers: FEW_VECTOR_REGISTERS,
            instruction_cache: USUAL_INSTRUCTION_CACHE,
            max_dispatch: limits.max_compute_workgroups_per_dimension,
            storage_alignment: limits.min_storage_buffer_offset_alignment,
            uniform_alignment: limits.min_uniform_buffer_offset_alignment,
        }
    }

    /// Whether kernels run on a processor's cores rather than on a GPU's.
    pub fn on_cpu(&self) -> bool {
        self.device_type == wgpu::DeviceType::Cpu
    }

    /// The major version of Mesa, where that is the driver.
    pub(crate) fn mesa(&self) -> Option<u32> {
        let version = self.driver.split_once("Mesa ")?.1;
        version.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    }

    /// Why the device's subgroups are not all of `least` to `most` invocations; `None` when they are.
    pub(crate) fn subgroups_unfit(&self, least: u32, most: u32) -> Option<String> {
        match self.subgroup {
            None => Some(NO_SUBGROUPS.into()),
            Some((smallest, largest)) => (smallest < least || largest > most).then(|| {
                format!("it needs subgroups of {least} to {most}, the device has {smallest} to {largest}")
            }),
        }
    }

    /// What this crate's kernels could use and the device lacks, a phrase each.
    pub fn missing(&self) -> Vec<String> {
        let mut missing = Vec::new();
        let least = Self::minimal();
        for (limit, got, need) in [
            ("storage buffers a kernel", self.max_storage_buffers, least.max_storage_buffers),
            ("bytes of workgroup memory", self.max_workgroup_bytes, least.max_workgroup_bytes),
            ("threads a workgroup", self.max_invocations, least.max_invocations),
            ("threads along x", self.max_workgroup_size[0], least.max_workgroup_size[0]),
        ] {
            if got < need {
                missing.push(format!("{need} {limit}, not {got}: some problems have no kernel"));
            }
        }
        if !self.shader_f16 {
            missing.push("SHADER_F16: f16 tensors are unpacked from pairs, which costs a little".into());
        }
        if self.subgroup.is_none() {
            missing.push("SUBGROUP: no kernel fused:tile_subgroup or linear_few_subgroup".into());
        }
        match &self.matrix {
            None => missing
                .push("cooperative matrices of f16: no kernel fused:tile_matrix or linear_matrix".into()),
            Some(MatrixUnits { tested: Some(Err(why)), .. }) => {
                missing.push(format!(
                    "cooperative matrices that work: no kernel fused:tile_matrix or linear_matrix ({why})"
                ));
            }
            Some(_) => {}
        }
        if !self.timestamps {
            missing.push("TIMESTAMP_QUERY: no GPU time, only the time that the host sees".into());
        }
        missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wgpu::{AdapterInfo, Backend, DeviceType};

    #[test]
    fn registers_are_those_of_the_vendor() {
        use Backend::{BrowserWebGpu, Dx12, Metal, Vulkan};
        use DeviceType::{Cpu, DiscreteGpu, IntegratedGpu, Other};
        for (name, device_type, backend, (least, most), expected) in [
            ("NVIDIA H100", DiscreteGpu, Vulkan, (32, 32), (160, (32, 32))),
            ("AMD Radeon RX 7900 XTX", DiscreteGpu, Dx12, (32, 64), (160, (32, 64))),
            ("Intel(R) Arc(tm) A770 Graphics (DG2)", DiscreteGpu, Vulkan, (8, 32), (96, (8, 32))),
            ("Mali-G78", IntegratedGpu, Vulkan, (16, 16), (96, (16, 16))),
            ("Adreno (TM) 730", IntegratedGpu, Vulkan, (64, 128), (120, (64, 128))),
            ("Apple M1 Pro", IntegratedGpu, Metal, (4, 64), (120, (32, 32))),
            ("AMD Radeon Pro 5500M", DiscreteGpu, Metal, (4, 64), (160, (4, 64))),
            ("", Other, BrowserWebGpu, (4, 128), (160, (4, 128))),
            ("llvmpipe (LLVM 19.1.7, 256 bits)", Cpu, Vulkan, (8, 8), (160, (8, 8))),
        ] {
            let mut info = AdapterInfo::new(device_type, backend);
            info.name = name.into();
            (info.subgroup_min_size, info.subgroup_max_size) = (least, most);
            assert_eq!((registers(&info), subgroups(&info)), expected, "{name}");
        }
    }
}
