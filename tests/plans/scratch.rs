//! What plans allocate: scratch memory is priced to the byte, and kept inside the budget.

use wgpu_attention::{
    AttentionProblem, Bias, Cache, Caps, Dispatch, Dtype, Error, Family, Layout, Operand, Path, Plan,
    PlanOptions, Similarity,
};

use super::common::case::values;
use super::common::rng::Rng;
use super::{OF_KEYS, check_plan, devices};

/// A budget without room for splits, which nobody asked for, makes a plan without them.
#[test]
fn no_split_is_worth_an_error() {
    let problem = AttentionProblem::new(1, 8, 8, 1, 4096, 64, 64);
    let plan = |scratch_budget, splits| {
        let options = PlanOptions { scratch_budget: Some(scratch_budget), splits, ..PlanOptions::default() };
        Plan::new(&problem, &Caps::minimal(), &options)
    };
    assert!(plan(u64::MAX, None).unwrap().splits() > 1);
    for budget in [0, 1, 4000] {
        let plan = plan(budget, None).unwrap();
        assert_eq!((plan.splits(), plan.scratch_bytes()), (1, 0));
        assert!(plan.to_string().contains("no room"), "{plan}");
    }
    // One that was asked for is.
    assert!(matches!(plan(0, Some(4)), Err(Error::LimitExceeded { .. })));
}

/// Where the mask's map would be one buffer too many, or its bytes too many, the plan does without.
#[test]
fn a_mask_is_mapped_where_there_is_room() {
    let mask = Some(Layout::broadcast([1, 1, 512, 512]));
    let problem = AttentionProblem { mask, lse: true, ..AttentionProblem::new(1, 8, 8, 512, 512, 64, 64) };
    let crowded = AttentionProblem {
        bias: Some(Bias { dtype: Dtype::F32, layout: Layout::broadcast([1, 1, 512, 512]) }),
        kv_lens: true,
        ..problem.clone()
    };
    let caps = Caps { subgroup: Some((8, 8)), ..Caps::minimal() };
    for family in Family::of(Path::Fused).filter(|family| family.lacks(&caps).is_none()) {
        let plan = |problem: &AttentionProblem, scratch_budget| {
            let (family, splits) = (Some(family), Some(1));
            let options = PlanOptions { family, scratch_budget, splits, ..PlanOptions::default() };
            Plan::new(problem, &caps, &options).expect("served")
        };
        let mapped = plan(&problem, None);
        let [rows, keys] = mapped.mask_tile().expect("eight heads share it");
        assert_eq!(mapped.scratch_bytes() as usize, 4 * 512_usize.div_ceil(rows) * 512 / (16 * keys));
        assert_eq!(mapped.kernels()[0], "mask_map");
        // q, k, v, o, lse, mask, bias, key lengths: eight already.
        for (without, why) in
            [(plan(&crowded, None), "9 storage buffers"), (plan(&problem, Some(60)), "room")]
        {
            assert_eq!((without.mask_tile(), without.scratch_bytes()), (None, 0), "{without}");
            assert!(without.to_string().contains(why), "{without}");
        }
    }
}

/// What is made of keys is priced, head by head: a budget for one head serves any number of them, in chunks of
/// whole groups where a group fits.
#[test]
fn terms_of_keys_are_priced() {
    let caps = Caps::minimal();
    let (heads, group, queries, keys, dim) = (32, 4, 2, 1024, 64);
    let problem = AttentionProblem::new(2, heads, heads / group, queries, keys, dim, dim);
    let hidden = 50;
    let plan = |similarity, family: Option<Family>, scratch_budget| {
        let problem = AttentionProblem { similarity, ..problem.clone() };
        let splits = family.filter(|family: &Family| family.path() == Path::Fused).map(|_| 1);
        Plan::new(&problem, &caps, &PlanOptions { family, scratch_budget, splits, ..PlanOptions::default() })
    };
    let rows = 2 * heads * queries;
    let (tile, staged) = (Some(Family::FusedTile), Some(Family::StagedTile));
    // A row of f32 for each query, and a number for each key of each of its own heads.
    let cosine = plan(Similarity::Cosine, tile, None).unwrap();
    assert_eq!(cosine.scratch_bytes() as usize, 4 * (rows * dim + 2 * heads / group * keys));
    assert_eq!((cosine.chunks(), cosine.kernels()), (1, vec!["normalize_q", "key_norms", "fused_tile"]));

    for (per_head, heads_of_keys) in [(false, 2 * heads / group), (true, 2 * heads)] {
        let additive = Similarity::Additive { query_dim: dim, hidden, per_head };
        let whole = plan(additive, staged, Some(u64::MAX)).unwrap();
        let row = 52 + keys + 1;
        assert_eq!(whole.scratch_bytes() as usize, 4 * (rows * row + heads_of_keys * keys * 52));
        assert_eq!(whole.chunks(), 1);
        // Three heads of keys, and their queries.
        let of_one = 4 * (queries * row * (2 * heads / heads_of_keys) + keys * 52);
        let some = plan(additive, staged, Some(3 * of_one as u64 + 16)).unwrap();
        assert_eq!(some.chunks(), heads_of_keys.div_ceil(3), "{some}");
        // One row.
        let least = plan(additive, staged, Some((4 * (row + keys * 52) + 12) as u64)).unwrap();
        assert_eq!(least.chunks(), rows);
        let keys_made = least.dispatches().filter(|dispatch| dispatch.kernel == "project_k").count();
        assert_eq!(keys_made, 2 * heads, "once for all rows of a head");
        assert!(matches!(plan(additive, staged, Some(1000)), Err(Error::LimitExceeded { .. })));
        let Err(Error::KernelUnfit { why, .. }) = plan(additive, tile, None) else { panic!("fused") };
        assert!(why.contains("additive"), "{why}");
        assert_eq!(plan(additive, None, None).unwrap().path(), Path::Staged);

        let long =
            AttentionProblem { similarity: additive, ..AttentionProblem::new(1, 1, 1, 1, 1 << 20, 1, 1) };
        let long = AttentionProblem { q: Layout::bhsd(1, 1, dim), ..long };
        let options = PlanOptions { scratch_budget: Some(u64::MAX), ..PlanOptions::default() };
        let error = Plan::new(&long, &caps, &options).unwrap_err();
        assert!(matches!(&error, Error::LimitExceeded { what, .. } if what.contains("keys")), "{error}");
    }
}

/// Keys and values that a row kernel would convert for many rows are unpacked first, if half of the budget has room for
/// those of a head.
#[test]
fn unpacked_keys_are_priced() {
    let caps =
        Caps { device_type: wgpu::DeviceType::Cpu, driver: "llvmpipe Mesa 26.1.6".into(), ..Caps::minimal() };
    let (heads, group, queries, keys, dim) = (8, 2, 512, 1000, 66);
    let of =
        |dtype| AttentionProblem::new(2, heads, heads / group, queries, keys, dim, dim).with_dtype(dtype);
    let plan = |problem: &AttentionProblem, scratch_budget| {
        Plan::new(problem, &caps, &PlanOptions { scratch_budget, ..PlanOptions::default() }).unwrap()
    };
    let unpacked = ["unpack_k", "unpack_v", "fused_row"];
    let a_head = 2 * 4 * keys as u64 * 68;
    for problem in [of(Dtype::F16), of(Dtype::F32), of(Dtype::F32).with_cache(Cache::Contiguous, Dtype::Int8)]
    {
        let whole = plan(&problem, None);
        assert_eq!((whole.kernels(), whole.chunks()), (unpacked.to_vec(), 1), "{whole}");
        assert_eq!(whole.scratch_bytes(), 2 * (heads / group) as u64 * a_head);
        // Three heads of keys at a time.
        let some = plan(&problem, Some(3 * a_head));
        assert_eq!((some.kernels(), some.chunks()), (unpacked.to_vec(), 3), "{some}");
        assert_eq!(some.scratch_bytes(), 3 * a_head);
        let none = plan(&problem, Some(2 * a_head - 1));
        assert_eq!((none.kernels(), none.scratch_bytes()), (vec!["fused_row"], 0), "{none}");
        assert!(none.to_string().contains("stay as they are"), "{none}");
        // Not for few rows, nor on other devices.
        let few = AttentionProblem { seq_q: 20, ..problem.clone() };
        let few =
            AttentionProblem { q: Layout::bhsd(heads, 20, dim), o: Layout::bhsd(heads, 20, dim), ..few };
        assert_eq!(plan(&few, None).kernels(), ["fused_row"]);
        let gpu = Plan::new(&problem, &Caps::minimal(), &PlanOptions::default()).unwrap();
        assert_eq!(gpu.kernels()[0], "fused_tile");
    }
    let plain = AttentionProblem::new(2, heads, heads / group, queries, keys, 64, 64);
    assert_eq!(plan(&plain, None).kernels(), ["fused_row"]);
    // Nor more than the kernel's index reaches, however large bindings may be: 2^28 elements of keys and values.
    let caps = Caps { max_storage_binding: 1 << 32, max_buffer: 1 << 40, ..caps };
    let options = PlanOptions { scratch_budget: Some(u64::MAX), ..PlanOptions::default() };
    for (seq_kv, chunks, kernels) in
        [(1 << 20, 8, &unpacked[..]), (1 << 19, 4, &unpacked[..]), (1 << 21, 1, &unpacked[2..])]
    {
        let long = AttentionProblem::new(1, 8, 8, 2048, seq_kv, 128, 128).with_dtype(Dtype::F16);
        let one_head = Layout { strides: [0, 0, 128, 1], offset: 0 };
        let long = AttentionProblem { k: one_head, v: one_head, ..long };
        let plan = Plan::new(&long, &caps, &options).unwrap();
        assert_eq!(plan.kernels(), kernels, "{plan}");
        let heads = plan.dispatches().filter(|dispatch| dispatch.kernel == "unpack_k").count();
        assert_eq!(heads, if kernels.len() == 3 { chunks } else { 0 }, "{plan}");
    }
}

/// Scratch stays inside any budget that holds one row, down to the last byte, and dispatches cover
/// every chunk.
#[test]
fn any_budget_is_kept() {
    let mut rng = Rng::new(12);
    for caps in devices() {
        for i in 0..60 {
            let mut axes = values::draw(&mut rng);
            axes.batch = axes.batch.max(1);
            axes.seq_q = axes.seq_q.max(1);
            let problem = axes.build(i).problem;
            for family in Family::ALL.iter().copied().map(Some).chain([None]) {
                let plan = |budget| {
                    let options =
                        PlanOptions { family, scratch_budget: Some(budget), ..PlanOptions::default() };
                    Plan::new(&problem, &caps, &options)
                };
                let mut budget = 1;
                let least = loop {
                    match plan(budget) {
                        Ok(_) => break Some(budget),
                        Err(Error::LimitExceeded { need, got, .. }) => {
                            assert!(need > got && got == budget);
                            budget = need;
                        }
                        Err(Error::KernelUnfit { .. }) if family.is_some() => break None,
                        Err(error) => panic!("{error}"),
                    }
                };
                let Some(least) = least else { continue };
                for budget in [least, least + 1, 3 * least, 10_000.max(least), 1 << 20, u64::MAX] {
                    let Ok(plan) = plan(budget) else { panic!("{budget} after {least} was enough") };
                    check_plan(&plan, &caps, budget);
                    let kernels = plan.kernels();
                    // What is read from everywhere is made once.
                    let once = kernels.iter().filter(|name| ["bundle", "mask_map"].contains(name)).count();
                    // And what is made of the keys, once for a head.
                    let of_keys = kernels.iter().filter(|name| OF_KEYS.contains(name)).count();
                    let all = once + (kernels.len() - once - of_keys) * plan.chunks();
                    let not_of_keys = |dispatch: &Dispatch| !OF_KEYS.contains(&dispatch.kernel);
                    let dispatches = plan.dispatches().filter(not_of_keys).count();
                    // Without keys there is nothing to score, and weights are empty.
                    assert!(dispatches <= all);
                    assert!(problem.seq_kv == 0 || dispatches == all);
                }
            }
        }
    }
}

/// What a plan for outputs says about their size.
#[test]
fn output_bytes() {
    let problem = AttentionProblem { lse: true, weights: true, ..AttentionProblem::new(2, 4, 2, 3, 5, 8, 6) };
    let plan = Plan::new(&problem, &Caps::minimal(), &PlanOptions::default()).expect("served");
    let elements = |operand: Operand| problem.shape(operand).iter().product::<usize>() as u64;
    let bytes = 4 * (elements(Operand::O) + elements(Operand::Lse) + elements(Operand::Weights));
    assert_eq!(plan.output_bytes(), bytes);
}
