//! Every path against the oracle: a covering table over all options and sizes, seeded draws, and
//! the numbers that break attention in practice.

mod common;

use std::sync::Arc;

use common::case::{Axes, Case, Data, Lens, Sim, Spread, Storage, fill, indices, values};
use common::check::{Expected, Gap, same_bits};
use common::gpu::{self, Door, Kind};
use common::rng::{Rng, env_number, fresh_seed, slice};
use common::subject::{Outcome, Subject, check_all};
use wgpu_attention::{
    Align, Attention, AttentionProblem, Bias, Caps, Dtype, Error, Layout, MatrixUnits, Operand, Options,
    PipelineBlob, Plan, PlanOptions, Tensor, Window,
};

/// Multiplications that the oracle may spend on one case of a table.
const WORK: usize = 2_000_000;

/// Draws until a family's kernel fits one; the last counts, whether it does or not.
const DRAWS: usize = 8;

/// An additive similarity for tests of one.
const ADDITIVE: Sim = Sim::Additive { extra: 2, hidden: 10, per_head: false };

/// Which GPU subject a row of the table runs on, and through which door.
fn gpu_subject(turn: usize) -> Option<Subject> {
    let gpus = Subject::gpus();
    (!gpus.is_empty()).then(|| gpus[turn % gpus.len()])
}

/// The table has two halves, each covering: what is compiled in (element types, options on or off,
/// who runs it), and what is not (sizes, kinds of masks, numbers). Each row of the first serves
/// several of the second, since compiling is what takes the time on software adapters.
fn covering_cases() -> Vec<(Case, Vec<Subject>)> {
    const DTYPES: [(Dtype, Dtype); 6] = [
        (Dtype::F32, Dtype::F32),
        (Dtype::F32, Dtype::F32),
        (Dtype::F16, Dtype::F16),
        (Dtype::Bf16, Dtype::Bf16),
        (Dtype::F16, Dtype::F32),
        (Dtype::F32, Dtype::Bf16),
    ];
    // With every option on in every row, hardly a key would be left to look at: bias, mask and ALiBi
    // are off more often than on, and so are the causal masks and windows below.
    let compiled = common::pairs::covering(
        &[
            DTYPES.len(),
            2 + Dtype::FLOATS.len(),
            3,
            3,
            2,
            2,
            2,
            5,
            2,
            3,
            2,
            values::DIM_V_ANY.len(),
            // Turns of the GPU subjects: kinds x checks x (families and the plan's own choice).
            Subject::gpus().len().max(1),
        ],
        30,
    );
    let run = common::pairs::covering(
        &[
            values::SEQ.len(),
            values::SEQ.len(),
            values::HEADS.len(),
            3,
            values::DIM_ANY.len(),
            2,
            values::SIMILARITY.len(),
            values::SCALE.len(),
            values::SOFTCAP.len(),
            Spread::ALL.len(),
            2,
            Spread::ALL.len(),
            values::CAUSAL.len() + 1,
            values::WINDOW.len() + 5,
            2,
            values::LENS.len() - 1,
            values::STORAGE.len(),
            3,
        ],
        31,
    );
    let cases = run.iter().enumerate().map(|(number, run)| {
        let compiled = &compiled[number % compiled.len()];
        let or_plain = |i: usize, n: usize| if i < n { i } else { 0 };
        let vec4 = compiled[10] == 0;
        let dims = if vec4 { values::DIM_VEC4 } else { values::DIM_ANY };
        let dims_v = if vec4 { values::DIM_V_VEC4 } else { values::DIM_V_ANY };
        let storage = values::STORAGE[run[16]];
        let (bilinear, others) = values::SIMILARITY.split_at(3);
        let (plain, others) = others.split_at(2);
        let (cosine, additive) = others.split_at(1);
        let axes = Axes {
            dtype: DTYPES[compiled[0]].0,
            out_dtype: DTYPES[compiled[0]].1,
            bias: compiled[1]
                .checked_sub(2)
                .map(|dtype| (Dtype::FLOATS[dtype], Spread::ALL[run[9]], run[10] == 0)),
            alibi: compiled[2] == 0,
            mask: (compiled[3] == 0).then_some(Spread::ALL[run[11]]),
            lens: if compiled[4] == 0 { values::LENS[1 + run[15]] } else { Lens::None },
            sinks: compiled[5] == 0,
            softcap: (compiled[6] == 0).then_some(values::SOFTCAP[run[8]]),
            similarity: match compiled[7] {
                0 => bilinear[run[6] % bilinear.len()],
                1 | 2 => plain[run[6] % plain.len()],
                3 => cosine[0],
                _ => additive[run[6] % additive.len()],
            },
            lse: compiled[8] == 0,
            weights: compiled[9] == 0,
            head_dim: dims[run[4]],
            head_dim_v: dims_v[compiled[11]][run[5]],
            seq_q: values::SEQ[run[0]],
            seq_kv: values::SEQ[run[1]],
            heads: values::HEADS[run[2]],
            batch: run[3] + 1,
            scale: values::SCALE[run[7]],
            causal: values::CAUSAL[or_plain(run[12], values::CAUSAL.len())],
            window: values::WINDOW[or_plain(run[13], values::WINDOW.len())],
            align: values::ALIGN[run[14]],
            storage: match storage {
                Storage::Odd | Storage::DimMajor if vec4 => Storage::Padded,
                storage => storage,
            },
            spread: [1.0, 3.0, 8.0][run[17]],
        };
        let mut subjects = Subject::cpu();
        let case = axes.shrunk_to(WORK).build(number as u64);
        subjects.extend(gpu_subject(compiled[12]).map(|subject| subject.that_compares(&case)));
        (case, subjects)
    });
    cases.collect()
}

#[test]
fn every_two_options_and_sizes_together() {
    let cases: Vec<_> = slice(covering_cases()).collect();
    check_all("covering table", &cases);
}

/// Sizes alone, on every subject: with no option on, nothing hides a wrong tile edge.
#[test]
fn plain_sizes() {
    let mut rng = Rng::new(7);
    let mut cases = Vec::new();
    let edges = [(16, 16), (17, 63), (1, 257), (33, 65), (64, 64), (65, 127), (129, 31), (257, 2), (3, 128)];
    for (i, (seq_q, seq_kv)) in edges.into_iter().enumerate() {
        let axes = Axes {
            dtype: Dtype::FLOATS[i % 3],
            out_dtype: Dtype::FLOATS[i % 3],
            seq_q,
            seq_kv,
            head_dim: rng.pick(&values::DIM),
            head_dim_v: rng.pick(&values::DIM),
            storage: values::STORAGE[i % values::STORAGE.len()],
            ..Axes::default()
        };
        cases.push((axes.shrunk_to(WORK).build(i as u64), Subject::all()));
    }
    check_all("plain sizes", &cases);
}

/// `WGPU_ATTENTION_CASES` draws (default 40). A failure prints its seed; `WGPU_ATTENTION_SEED` and
/// `WGPU_ATTENTION_CASES=1` repeat it.
#[test]
fn seeded_draws() {
    let count = env_number("WGPU_ATTENTION_CASES").unwrap_or(40);
    let first = fresh_seed();
    let cases: Vec<_> = (0..count)
        .map(|i| {
            let seed = first.wrapping_add(i);
            let mut rng = Rng::new(seed);
            let subject = gpu_subject(rng.below(1 << 16));
            let mut draw = || {
                let case = values::draw(&mut rng).shrunk_to(WORK).build(seed);
                let subject = subject.map(|subject| subject.that_compares(&case));
                (case, subject)
            };
            // A family has few turns here, and some cases in which its kernel does not fit: with one draw a
            // turn, chance alone would have it serve less than half of them.
            let mut drawn = draw();
            for _ in 1..DRAWS {
                if drawn.1.is_none_or(|subject| subject.serves(&drawn.0)) {
                    break;
                }
                drawn = draw();
            }
            let (mut case, subject) = drawn;
            case.name = format!("draw with WGPU_ATTENTION_SEED={seed:#x}: {}", case.name);
            let mut subjects = Subject::cpu();
            subjects.extend(subject);
            (case, subjects)
        })
        .collect();
    check_all("seeded draws", &cases);
}

/// Empty batches, no queries, no keys: legal, and defined.
#[test]
fn nothing_to_do() {
    let mut cases = Vec::new();
    for (i, (batch, seq_q, seq_kv)) in [(0, 5, 5), (2, 0, 5), (2, 5, 0), (0, 0, 0)].into_iter().enumerate() {
        for sinks in [false, true] {
            for lens in [Lens::None, Lens::Partial] {
                let axes = Axes { batch, seq_q, seq_kv, sinks, lens, weights: true, ..Axes::default() };
                cases.push((axes.build(i as u64), Subject::all()));
            }
        }
    }
    check_all("empty sizes", &cases);
}

/// More workgroups than a side of a dispatch takes: those that the next side has too many store nothing.
#[test]
fn folded_dispatches() {
    let sims = [Sim::ScaledDot, Sim::Bilinear { extra: 1, per_head: false }, Sim::Cosine, ADDITIVE];
    let mut cases = Vec::new();
    for (i, similarity) in sims.into_iter().enumerate() {
        let mask = (similarity == Sim::ScaledDot).then_some(Spread::Full);
        // Two sides, and three; in splits of the keys, and without.
        for heads in [50, 2000] {
            let axes = Axes {
                heads: (heads, heads),
                seq_q: 1,
                seq_kv: 5,
                head_dim: 4,
                head_dim_v: 4,
                ..Axes::default()
            };
            let case = Axes { similarity, mask, ..axes }.build(i as u64);
            let subjects: Vec<_> = Subject::gpus()
                .into_iter()
                .filter(|subject| {
                    subject.compares(&case) && matches!(subject, Subject::Gpu { kind: Kind::Minimal, .. })
                })
                .collect();
            cases.extend([(case.clone(), subjects.clone()), (case, subjects)]);
        }
    }
    check_all("folded dispatches", &cases);
}

/// Rows of any length: a hundred thousand keys and a million.
#[test]
fn long_rows() {
    let mut cases = Vec::new();
    for (i, (seq_kv, dtype)) in
        [(100_000, Dtype::F32), (100_003, Dtype::F16), (1_000_000, Dtype::F32)].into_iter().enumerate()
    {
        let axes = Axes {
            dtype,
            out_dtype: dtype,
            heads: (1, 1),
            seq_q: 2,
            seq_kv,
            head_dim: 4,
            head_dim_v: 3,
            ..Axes::default()
        };
        let random = axes.build(i as u64);
        // All keys alike and V = 1: the row is the mean of ones, however many there are.
        let mut ones = random.clone();
        let p = &ones.problem;
        ones.name = format!("V = 1 over {}", ones.name);
        ones.data.k = Tensor::zeros(dtype, p.extent(Operand::K) as usize).into();
        ones.data.v = Tensor::from_f32(dtype, &vec![1.0; p.extent(Operand::V) as usize]).into();
        cases.push((random, Subject::few()));
        cases.push((ones, Subject::few()));
    }
    let causal = Axes {
        causal: Some(Align::BottomRight),
        window: Some(Window { left: Some(60_000), right: None }),
        alibi: true,
        lens: Lens::Partial,
        weights: true,
        heads: (2, 1),
        seq_q: 3,
        seq_kv: 70_001,
        head_dim: 3,
        head_dim_v: 1,
        ..Axes::default()
    };
    cases.push((causal.build(9), Subject::few()));
    // Rows enough that a lane would walk one alone, and as many keys as that may still take.
    let many = Axes { heads: (1, 1), seq_q: 64, seq_kv: 131_000, head_dim: 4, head_dim_v: 3, ..causal };
    let many = Axes { causal: None, window: None, weights: false, lens: Lens::None, ..many };
    cases.push((many.build(10), Subject::few()));
    // The end of a quarter of a million tokens that attend to themselves: their last rows.
    let tokens = Axes { causal: Some(Align::BottomRight), heads: (1, 1), seq_q: 3, ..Axes::default() };
    let tokens = Axes { seq_kv: 256 << 10, head_dim: 64, head_dim_v: 64, ..tokens };
    cases.push((tokens.build(11), Subject::few()));
    check_all("long rows", &cases);
}

/// Trusted shaders and those with run-time checks are the same arithmetic.
#[test]
fn runtime_checks_do_not_change_a_bit() {
    let all = Axes {
        batch: 2,
        heads: (4, 2),
        seq_q: 65,
        seq_kv: 77,
        head_dim: 20,
        head_dim_v: 33,
        bias: Some((Dtype::Bf16, Spread::PerHead, true)),
        mask: Some(Spread::Shared),
        alibi: true,
        sinks: true,
        softcap: Some(30.0),
        causal: Some(Align::BottomRight),
        lens: Lens::Partial,
        weights: true,
        storage: Storage::Odd,
        ..Axes::default()
    };
    let half = Axes { dtype: Dtype::F16, out_dtype: Dtype::F16, ..all };
    let plain = Axes { seq_q: 64, seq_kv: 128, head_dim: 64, head_dim_v: 64, ..Axes::default() };
    for (i, axes) in [plain, all, half].into_iter().enumerate() {
        let case = axes.build(i as u64);
        for kind in [Kind::Full, Kind::Minimal] {
            let Some(gpu) = gpu::get(kind, true) else { return };
            for family in gpu.families().map(Some) {
                let run = |checks| {
                    Subject::Gpu { kind, checks, family, door: Door::Encode, split: false }.outputs(&case)
                };
                if let (Some(trusted), Some(checked)) = (run(false), run(true)) {
                    assert!(same_bits(&trusted, &checked), "{kind:?} {family:?}\n  {}", case.name);
                }
            }
        }
    }
}

/// NaN in a kept q, k or v reaches exactly the rows that read it. What a mask, a causal edge, a
/// window or a key length drops reaches nothing.
#[test]
fn nan_goes_where_it_is_read_and_nowhere_else() {
    let base = Axes { batch: 2, heads: (4, 2), seq_q: 37, seq_kv: 70, spread: 1.0, ..Axes::default() };
    let drops = [
        base,
        Axes { causal: Some(Align::TopLeft), ..base },
        Axes { causal: Some(Align::BottomRight), weights: true, ..base },
        Axes { window: Some(Window { left: Some(5), right: Some(3) }), ..base },
        Axes { mask: Some(Spread::Full), ..base },
        Axes { bias: Some((Dtype::F32, Spread::PerHead, true)), ..base },
        Axes { lens: Lens::Partial, sinks: true, ..base },
        Axes { dtype: Dtype::F16, out_dtype: Dtype::F16, mask: Some(Spread::Shared), ..base },
        Axes {
            dtype: Dtype::Bf16,
            out_dtype: Dtype::Bf16,
            storage: Storage::Odd,
            mask: Some(Spread::Keys),
            ..base
        },
        Axes { similarity: Sim::Cosine, mask: Some(Spread::Full), ..base },
        Axes { similarity: Sim::Cosine, causal: Some(Align::BottomRight), lens: Lens::Partial, ..base },
        Axes { similarity: ADDITIVE, mask: Some(Spread::Full), ..base },
        Axes { similarity: ADDITIVE, causal: Some(Align::BottomRight), lens: Lens::Partial, ..base },
    ];
    let mut cases = Vec::new();
    for (i, axes) in drops.into_iter().enumerate() {
        for (j, operand) in [Operand::Q, Operand::K, Operand::V].into_iter().enumerate() {
            for bad in [f32::NAN, f32::INFINITY] {
                // An infinite query or key is 1 behind a tanh.
                if axes.similarity == ADDITIVE && bad == f32::INFINITY && operand != Operand::V {
                    continue;
                }
                let mut case = axes.build((3 * i + j) as u64);
                let mut rng = Rng::new(i as u64);
                let p = &case.problem;
                let layout = p.layout(operand).expect("every problem has q, k and v");
                let shape = p.shape(operand);
                let data = &mut case.data;
                case.has_infinity = bad == f32::INFINITY;
                if case.has_infinity {
                    // Positive products: an infinite key then has an infinite score, not its negative.
                    for tensor in [&mut data.q, &mut data.k] {
                        let values: Vec<f32> = tensor.to_f32().into_iter().map(f32::abs).collect();
                        *tensor = Tensor::from_f32(p.dtype, &values).into();
                    }
                }
                let tensor = match operand {
                    Operand::Q => &mut data.q,
                    Operand::K => &mut data.k,
                    _ => &mut data.v,
                };
                let tensor = Arc::make_mut(tensor);
                for _ in 0..2 {
                    let at = shape.map(|n| rng.below(n));
                    tensor.set(layout.index(at), bad);
                    case.name = format!("{bad} at {operand}{at:?}, {}", case.name);
                }
                let subjects = Subject::few().into_iter().filter(|subject| subject.compares(&case)).collect();
                cases.push((case, subjects));
            }
        }
    }
    // A whole column of dropped keys, K and V alike: beyond the causal edge of every row.
    let mut case = Axes { causal: Some(Align::TopLeft), seq_q: 20, seq_kv: 90, ..base }.build(77);
    for operand in [Operand::K, Operand::V] {
        let (p, shape) = (&case.problem, case.problem.shape(operand));
        let layout = p.layout(operand).expect("every problem has k and v");
        let data = if operand == Operand::K { &mut case.data.k } else { &mut case.data.v };
        for at in indices(shape).filter(|at| at[2] >= 20) {
            Arc::make_mut(data).set(layout.index(at), f32::NAN);
        }
    }
    case.name = format!("NaN beyond the causal edge, {}", case.name);
    assert!(Expected::of(&case).oracle.o.iter().all(|x| x.is_finite()));
    cases.push((case, Subject::all()));
    check_all("NaN and infinity", &cases);
}

/// A NaN that every row keeps, under more keys than one dispatch takes: whoever looks twice at such rows must come
/// to their end before a driver loses patience with their loops.
#[test]
fn second_looks_come_to_their_end() {
    let gpus: Vec<_> =
        [Kind::Full, Kind::Minimal].into_iter().filter_map(|kind| gpu::get(kind, false)).collect();
    let mut runs = 0;
    // Each has as many rows as a thread of the row kernel takes.
    for (seq_q, dim) in [(48, 16), (64, 32), (64, 64), (24, 128), (8, 512)] {
        let axes = Axes { seq_q, seq_kv: 8192, head_dim: dim, head_dim_v: dim, ..Axes::default() };
        let mut case = Axes { batch: 1, heads: (1, 1), ..axes }.build(78);
        let at = case.problem.v.index([0, 0, 3, 5]);
        Arc::make_mut(&mut case.data.v).set(at, f32::NAN);
        let expected = Expected::of(&case);
        for (gpu, family) in gpus.iter().flat_map(|gpu| gpu.families().map(move |family| (gpu, family))) {
            let options = PlanOptions { family: Some(family), splits: Some(1), ..PlanOptions::default() };
            let outcome = match gpu.run(&case, &options, Door::Encode) {
                Err(Error::KernelUnfit { .. }) => continue,
                outcome => outcome.map_err(|e| e.to_string()),
            };
            if let Err(what) = outcome.and_then(|(out, gap)| expected.check(&case, &out, gap)) {
                panic!("{family}: {what}\n  {}", case.name);
            }
            runs += 1;
        }
    }
    common::say(&format!("second looks: {runs} runs"));
}

/// Pipelines can be there before the first call.
#[test]
fn pipelines_can_be_compiled_ahead() {
    let Some(gpu) = gpu::get(Kind::Full, false) else { return };
    let case = Axes { causal: Some(Align::TopLeft), ..Axes::default() }.build(5);
    let attention = gpu.fresh();
    let plan = attention.plan(&case.problem).expect("served");
    assert_eq!(attention.pipelines(), 0);
    assert_eq!(attention.compile(&plan), Ok(()));
    let compiled = attention.pipelines();
    assert!(compiled > 0);
    let out = attention.run_plan_blocking(&plan, &case.data.inputs()).expect("served");
    Expected::of(&case).check(&case, &out, Gap::Zero).unwrap_or_else(|what| panic!("{what}"));
    assert_eq!(attention.pipelines(), compiled);
    let other = Plan::new(&case.problem, &Caps::minimal(), &PlanOptions::default()).expect("served");
    assert!(matches!(attention.compile(&other), Err(Error::ForeignPlan { .. })));
}

/// What a driver has made of pipelines serves another object, and whatever is damaged is refused.
#[test]
#[allow(unsafe_code)]
fn pipelines_can_be_kept() {
    let Some(gpu) = gpu::get(Kind::Full, false) else { return };
    let (device, queue) = (gpu.attention.device(), gpu.attention.queue());
    let case = Axes::default().build(3);
    let expected = Expected::of(&case);
    let run = |pipelines| {
        let own = Attention::with_options(device, queue, Options { pipelines, ..Options::default() });
        let out = own.run_blocking(&case.problem, &case.data.inputs()).expect("served");
        expected.check(&case, &out, Gap::Zero).unwrap_or_else(|what| panic!("{what}"));
        own.pipeline_blob()
    };
    let offered = device.features().contains(wgpu::Features::PIPELINE_CACHE);
    let Some(blob) = run(None) else {
        assert!(!offered, "{} has PIPELINE_CACHE and gives no blob", gpu.attention.caps().adapter);
        common::say("NOT TESTED: this device keeps no pipelines (PIPELINE_CACHE)");
        return;
    };
    let bytes = blob.to_bytes();
    // SAFETY: the bytes of a blob, or such as are refused.
    let read = |bytes: &[u8]| unsafe { PipelineBlob::from_bytes(bytes) };
    assert_eq!(read(&bytes), Ok(blob.clone()));
    run(Some(blob));
    let mut damaged = bytes.clone();
    *damaged.last_mut().expect("not empty") ^= 1;
    for (bytes, what) in [(&damaged[..], "checksum"), (&bytes[..20], "ends"), (b"no blob", "begin")] {
        let Err(Error::PipelineBlob { why }) = read(bytes) else { panic!("{what}") };
        assert!(why.contains(what), "{why}");
    }
}

/// Before a plan trusts cooperative matrices they have passed a test; where they are, they do.
#[test]
fn cooperative_matrices_pass_their_test() {
    let Some(gpu) = gpu::get(Kind::Full, false) else { return };
    let Some(units) = gpu.attention.caps().matrix.clone() else { return };
    let tested = pollster::block_on(gpu.fresh().self_test());
    assert_eq!(tested.caps().matrix, Some(MatrixUnits { tested: Some(Ok(())), ..units }));
    let problem = AttentionProblem::new(1, 1, 1, 64, 64, 32, 32).with_dtype(Dtype::F16);
    let plan = tested.plan(&problem).expect("served").to_string();
    assert!(plan.contains("fused:tile_matrix kernels, products on matrix units"), "{plan}");
}

/// As other devices have them: a driver may run them in smaller subgroups than the largest that it has, or read them
/// from arrays of scalars alone.
#[test]
fn cooperative_matrices_of_other_devices() {
    let Some(gpu) = gpu::get(Kind::Full, false) else { return };
    let Some(units) = gpu.attention.caps().matrix.clone() else { return };
    let (device, queue) = (gpu.attention.device(), gpu.attention.queue());
    let smaller = MatrixUnits { subgroup: 2 * units.subgroup, tested: None, ..units.clone() };
    let scalars = MatrixUnits { scalars: !units.scalars, tested: None, ..units };
    for units in [smaller, scalars] {
        let what = format!("{units:?}");
        let options = Options { matrix: Some(units), ..Options::default() };
        let other = Attention::with_options(device, queue, options);
        let tested = pollster::block_on(other.self_test()).caps().matrix.clone();
        assert_eq!(tested.and_then(|units| units.tested), Some(Ok(())), "{what}");
    }
}

/// A bias given by a function of `[b, h, i, j]`, on top of `axes`.
fn with_bias(axes: Axes, seed: u64, value: impl Fn([usize; 4]) -> f32) -> Case {
    let mut case = axes.build(seed);
    let shape = case.problem.shape(Operand::Bias);
    let layout = Layout::broadcast(shape);
    case.problem.bias = Some(Bias { dtype: Dtype::F32, layout });
    case.data.bias = Some(fill(Dtype::F32, layout, shape, 0, |at| Some(value(at))));
    case
}

/// -inf excludes; the lowest finite number, which others use as a mask, is a number like any.
#[test]
fn finite_huge_biases_are_ordinary_numbers() {
    let axes = Axes { heads: (1, 1), seq_q: 9, seq_kv: 67, weights: true, ..Axes::default() };
    let mut cases = vec![];
    let lowest = with_bias(axes, 1, |_| f32::MIN);
    // The scores vanish beside the bias: the row is the mean of all values, not an empty row.
    let mean = Expected::of(&lowest).oracle.weights.expect("asked for");
    assert!(mean.iter().all(|w| (w - 1.0 / 67.0).abs() < 1e-12));
    cases.push(lowest);
    cases.push(with_bias(axes, 2, |[_, _, i, j]| if (i + j) % 3 == 0 { f32::MIN } else { 0.0 }));
    cases.push(with_bias(axes, 3, |[_, _, i, j]| if j == i { f32::MIN } else { f32::NEG_INFINITY }));
    cases.push(with_bias(axes, 4, |[_, _, i, _]| if i % 2 == 0 { f32::NEG_INFINITY } else { f32::MIN }));
    cases.push(with_bias(axes, 5, |[_, _, i, _]| if i % 2 == 0 { f32::NEG_INFINITY } else { 0.5 }));
    cases.push(with_bias(axes, 6, |[_, _, _, j]| if j < 40 { -1e30 } else { -1e4 }));
    let cases: Vec<_> = cases.into_iter().map(|case| (case, Subject::all())).collect();
    check_all("huge biases", &cases);
}

/// WGSL's tanh may be wrong by 1e-5, which a cap of 50 turns into 5e-4 on a score. The contract's
/// f32 budget does not allow that.
#[test]
fn soft_caps_keep_the_f32_budget() {
    let mut cases = Vec::new();
    for (i, cap) in [0.01, 1.0, 30.0, 50.0, 1000.0].into_iter().enumerate() {
        for spread in [0.1, 5.0, 40.0] {
            let axes =
                Axes { softcap: Some(cap), spread, seq_q: 16, seq_kv: 64, head_dim: 8, ..Axes::default() };
            cases.push((axes.build(i as u64), Subject::few()));
        }
    }
    check_all("soft caps", &cases);
}

/// The same tanh of small numbers that large ones weigh: an error of the built-in would be large in the score.
#[test]
fn additive_scores_keep_the_f32_budget() {
    let mut cases = Vec::new();
    for (i, size) in [1e-3, 0.05, 1.0, 4.0].into_iter().enumerate() {
        let axes = Axes { similarity: ADDITIVE, seq_q: 16, seq_kv: 64, ..Axes::default() };
        let mut case = axes.build(i as u64);
        let data = &mut case.data;
        for (x, by) in [(&mut data.wq, size), (&mut data.wk, size), (&mut data.score_v, 1.0 / size)] {
            x.iter_mut().flatten().for_each(|x| *x *= by);
        }
        case.name = format!("sums of {size}, {}", case.name);
        let subjects = Subject::few().into_iter().filter(|subject| subject.compares(&case)).collect();
        cases.push((case, subjects));
    }
    check_all("additive scores", &cases);
}

/// Scores of +-10^4: without subtracting the maximum, every exponential would overflow or vanish.
/// Whole numbers with gaps, so that rounding decides nothing.
#[test]
fn large_scores_do_not_overflow() {
    let mut cases = Vec::new();
    let base = Axes { similarity: Sim::Dot, head_dim: 2, seq_q: 5, seq_kv: 130, ..Axes::default() };
    for (i, (shift, scale)) in
        [(0.0, 1.0), (9000.0, 1.0), (-9000.0, 1.0), (0.0, -1.0)].into_iter().enumerate()
    {
        let mut case = Axes { scale: Some(scale), weights: true, ..base }.build(i as u64);
        let mut rng = Rng::new(i as u64);
        let p = &case.problem;
        let q = fill(p.dtype, p.q, p.shape(Operand::Q), 0, |at| Some([64.0, 1.0][at[3]]));
        let k = fill(p.dtype, p.k, p.shape(Operand::K), 0, |at| {
            Some(if at[3] == 0 { rng.below(33) as f32 - 16.0 } else { shift })
        });
        (case.data.q, case.data.k) = (q.into(), k.into());
        cases.push((case, Subject::all()));
    }
    // The largest score twice, in steps that see only whole keys and at the end: both have to weigh the same, whatever a
    // device leaves unrounded in between.
    for (i, (size, scale)) in
        [(48.0, 1.0), (48.0, 11.0), (62500.0, 1.0), (62500.0, 4.0), (62500.0, 1e12)].into_iter().enumerate()
    {
        let mut case = Axes { scale: Some(scale), ..base }.build(i as u64);
        let p = &case.problem;
        let q = fill(p.dtype, p.q, p.shape(Operand::Q), 0, |_| Some(1889.0));
        let k = fill(p.dtype, p.k, p.shape(Operand::K), 0, |[_, _, j, d]| {
            Some(if d == 0 && j % 128 == 0 { size } else { 0.0 })
        });
        (case.data.q, case.data.k) = (q.into(), k.into());
        cases.push((case, Subject::all()));
    }
    // Products below every f32, all alike: the lowest scores that there are, and kept ones. Of all queries, and of one
    // among others (of several that a thread may own).
    let axes = Axes { head_dim: 3, seq_q: 40, lse: false, ..base };
    for others in [1e30, 1e-30] {
        let mut case = axes.build(9);
        let p = &case.problem;
        let q = fill(p.dtype, p.q, p.shape(Operand::Q), 0, |at| Some(if at[2] == 1 { 1e30 } else { others }));
        let k = fill(p.dtype, p.k, p.shape(Operand::K), 0, |_| Some(-1e30));
        (case.data.q, case.data.k) = (q.into(), k.into());
        cases.push((case, Subject::all().into_iter().filter(|subject| subject.takes(Dtype::F32)).collect()));
    }
    check_all("large scores", &cases);
}

/// One large score and thousands of small ones, which are a share of the row together: weights of any size keep their
/// digits, also where matrix units take them as f16.
#[test]
fn many_small_weights_keep_their_digits() {
    let cases = [(2000, 10.234375), (4000, 12.234375), (16000, 12.5)].map(|(seq_kv, gap)| {
        let axes =
            Axes { dtype: Dtype::F16, out_dtype: Dtype::F32, heads: (1, 1), seq_q: 2, ..Axes::default() };
        let mut case =
            Axes { similarity: Sim::Dot, scale: Some(gap), seq_kv, head_dim: 1, head_dim_v: 3, ..axes }
                .build(0);
        let p = &case.problem;
        let first = |[_, _, j, _]: [usize; 4]| Some(f32::from(j == 0));
        let q = fill(p.dtype, p.q, p.shape(Operand::Q), 0, |_| Some(1.0));
        let k = fill(p.dtype, p.k, p.shape(Operand::K), 0, first);
        let v = fill(p.dtype, p.v, p.shape(Operand::V), 0, |at| first(at).map(|x| 1.0 - x));
        (case.data.q, case.data.k, case.data.v) = (q.into(), k.into(), v.into());
        (case, Subject::all())
    });
    check_all("small weights", &cases);
}

/// Vectors of any length: too long or too short for their squares, no longer than the least norm, or zeros.
#[test]
fn cosines_of_long_and_short_vectors() {
    let mut cases = Vec::new();
    for (i, [q_size, k_size]) in
        [[1.0, 1.0], [1e25, 1e-12], [1e-25, 1e30], [1e-9, 1e-7], [1e-30, 1.0], [1.0, 0.0], [0.0, 1.0]]
            .into_iter()
            .enumerate()
    {
        let axes = Axes {
            similarity: Sim::Cosine,
            scale: Some(1.0),
            heads: (4, 2),
            seq_q: 9,
            seq_kv: 67,
            head_dim: [16, 7][i % 2],
            spread: 4.0,
            ..Axes::default()
        };
        let mut case = axes.build(i as u64);
        for (data, size) in [(&mut case.data.q, q_size), (&mut case.data.k, k_size)] {
            let numbers: Vec<f32> = data.to_f32().into_iter().map(|x| size * x).collect();
            *data = Tensor::from_f32(Dtype::F32, &numbers).into();
        }
        if q_size == 0.0 || k_size == 0.0 {
            assert_eq!(Expected::of(&case).oracle.max_score, 0.0);
        }
        case.name = format!("sizes {q_size:e} and {k_size:e}, {}", case.name);
        let subjects = Subject::all().into_iter().filter(|subject| subject.takes(Dtype::F32)).collect();
        cases.push((case, subjects));
    }
    check_all("long and short vectors", &cases);
}

/// Inputs may share one array: q, k and v are only read.
#[test]
fn one_array_as_query_key_and_value() {
    let (heads, seq, dim) = (3, 40, 24);
    let mut rng = Rng::new(5);
    let problem =
        AttentionProblem { lse: true, ..AttentionProblem::new(2, heads, heads, seq, seq, dim, dim) };
    let x = fill(Dtype::F32, problem.q, problem.shape(Operand::Q), 0, |_| Some(rng.normal()));
    let mut data = Data::new(x.clone(), x.clone(), x);
    (data.k, data.v) = (data.q.clone(), data.q.clone());
    check_all("one array", &[(Case::new("q = k = v", problem, data), Subject::all())]);
}

/// The harness itself: the oracle passes as a path, and a wrong answer does not.
#[test]
fn the_comparison_sees_what_is_wrong() {
    let case = Axes { weights: true, storage: Storage::Odd, ..Axes::default() }.build(3);
    let expected = Expected::of(&case);
    let Ok(Outcome::Done(right, gap)) = Subject::Oracle.run(&case) else { panic!("the oracle serves all") };
    assert!(expected.check(&case, &right, gap).is_ok());
    let o = case.problem.o;
    let budget = expected.o as f32;
    let wrong = |change: &dyn Fn(&mut wgpu_attention::Outputs)| {
        let mut out = right.clone();
        change(&mut out);
        expected.check(&case, &out, gap).expect_err("a wrong answer passed")
    };
    let at = o.index([0, 1, 3, 2]);
    let value = right.o.as_ref().get(at);
    assert!(wrong(&|out| out.o.set(at, value + 3.0 * budget)).contains("o[0, 1, 3, 2]"));
    wrong(&|out| out.o.set(at, f32::NAN));
    wrong(&|out| out.o.set(0, 1.0));
    wrong(&|out| out.lse.as_mut().expect("asked for")[5] += 1e-3);
    wrong(&|out| out.weights.as_mut().expect("asked for")[5] = 0.0);
    wrong(&|out| out.weights = None);
}
