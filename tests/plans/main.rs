//! Plans without a device: what they compile is valid WGSL that declares what the plan says, and
//! what they dispatch and allocate stays inside every limit.

#[path = "../common/mod.rs"]
mod common;
#[path = "../../src/languages.rs"]
mod languages;
mod scratch;

use std::collections::HashSet;

use common::case::values;
use common::kept::Move;
use common::rng::Rng;
use languages::translate;
use naga::valid::{Capabilities, ValidationFlags, Validator};
use wgpu_attention::{
    Align, AttentionProblem, Cache, Caps, Dtype, Error, Family, Layout, MatrixUnits, Operand, Path, Plan,
    PlanOptions, Shader, Similarity, Tile, Tuning, Window,
};

/// Devices that exist, as capabilities.
fn devices() -> Vec<Caps> {
    let minimal = Caps::minimal();
    vec![
        minimal.clone(),
        Caps { adapter: "default limits and f16".into(), shader_f16: true, ..minimal.clone() },
        Caps {
            adapter: "a software adapter".into(),
            device_type: wgpu::DeviceType::Cpu,
            shader_f16: true,
            subgroup: Some((8, 8)),
            matrix: Some(MatrixUnits { edge: 8, subgroup: 8, scalars: false, tested: Some(Ok(())) }),
            max_workgroup_bytes: 32 << 10,
            max_invocations: 1024,
            max_workgroup_size: [1024, 1024, 1024],
            max_storage_buffers: 1_000_000,
            storage_alignment: 16,
            ..minimal.clone()
        },
        Caps {
            adapter: "a discrete card".into(),
            device_type: wgpu::DeviceType::DiscreteGpu,
            shader_f16: true,
            timestamps: true,
            subgroup: Some((32, 32)),
            matrix: Some(MatrixUnits { edge: 16, subgroup: 32, scalars: false, tested: Some(Ok(())) }),
            max_storage_binding: (4 << 30) - 4,
            max_buffer: 1 << 40,
            max_workgroup_bytes: 48 << 10,
            max_invocations: 1024,
            max_workgroup_size: [1024, 1024, 64],
            max_storage_buffers: 1_000_000,
            storage_alignment: 16,
            ..minimal.clone()
        },
        Caps {
            adapter: "a laptop's, by Metal".into(),
            backend: wgpu::Backend::Metal,
            device_type: wgpu::DeviceType::IntegratedGpu,
            shader_f16: true,
            subgroup: Some((32, 32)),
            matrix: Some(MatrixUnits { edge: 8, subgroup: 32, scalars: true, tested: Some(Ok(())) }),
            max_workgroup_bytes: 32 << 10,
            max_invocations: 1024,
            max_workgroup_size: [1024, 1024, 1024],
            max_storage_buffers: 31,
            ..minimal.clone()
        },
        Caps {
            adapter: "a small phone".into(),
            device_type: wgpu::DeviceType::IntegratedGpu,
            max_invocations: 128,
            max_workgroup_size: [128, 128, 64],
            ..minimal
        },
    ]
}

/// Sizes whose products are more than their type holds are refused like any that are too large.
#[test]
fn sizes_do_not_wrap_around() {
    let problem = AttentionProblem::new(1, 1, 1, 8, 8, 8, 8);
    let wide = AttentionProblem::new(1, 1, 1, 64, 1, 1 << 25, 8);
    let shared = Layout { offset: 0, strides: [0, 0, 0, 1] };
    let wide = AttentionProblem { q: shared, ..wide };
    assert_eq!(wide.validate(), Ok(()));
    for (problem, tile) in [
        (&problem, "fused:row:rows=1073741825:keys=4"),
        (&problem, "fused:row:rows=2147483648:keys=2"),
        (&problem, "fused:row:rows=0"),
        (&wide, "fused:tile:rows=4:held=1"),
        (&wide, "fused:tile:held=1"),
    ] {
        let options = PlanOptions { tile: Some(tile.parse().unwrap()), ..PlanOptions::default() };
        let error = Plan::new(problem, &Caps::minimal(), &options).expect_err(tile);
        assert!(matches!(error, Error::KernelUnfit { .. }), "{tile}: {error}");
    }
    let mesa = Caps { driver: "llvmpipe Mesa 26.1.6".into(), ..Caps::minimal() };
    assert!(!Tile::candidates(&wide, &mesa).is_empty());
    let endless = AttentionProblem { seq_q: usize::MAX, batch: usize::MAX, ..problem.clone() };
    assert_eq!(Tuning::default().get(&endless, &mesa), None);
    assert_eq!(AttentionProblem { kv_lens: true, ..endless }.buffer_bytes(Operand::KvLens), u64::MAX);
    // Workgroups are numbered over three dimensions, and no further.
    for max_dispatch in [0, 2] {
        let caps = Caps { max_dispatch, ..Caps::minimal() };
        let many = AttentionProblem::new(1, 64, 64, 512, 512, 64, 64);
        let error = Plan::new(&many, &caps, &PlanOptions::default()).expect_err("too many workgroups");
        assert!(matches!(error, Error::LimitExceeded { .. }), "{error}");
    }
}

/// A batch of decoding with one prompt among it is one dispatch, as long as all of its rows are.
#[test]
fn few_rows_of_a_ragged_batch_are_one_chunk() {
    let problem = AttentionProblem::new(64, 32, 8, 2048, 4096, 128, 128);
    let chunks = |problem: &AttentionProblem| {
        let options = PlanOptions { splits: Some(1), ..PlanOptions::default() };
        let caps = Caps { max_storage_binding: 1 << 32, max_buffer: 1 << 32, ..Caps::minimal() };
        Plan::new(problem, &caps, &options).unwrap().chunks()
    };
    assert!(chunks(&problem) > 20);
    assert_eq!(chunks(&problem.clone().with_ragged_queries(2048 + 63)), 1);
    assert!(chunks(&problem.with_ragged_queries(64 * 2048)) > 20);
}

/// Ragged queries lie as their total says, whatever was said first.
#[test]
fn a_similarity_and_ragged_queries_come_in_any_order() {
    let problem = AttentionProblem::new(4, 2, 2, 64, 64, 8, 8);
    let similarity = Similarity::Bilinear { query_dim: 12, per_head: false };
    let of = problem.clone().with_similarity(similarity).with_ragged_queries(50);
    assert_eq!(problem.with_ragged_queries(50).with_similarity(similarity), of);
    assert_eq!(of.q, Layout::bshd(2, 50, 12));
}

/// Kernels that are dispatched once for all rows of a head.
const OF_KEYS: [&str; 4] = ["key_norms", "project_k", "unpack_k", "unpack_v"];

/// Every plan that `problem` has on `caps`: each family, and the plan's own choice.
fn plans(problem: &AttentionProblem, caps: &Caps, scratch_budget: Option<u64>) -> Vec<Plan> {
    Family::ALL
        .iter()
        .copied()
        .map(Some)
        .chain([None])
        .filter_map(|family| {
            let (splits, indirect) = if problem.status { (Some(3), true) } else { (None, false) };
            let splits = splits.filter(|_| family.is_some_and(|family| family.path() == Path::Fused));
            // The row kernel reads keys and values as they are, or unpacked.
            let unpacked = Some(problem.status.into());
            let tile = family.filter(|&of| of == Family::FusedRow);
            let tile = tile.map(|family| Tile { unpacked, ..Tile::of(family) });
            let options =
                PlanOptions { family, tile, scratch_budget, splits, indirect, ..PlanOptions::default() };
            match Plan::new(problem, caps, &options) {
                Ok(plan) => Some(plan),
                Err(Error::KernelUnfit { .. }) if family.is_some() => None,
                Err(error) => panic!("{family:?} on {}: {error}\n  {problem:?}", caps.adapter),
            }
        })
        .collect()
}

/// What the text of a shader declares.
struct Reflection {
    bindings: Vec<u32>,
    storage: usize,
    writable: Vec<u32>,
    workgroup_bytes: u32,
    threads: u32,
    workgroup_size: [u32; 3],
}

fn reflect(shader: &Shader, caps: &Caps) -> Reflection {
    let context = format!("{} for {}", shader.name, caps.adapter);
    let module = naga::front::wgsl::parse_str(&shader.wgsl)
        .unwrap_or_else(|e| panic!("{context}: {}", e.emit_to_string(&shader.wgsl)));
    // wgpu grants this one everywhere: (un)pack2x16float belong to WGSL without extensions.
    let mut capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    if caps.shader_f16 {
        capabilities |= Capabilities::SHADER_FLOAT16;
    }
    if caps.subgroup.is_some() {
        capabilities |= Capabilities::SUBGROUP;
    }
    if caps.matrix.is_some() {
        capabilities |= Capabilities::COOPERATIVE_MATRIX;
    }
    let info = Validator::new(ValidationFlags::all(), capabilities)
        .validate(&module)
        .unwrap_or_else(|e| panic!("{context}: {}", e.emit_to_string(&shader.wgsl)));
    translate(&module, &info, &context);

    assert_eq!(module.entry_points.len(), 1, "{context}");
    let entry = &module.entry_points[0];
    let mut layouter = naga::proc::Layouter::default();
    layouter.update(module.to_ctx()).expect("validated");
    let mut reflection = Reflection {
        bindings: Vec::new(),
        storage: 0,
        writable: Vec::new(),
        workgroup_bytes: 0,
        threads: entry.workgroup_size.iter().product(),
        workgroup_size: entry.workgroup_size,
    };
    for (handle, variable) in module.global_variables.iter() {
        let used = !info.get_entry_point(0)[handle].is_empty();
        match variable.space {
            naga::AddressSpace::WorkGroup => {
                let layout = &layouter[variable.ty];
                reflection.workgroup_bytes =
                    layout.alignment.round_up(reflection.workgroup_bytes) + layout.size;
                assert!(used, "{context}: workgroup memory {:?} that nothing uses", variable.name);
            }
            naga::AddressSpace::Storage { access } => {
                let binding = variable.binding.as_ref().expect("storage is bound");
                assert_eq!(binding.group, 0, "{context}");
                reflection.bindings.push(binding.binding);
                reflection.storage += 1;
                if access.contains(naga::StorageAccess::STORE) {
                    reflection.writable.push(binding.binding);
                }
                assert!(used, "{context}: a binding {:?} that nothing uses", variable.name);
            }
            naga::AddressSpace::Uniform => {
                reflection.bindings.push(variable.binding.as_ref().expect("uniforms are bound").binding);
            }
            _ => {}
        }
    }
    reflection.bindings.sort_unstable();
    reflection
}

fn check_shader(shader: &Shader, caps: &Caps) {
    let context = format!("{} for {}", shader.name, caps.adapter);
    let found = reflect(shader, caps);
    assert_eq!(found.bindings, shader.bindings, "{context}: bindings");
    // wgpu does not hold workgroup memory against the device's limit: the plan's figure has to be
    // right, and has to be inside.
    assert_eq!(found.workgroup_bytes, shader.workgroup_bytes, "{context}: workgroup bytes");
    assert!(shader.workgroup_bytes <= caps.max_workgroup_bytes, "{context}: {}", shader.workgroup_bytes);
    assert_eq!(found.threads, shader.threads, "{context}: threads");
    assert!(found.threads <= caps.max_invocations, "{context}: {} threads", found.threads);
    for (size, most) in found.workgroup_size.into_iter().zip(caps.max_workgroup_size) {
        assert!(size <= most, "{context}: {:?}", found.workgroup_size);
    }
    assert!(found.storage <= caps.max_storage_buffers as usize, "{context}: {} buffers", found.storage);
    assert!(!found.writable.is_empty(), "{context} writes nothing");
    assert!(!shader.wgsl.contains("OPERAND") && !shader.wgsl.contains("BINDING"), "{context}: a placeholder");
}

fn check_plan(plan: &Plan, caps: &Caps, budget: u64) {
    let context = || format!("{plan}{:?}", plan.problem());
    assert!(plan.scratch_bytes() <= budget, "{} of {budget}: {}", plan.scratch_bytes(), context());
    assert_eq!(plan.path(), plan.family().path());
    assert_eq!(plan.kernels(), plan.shaders().iter().map(|shader| shader.name).collect::<Vec<_>>());
    let kernels: HashSet<_> = plan.kernels().into_iter().collect();
    let mut dispatched = HashSet::new();
    for dispatch in plan.dispatches().take(10_000) {
        assert!(kernels.contains(dispatch.kernel), "{}", context());
        for n in dispatch.groups {
            assert!((1..=caps.max_dispatch).contains(&n), "{:?}: {}", dispatch.groups, context());
        }
        dispatched.insert(dispatch.kernel);
    }
    assert_eq!(plan.dispatches().next().is_none(), plan.problem().rows() == 0, "{}", context());
    // Whoever reads the explanation learns which kernels run and why no others.
    let text = plan.to_string();
    for kernel in plan.kernels() {
        assert!(text.contains(kernel), "{kernel} is missing: {text}");
    }
}

/// Problems over every option, on every device: a shader that was seen is not compiled again.
#[test]
fn every_composed_shader_is_valid_and_declares_what_the_plan_says() {
    let mut rng = Rng::new(11);
    let mut seen = HashSet::new();
    let mut names = HashSet::new();
    for caps in devices() {
        for i in 0..250 {
            let mut axes = values::draw(&mut rng);
            (axes.seq_q, axes.seq_kv) = (axes.seq_q.min(40), axes.seq_kv.min(300));
            let mut case = axes.build(i);
            if i % 2 == 0 {
                case = case.moved(Move::draw(&mut rng), i);
                case.problem.status = rng.chance(0.3);
            }
            let problem = case.problem;
            for plan in plans(&problem, &caps, None) {
                check_plan(&plan, &caps, 64 << 20);
                for shader in plan.shaders() {
                    names.insert(shader.name);
                    if seen.insert((caps.adapter.clone(), shader.wgsl.clone())) {
                        check_shader(&shader, &caps);
                    }
                }
            }
        }
    }
    for name in [
        "project",
        "normalize_q",
        "key_norms",
        "project_q",
        "project_k",
        "unpack_k",
        "unpack_v",
        "scores_tile",
        "scores_direct",
        "softmax_row",
        "values_tile",
        "values_direct",
        "weights",
        "lengths",
        "count",
        "merge",
        "bundle",
        "mask_map",
        "fused_tile",
        "fused_tile_subgroup",
        "fused_tile_matrix",
        "fused_row",
    ] {
        assert!(names.contains(name), "{name} was never planned: {names:?}");
    }
    common::say(&format!("{} different shaders are valid", seen.len()));
}

/// Few rows are not enough for a device: keys are split until they are, by whole steps, and what the
/// splits find out is priced. A group's heads share a tile.
#[test]
fn few_rows_split_the_keys() {
    let problem = AttentionProblem::new(1, 32, 8, 1, 16_384, 128, 128);
    let gpu = Caps { device_type: wgpu::DeviceType::DiscreteGpu, ..Caps::minimal() };
    let cpu = Caps { device_type: wgpu::DeviceType::Cpu, ..Caps::minimal() };
    let splits = |plan: &Plan| plan.kernels().contains(&"merge").then(|| plan.splits());
    for caps in [&gpu, &cpu] {
        let plan = Plan::new(&problem, caps, &PlanOptions::default()).expect("served");
        let n = plan.splits();
        assert!(splits(&plan).is_some() && n >= 2, "{plan}");
        // (m, l), and O, of each row and split, in vec4s.
        assert_eq!(plan.scratch_bytes(), (32 * n * 33 * 16) as u64, "{plan}");
        // Eight tiles, each of four heads.
        let groups: u32 = plan.dispatches().next().expect("one").groups.iter().product();
        assert_eq!(groups as usize, 8 * n, "{plan}");
        let text = plan.to_string();
        assert!(text.contains("split") && text.contains("fill the device"), "{text}");
        // Many rows are enough.
        let prefill = AttentionProblem::new(1, 32, 8, 4096, 16_384, 128, 128);
        let plan = Plan::new(&prefill, caps, &PlanOptions::default()).expect("served");
        assert_eq!((splits(&plan), plan.splits()), (None, 1), "{plan}");
    }
    // A large card: matrices for a prompt, and for a step of decoding as many threads as fill it, by tiles.
    let card = devices().into_iter().find(|caps| caps.adapter == "a discrete card").expect("listed");
    let long = AttentionProblem::new(1, 32, 8, 1, 65_536, 128, 128).with_dtype(Dtype::F16);
    let [step, prompt] =
        [long.clone(), AttentionProblem::new(1, 32, 8, 4096, 4096, 128, 128).with_dtype(Dtype::F16)]
            .map(|problem| Plan::new(&problem, &card, &PlanOptions::default()).expect("served"));
    assert!(prompt.kernels().contains(&"fused_tile_matrix"), "{prompt}");
    assert!(
        step.kernels().contains(&"fused_tile") && step.to_string().contains("4 rows leave most"),
        "{step}"
    );
    assert!((256 * 128 / 64 / 2..=256 * 128 / 64).contains(&(8 * step.splits())), "{step}");
    let family = Some(Family::FusedMatrix);
    let forced = Plan::new(&long, &card, &PlanOptions { family, ..PlanOptions::default() }).expect("served");
    assert!(forced.kernels().contains(&"fused_tile_matrix"), "{forced}");
    assert!(8 * forced.splits() > 8 * step.splits(), "{forced}");
    for family in Family::ALL.iter().copied().filter(|family| family.lacks(&gpu).is_none()) {
        let plan = |splits| {
            let options =
                PlanOptions { family: Some(family), splits: Some(splits), ..PlanOptions::default() };
            Plan::new(&problem, &gpu, &options)
        };
        assert_eq!(splits(&plan(1).expect("served")), None);
        if family.path() == Path::Staged {
            let error = plan(2).expect_err("no kernel for it").to_string();
            assert!(error.contains(&family.to_string()) && error.contains("split"), "{error}");
            continue;
        }
        // No fewer than keep a thread's loops short; no more than there are steps.
        assert!(splits(&plan(2).expect("served")).is_some_and(|n| n >= 2));
        assert_eq!(splits(&plan(16).expect("served")), Some(16));
        assert!(splits(&plan(usize::MAX).expect("served")).is_some_and(|n| n <= 16_384 / 4));
    }
}

/// Everything about f16 that needs a feature is used only where the feature is.
#[test]
fn f16_without_the_feature_is_pairs() {
    let problem = AttentionProblem::new(1, 2, 2, 8, 8, 8, 8).with_dtype(Dtype::F16);
    for caps in devices() {
        let texts: Vec<_> =
            plans(&problem, &caps, None).iter().flat_map(Plan::shaders).map(|shader| shader.wgsl).collect();
        assert_eq!(
            texts.iter().any(|text| text.contains("enable f16;")),
            caps.shader_f16,
            "{}",
            caps.adapter
        );
    }
}

/// The same problem and capabilities, the same plan; and `Plan` says so by `==`.
#[test]
fn plans_are_pure() {
    let problem = AttentionProblem::new(2, 4, 2, 100, 200, 64, 64);
    for caps in devices() {
        assert_eq!(plans(&problem, &caps, None), plans(&problem, &caps, None));
        assert_eq!(
            plans(&problem, &caps, None).iter().map(Plan::to_string).collect::<Vec<_>>(),
            plans(&problem, &caps, None).iter().map(Plan::to_string).collect::<Vec<_>>()
        );
    }
}

/// Sizes whose products leave 32 and 64 bits: an error or a plan inside the limits, never an
/// overflow (which would panic here).
#[test]
fn huge_problems_do_not_overflow() {
    let sizes = [1, 7, 65_535, 65_536, 1 << 20, 1 << 28, u32::MAX as usize, usize::MAX / 2, usize::MAX];
    let mut rng = Rng::new(13);
    let (mut planned, mut refused) = (0, 0);
    for caps in devices() {
        // One that is huge among small ones reaches what prices each kernel.
        for (size, at) in
            (16..29).map(|bits| 1_usize << bits).chain(sizes).flat_map(|n| (0..6).map(move |at| (n, at)))
        {
            let mut small = [1, 1, 2, 1, 1, 1];
            small[at] = size;
            let [heads, group, seq_q, seq_kv, head_dim, head_dim_v] = small;
            let heads_q = heads.saturating_mul(group);
            let problem = AttentionProblem::new(1, heads_q, heads, seq_q, seq_kv, head_dim, head_dim_v);
            for dtype in [Dtype::F32, Dtype::F16] {
                let options = PlanOptions::default();
                let _ = Plan::new(&problem.clone().with_dtype(dtype), &caps, &options)
                    .map(|plan| check_plan(&plan, &caps, 64 << 20));
            }
        }
        for _ in 0..2000 {
            // Mostly small, or nothing would be planned.
            let mut size = || if rng.chance(0.7) { 1 + rng.below(300) } else { rng.pick(&sizes) };
            let (batch, heads_kv, group) = (size(), size(), 1 + size() % 4);
            let mut problem = AttentionProblem::new(
                batch,
                heads_kv.saturating_mul(group),
                heads_kv,
                size(),
                size(),
                size(),
                size(),
            );
            problem.weights = size() % 2 == 0;
            problem.lse = size() % 2 == 0;
            problem.dtype = Dtype::FLOATS[size() % 3];
            if size() % 3 == 0 {
                let bilinear = Similarity::Bilinear { query_dim: size(), per_head: size() % 2 == 0 };
                let additive =
                    Similarity::Additive { query_dim: size(), hidden: size(), per_head: size() % 2 == 0 };
                problem.similarity = [bilinear, Similarity::Cosine, additive][size() % 3];
                problem.q = Layout::bhsd(problem.heads_q, problem.seq_q, problem.query_dim());
            }
            if size() % 3 == 0 {
                // One key for all positions: what is huge need not be large in memory.
                (problem.k.strides[2], problem.v.strides[2]) = (0, 0);
            }
            if size() % 4 == 0 {
                let (rows, pages) = (size(), size());
                let (capacity, max_blocks) =
                    if size() % 8 == 0 { (size(), size()) } else { (problem.seq_kv, problem.seq_kv) };
                let cache = [
                    Cache::Ring { capacity },
                    Cache::Paged { pages, page_size: rows, max_blocks },
                    Cache::Ragged { total: rows },
                ][size() % 3];
                problem.window = (size() % 2 == 0).then(|| Window { left: Some(size()), right: None });
                problem = problem.with_cache(cache, Dtype::ALL[size() % 5]);
            }
            if size() % 5 == 0 {
                problem = problem.with_ragged_queries(size());
            }
            problem.status = size() % 7 == 0;
            let budget = [None, Some(u64::MAX), Some(1 << 12)][size() % 3];
            let options = PlanOptions { scratch_budget: budget, ..PlanOptions::default() };
            match Plan::new(&problem, &caps, &options) {
                Ok(plan) => {
                    check_plan(&plan, &caps, budget.unwrap_or(64 << 20));
                    planned += 1;
                }
                Err(error) => {
                    assert!(!error.to_string().is_empty());
                    refused += 1;
                }
            }
        }
    }
    assert!(planned > 500 && refused > 500, "{planned} planned, {refused} refused");
}

/// wgpu has a dispatch wait for the one before: a fast device is given more in one.
#[test]
fn fast_devices_get_longer_dispatches() {
    use wgpu::DeviceType::{DiscreteGpu, IntegratedGpu};
    let p = AttentionProblem::new(1, 16, 16, 16384, 16384, 128, 128).with_dtype(Dtype::F16);
    let units = |tested| Some(MatrixUnits { edge: 16, subgroup: 32, scalars: false, tested: Some(tested) });
    for (device_type, shader_f16, matrix, dispatches) in [
        (IntegratedGpu, true, None, 8),
        (IntegratedGpu, true, units(Ok(())), 4),
        (DiscreteGpu, false, None, 8),
        (DiscreteGpu, true, None, 4),
        (DiscreteGpu, true, units(Err("wrong".into())), 4),
        (DiscreteGpu, true, units(Ok(())), 1),
    ] {
        let context = format!("{device_type:?} {matrix:?}");
        let limits = Caps { max_workgroup_bytes: 48 << 10, max_invocations: 1024, ..Caps::minimal() };
        let caps = Caps { device_type, shader_f16, matrix, subgroup: Some((32, 32)), ..limits };
        let caps = Caps { max_storage_binding: 1 << 30, ..caps };
        let plan = Plan::new(&p, &caps, &PlanOptions::default()).expect("served");
        assert_eq!(plan.dispatches().count(), dispatches, "{context}: {plan}");
    }
}

/// More workgroups than one dimension holds are folded into the others.
#[test]
fn dispatches_fold() {
    // o has 64 MiB; the inputs are one element each.
    let problem = AttentionProblem::new(1 << 14, 64, 1, 16, 1, 1, 1);
    let one = Layout::broadcast([1; 4]);
    let problem = AttentionProblem { q: one, k: one, v: one, ..problem };
    for caps in devices() {
        let options = PlanOptions { scratch_budget: Some(u64::MAX), ..PlanOptions::default() };
        let plan = Plan::new(&problem, &caps, &options).expect("64 MiB in one binding");
        let largest =
            plan.dispatches().map(|dispatch| dispatch.groups.map(u64::from).iter().product::<u64>()).max();
        assert!(largest.is_some_and(|groups| groups > 65_535), "{plan}");
        check_plan(&plan, &caps, u64::MAX);
    }
}

/// The explanation names the choice and its reason.
#[test]
fn plans_explain_themselves() {
    let problem = AttentionProblem::new(2, 8, 2, 100, 300, 64, 80);
    for caps in devices() {
        for plan in plans(&problem, &caps, None) {
            let text = plan.to_string();
            for part in [
                "2 x 8 heads",
                "100 queries",
                "300 keys",
                "head_dim 64",
                "head_dim_v 80",
                "f32",
                &caps.adapter,
            ] {
                assert!(text.contains(part), "{part:?} is missing: {text}");
            }
        }
        let text = Plan::new(&problem, &caps, &PlanOptions::default()).expect("served").to_string();
        for &family in Family::ALL {
            assert!(text.contains(&family.to_string()), "why {family} or why not: {text}");
        }
    }
    // A device on which the tile kernels do not fit: the plan says which limit it was.
    let phone = devices().pop().expect("the last one");
    let text = Plan::new(&problem, &phone, &PlanOptions::default()).expect("served").to_string();
    assert!(text.contains("128"), "{text}");
    // What a device lacks is one phrase each.
    assert!(Caps::minimal().missing().iter().all(|phrase| !phrase.is_empty()));
    assert!(!Caps::minimal().missing().is_empty());
    let fewer = Caps { max_storage_buffers: 4, ..Caps::minimal() }.missing();
    assert!(fewer[0].contains("8 storage buffers a kernel, not 4"), "{fewer:?}");
}

/// Names round-trip for command lines.
#[test]
fn names() {
    for &family in Family::ALL {
        assert_eq!(family.to_string().parse(), Ok(family));
    }
    for &path in Path::ALL {
        assert_eq!(path.to_string().parse(), Ok(path));
    }
    assert!("no such family".parse::<Family>().is_err());
    assert!("no such path".parse::<Path>().is_err());
}

/// Everything is accepted by wgpu itself on a device that computes nothing: default limits, no
/// optional feature. Sizes here may be such that no oracle would end.
#[test]
fn the_noop_device_accepts_every_plan() {
    use wgpu_attention::{Attention, Operands};
    let (device, queue) = wgpu::Device::noop(&wgpu::DeviceDescriptor::default());
    let attention = Attention::new(&device, &queue);
    let mut rng = Rng::new(14);
    let mut problems: Vec<AttentionProblem> = (0..120)
        .map(|i| {
            let mut axes = values::draw(&mut rng);
            axes.lens = common::case::Lens::None;
            axes.build(i).problem
        })
        .collect();
    problems.push(AttentionProblem::new(1, 32, 8, 4096, 4096, 128, 128));
    problems.push(AttentionProblem { lse: true, ..AttentionProblem::new(4, 8, 8, 1, 100_000, 8, 8) });
    for problem in problems {
        let buffer = |operand: Operand| {
            problem.layout(operand)?;
            let bytes = problem.extent(operand) as u64 * problem.element_bytes(operand) as u64;
            Some(device.create_buffer(&wgpu::BufferDescriptor {
                label: None,
                size: bytes.next_multiple_of(4).max(4),
                usage: wgpu::BufferUsages::STORAGE,
                mapped_at_creation: false,
            }))
        };
        let always = |operand| buffer(operand).expect("always there");
        let (q, k, v, o) = (always(Operand::Q), always(Operand::K), always(Operand::V), always(Operand::O));
        let optional = [
            Operand::W,
            Operand::Wq,
            Operand::Wk,
            Operand::ScoreV,
            Operand::Bias,
            Operand::Mask,
            Operand::AlibiSlopes,
            Operand::Sinks,
            Operand::KvLens,
            Operand::Lse,
            Operand::Weights,
        ]
        .map(buffer);
        let [w, wq, wk, score_v, bias, mask, alibi_slopes, sinks, kv_lens, lse, weights] =
            optional.each_ref().map(|b| b.as_ref().map(|b| b.slice(..)));
        let operands = Operands {
            w,
            wq,
            wk,
            score_v,
            bias,
            mask,
            alibi_slopes,
            sinks,
            kv_lens,
            lse,
            weights,
            ..Operands::new(q.slice(..), k.slice(..), v.slice(..), o.slice(..))
        };
        for plan in plans(&problem, attention.caps(), None) {
            let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            attention.encode(&mut encoder, &plan, &operands).unwrap_or_else(|e| panic!("{e}\n{plan}"));
            queue.submit([encoder.finish()]);
        }
    }
}

/// A quarter of a million tokens against themselves: no matrix of scores, scratch of a few numbers a
/// row, dispatches that no watchdog minds; and wgpu takes the commands.
#[test]
fn a_quarter_of_a_million_tokens_are_planned_and_encoded() {
    use wgpu_attention::{Attention, Operands};
    let (device, queue) = wgpu::Device::noop(&wgpu::DeviceDescriptor::default());
    let attention = Attention::new(&device, &queue);
    let (n, d) = (256 << 10, 64);
    let problem =
        AttentionProblem { causal: Some(Align::BottomRight), ..AttentionProblem::new(1, 1, 1, n, n, d, d) };
    let [q, k, v, o] = [0; 4].map(|_| {
        device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: (4 * n * d) as u64,
            usage: wgpu::BufferUsages::STORAGE,
            mapped_at_creation: false,
        })
    });
    for family in Family::of(Path::Fused).filter(|family| family.lacks(attention.caps()).is_none()) {
        let options = PlanOptions { family: Some(family), ..PlanOptions::default() };
        let plan = attention.plan_with(&problem, &options).expect("served");
        assert!(plan.scratch_bytes() <= 4 * (n * (d + 4)) as u64, "{plan}");
        // The last chunk of rows against all keys, in parts: 2 n (D + Dv) FLOP a row, over the parts.
        let rows = n.div_ceil(plan.chunks());
        let parts = plan.dispatches().count() / plan.chunks();
        assert!(parts > 1 && rows * (n / parts) * 4 * d < 400_000_000_000, "{plan}");
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        attention
            .encode(&mut encoder, &plan, &Operands::new(q.slice(..), k.slice(..), v.slice(..), o.slice(..)))
            .expect("encoded");
        queue.submit([encoder.finish()]);
        // Nor does a watchdog of submissions, where they are taken apart.
        let all = attention
            .prepare(&plan, &Operands::new(q.slice(..), k.slice(..), v.slice(..), o.slice(..)))
            .expect("prepared");
        let dispatches = all.dispatches();
        let pieces: Vec<usize> = all.split(4).iter().map(wgpu_attention::Prepared::dispatches).collect();
        assert!(pieces.len() > 1 && pieces.iter().all(|&n| (1..=4).contains(&n)), "{pieces:?}");
        assert_eq!(pieces.iter().sum::<usize>(), dispatches);
    }
}
