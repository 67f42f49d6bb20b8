//! Gradients: random backward passes over every option, on each kind of device, held to the oracle; and the oracle
//! held to differences of the forward pass.

mod common;

use common::backward::Pass;
use common::case::{Axes, Case, Lens, Sim, Spread, Storage, values};
use common::gpu::{self, Gpu, Kind};
use common::kept::{Kept, Move};
use common::rng::{Rng, env_number, fresh_seed, slice};
use wgpu_attention::{
    Align, Attention, AttentionProblem, BackwardOperands, BackwardProblem, Bias, Cache, Dtype, Error, Family,
    Layout, Operand, Operands, Similarity, Tensor, Window, reference,
};

/// Both kinds of device, without run-time checks and with them.
fn gpus() -> Vec<[&'static Gpu; 2]> {
    let kinds = [Kind::Full, Kind::Minimal].into_iter();
    kinds.filter_map(|kind| Some([gpu::get(kind, false)?, gpu::get(kind, true)?])).collect()
}

/// Axes of a backward pass: what has no gradient is left out.
fn served(axes: Axes) -> Axes {
    let similarity = if axes.similarity == Sim::Dot { Sim::Dot } else { Sim::ScaledDot };
    // An unscaled product of wide vectors has weights that are all or nothing.
    Axes { similarity, lse: true, weights: false, ..axes }
}

/// The families that have kernels for gradients.
const FAMILIES: [Family; 2] = [Family::FusedTile, Family::FusedRow];

/// A pass by each family on each kind of device; and again with the shaders' run-time checks, or with all buffers in
/// one, which must give the same bits. The call that takes slices gives those of one of the families.
fn hold(pass: &Pass, pooled: bool) {
    let expected = pass.expected();
    let bits = |got: [Vec<f64>; 5]| got.map(|x| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
    for [plain, checked] in gpus() {
        let mut all = Vec::new();
        for family in FAMILIES {
            let run = |gpu: &Gpu, pooled| pass.run(gpu, family, pooled);
            let on = format!("{family} on {:?}", plain.kind);
            let got = match run(plain, false) {
                Err(Error::KernelUnfit { .. }) if family == Family::FusedRow && !pass.is_narrow_enough() => {
                    continue;
                }
                got => got.unwrap_or_else(|e| panic!("{on}: {e}\n  {}", pass.case.name)),
            };
            pass.check(&got, &expected).unwrap_or_else(|what| panic!("{on}: {what}"));
            let got = bits(got);
            if plain.kind == Kind::Full {
                let again = if pooled { run(plain, true) } else { run(checked, false) }.unwrap();
                assert_eq!(got, bits(again), "{on}, pooled: {pooled}\n  {}", pass.case.name);
            }
            all.push(got);
        }
        if plain.kind == Kind::Full {
            assert!(all.contains(&bits(pass.run_from_slices(plain))), "from slices\n  {}", pass.case.name);
        }
    }
}

/// Each option by itself, at the edges of tiles, and all at once.
fn table() -> Vec<(Axes, Move)> {
    let base = Axes { seq_q: 65, seq_kv: 70, head_dim: 32, head_dim_v: 32, heads: (4, 2), ..Axes::default() };
    let ragged = Move { kept: Kept::Ragged, ragged_q: true, ..Move::default() };
    let all = Axes {
        batch: 2,
        softcap: Some(30.0),
        bias: Some((Dtype::F32, Spread::Full, true)),
        alibi: true,
        mask: Some(Spread::Full),
        causal: Some(Align::BottomRight),
        lens: Lens::Partial,
        sinks: true,
        ..base
    };
    let window = |left, right| Some(Window { left, right });
    let mut rows: Vec<(Axes, Move)> = [
        base,
        Axes { softcap: Some(0.5), ..base },
        Axes { bias: Some((Dtype::F16, Spread::PerHead, true)), ..base },
        Axes { bias: Some((Dtype::Bf16, Spread::Shared, true)), batch: 3, seq_q: 33, seq_kv: 95, ..base },
        Axes { bias: Some((Dtype::F32, Spread::Keys, false)), batch: 2, ..base },
        Axes { alibi: true, ..base },
        Axes { mask: Some(Spread::PerBatch), batch: 2, ..base },
        Axes { causal: Some(Align::TopLeft), ..base },
        Axes { causal: Some(Align::BottomRight), seq_q: 129, seq_kv: 33, ..base },
        Axes { causal: Some(Align::BottomRight), seq_q: 33, seq_kv: 129, ..base },
        Axes { window: window(Some(7), Some(2)), ..base },
        Axes { window: window(Some(40), Some(0)), seq_q: 200, seq_kv: 190, heads: (2, 1), ..base },
        Axes { lens: Lens::FirstEmpty, batch: 3, ..base },
        Axes { sinks: true, causal: Some(Align::TopLeft), ..base },
        Axes { sinks: true, causal: Some(Align::BottomRight), seq_q: 129, seq_kv: 33, batch: 2, ..base },
        Axes { sinks: true, seq_q: 600, seq_kv: 3, heads: (3, 1), ..base },
        Axes { scale: Some(-0.7), ..base },
        Axes { scale: Some(0.0), ..base },
        Axes { storage: Storage::Odd, head_dim: 33, head_dim_v: 20, ..base },
        Axes { storage: Storage::Packed, seq_kv: 65, ..base },
        Axes { storage: Storage::DimMajor, ..base },
        Axes { storage: Storage::SharedKv, batch: 2, ..base },
        Axes { heads: (6, 1), seq_q: 16, seq_kv: 128, ..base },
        // More than one dispatch of a processor: others in parts, and rows and heads in chunks.
        Axes { seq_q: 5, seq_kv: 4500, head_dim: 64, ..base },
        Axes { seq_q: 1200, seq_kv: 9, head_dim: 64, ..base },
        Axes {
            seq_q: 1100,
            seq_kv: 1100,
            head_dim: 64,
            head_dim_v: 64,
            heads: (1, 1),
            causal: Some(Align::TopLeft),
            ..base
        },
        Axes { seq_q: 700, seq_kv: 700, head_dim: 64, head_dim_v: 64, heads: (2, 2), ..base },
        Axes { seq_q: 2, seq_kv: 40_000, head_dim: 4, head_dim_v: 4, heads: (1, 1), ..base },
        Axes { seq_q: 17_000, seq_kv: 3, head_dim: 4, head_dim_v: 4, heads: (2, 1), ..base },
        Axes { seq_q: 1, seq_kv: 1, head_dim: 1, head_dim_v: 1, ..base },
        Axes { seq_q: 0, ..base },
        Axes { seq_kv: 0, ..base },
        Axes { head_dim: 128, head_dim_v: 64, heads: (2, 1), ..base },
        Axes { head_dim: 256, head_dim_v: 256, heads: (1, 1), seq_q: 33, seq_kv: 33, ..base },
        Axes { head_dim: 20, head_dim_v: 130, heads: (1, 1), ..base },
        Axes { dtype: Dtype::F16, out_dtype: Dtype::F16, ..base },
        Axes { dtype: Dtype::Bf16, out_dtype: Dtype::Bf16, causal: Some(Align::TopLeft), ..base },
        Axes { dtype: Dtype::F16, out_dtype: Dtype::F16, storage: Storage::Odd, head_dim: 15, ..base },
        Axes { dtype: Dtype::F16, ..base },
        all,
        Axes { dtype: Dtype::Bf16, out_dtype: Dtype::Bf16, ..all },
    ]
    .map(|axes| (axes, Move::default()))
    .into();
    rows.extend([
        (Axes { batch: 3, ..base }, ragged),
        (Axes { batch: 3, causal: Some(Align::BottomRight), ..base }, ragged),
        (Axes { batch: 3, lens: Lens::FirstEmpty, ..base }, Move { ragged_q: true, ..Move::default() }),
        (Axes { batch: 2, lens: Lens::Partial, ..base }, Move { kept: Kept::Ragged, ..Move::default() }),
        (Axes { batch: 3, window: window(Some(3), None), alibi: true, ..all }, ragged),
        (
            Axes { batch: 2, dtype: Dtype::F16, out_dtype: Dtype::F16, ..base },
            Move { kv_dtype: Some(Dtype::Bf16), ..ragged },
        ),
    ]);
    rows
}

fn pass(axes: Axes, to: Move, seed: u64) -> Pass {
    let mut rng = Rng::new(seed);
    let case = served(axes).build(seed);
    let case = if to == Move::default() { case } else { case.moved(to, seed) };
    Pass::draw(case, &mut rng)
}

#[test]
fn every_option() {
    for (at, (axes, to)) in slice(table().into_iter().enumerate()) {
        hold(&pass(axes, to, 0xbac0 + at as u64), at % 2 == 0);
    }
}

/// An element of a bias that all entries and heads share adds up what they say, on a processor in several dispatches.
#[test]
fn a_bias_that_many_share() {
    for (batch, heads, softcap) in [(17, (4, 2), None), (1, (70, 70), Some(0.5)), (70, (1, 1), None)] {
        let bias = Some((Dtype::F32, Spread::Shared, true));
        let causal = Some(Align::BottomRight);
        let axes = Axes { batch, heads, softcap, bias, causal, seq_q: 9, seq_kv: 35, ..Axes::default() };
        let mut pass = pass(axes, Move::default(), 5);
        pass.problem.dbias = BackwardProblem::of(&pass.case.problem).dbias;
        assert_eq!(pass.problem.dbias.unwrap().strides[..2], [0, 0]);
        hold(&pass, true);
    }
}

/// Sums whose terms have one sign, as those of the sum of all of o have: rounding errors do not even out.
#[test]
fn long_sums_of_one_sign() {
    // Budgets grow with scores: these are small.
    let base = Axes { seq_kv: 5, head_dim: 8, head_dim_v: 8, heads: (1, 1), spread: 0.2, ..Axes::default() };
    let bias = Some((Dtype::F32, Spread::Shared, false));
    for axes in [
        Axes { seq_q: 16_384, ..base },
        Axes { seq_q: 2048, heads: (8, 1), causal: Some(Align::TopLeft), ..base },
        Axes { seq_q: 3, seq_kv: 16_384, ..base },
        Axes { batch: 16_384, seq_q: 1, seq_kv: 2, bias, ..base },
    ] {
        let mut pass = pass(axes, Move::default(), 3);
        pass.problem.dbias = BackwardProblem::of(&pass.case.problem).dbias;
        let p = &pass.case.problem;
        // One key's values are all larger than the others'.
        let v = common::case::fill(p.dtype, p.v, p.shape(Operand::V), 0, |[_, _, j, d]| {
            Some(if j == 0 { 1.0 } else { 0.01 * ((j + d) % 7) as f32 })
        });
        pass.case.data.v = v.into();
        let ones = vec![1.0; pass.dout.to_f32().len()];
        pass.dout = Tensor::from_f32(p.out_dtype, &ones);
        hold(&pass, false);
    }
}

/// Scores of more than five soft caps, whose slopes are what a number near 1 leaves of 1.
#[test]
fn slopes_of_saturated_soft_caps() {
    let axes = Axes {
        similarity: Sim::Dot,
        scale: Some(1.0),
        softcap: Some(5.0),
        head_dim: 4,
        seq_q: 33,
        seq_kv: 3,
        ..Axes::default()
    };
    let mut pass = pass(axes, Move::default(), 11);
    let p = &pass.case.problem;
    let fill = |layout, shape, of: &dyn Fn([usize; 4]) -> f32| {
        common::case::fill(p.dtype, layout, shape, 0, |at| Some(if at[3] == 0 { of(at) } else { 0.0 }))
    };
    let q = fill(p.q, p.shape(Operand::Q), &|_| 1.0);
    let k = fill(p.k, p.shape(Operand::K), &|[_, _, j, _]| 27.0 + j as f32 / 8.0);
    (pass.case.data.q, pass.case.data.k) = (q.into(), k.into());
    hold(&pass, false);
}

/// Buffers have rows, and no entry has any of them.
#[test]
fn entries_without_rows() {
    let Some(gpu) = gpu::get(Kind::Full, false) else { return };
    let attention = gpu.fresh();
    let buffers = Buffers::new(&attention);
    let lists = gpu::upload(attention.device(), "cu_seqlens", &[0; 64], gpu::USAGE);
    let ragged_k = |p: AttentionProblem| {
        let total = p.seq_kv.max(5);
        p.with_cache(Cache::Ragged { total }, Dtype::F32)
    };
    for (problem, dispatches) in [
        (AttentionProblem { batch: 0, ..plain() }.with_ragged_queries(5), 1),
        // Keys have gradients of zero, and so have queries below.
        (AttentionProblem { seq_q: 0, ..plain() }.with_ragged_queries(5), 3),
        (ragged_k(AttentionProblem { seq_kv: 0, ..plain() }), 2),
    ] {
        let backward = BackwardProblem::of(&problem);
        let mut operands = buffers.operands();
        operands.forward.cu_seqlens_q = problem.total_q.map(|_| lists.slice(..));
        let is_ragged = matches!(problem.cache, Cache::Ragged { .. });
        operands.forward.cu_seqlens_k = is_ragged.then(|| lists.slice(..));
        let prepared = attention.prepare_backward(&backward, &operands).unwrap();
        assert_eq!(prepared.dispatches(), dispatches, "{problem:?}");
    }
}

/// A sink of -inf is none, also where a query keeps no key and its lse is -inf, too.
#[test]
fn a_sink_of_minus_infinity() {
    let causal = Some(Align::BottomRight);
    let mut pass =
        pass(Axes { seq_q: 40, seq_kv: 33, causal, sinks: true, ..Axes::default() }, Move::default(), 9);
    let sinks = pass.case.data.sinks.as_mut().unwrap();
    sinks[0] = f32::NEG_INFINITY;
    assert!(sinks.len() > 1);
    let dsinks = pass.expected().oracle.dsinks;
    assert!(dsinks[0] == 0.0 && dsinks[1] != 0.0 && dsinks.iter().all(|x| x.is_finite()), "{dsinks:?}");
    hold(&pass, false);
}

#[test]
fn random_passes() {
    let seed = fresh_seed();
    let mut rng = Rng::new(seed);
    let draws = env_number("WGPU_ATTENTION_CASES").unwrap_or(10).min(5);
    for draw in 0..draws {
        let axes = values::draw(&mut rng);
        let axes = served(Axes { spread: axes.spread.min(3.0), ..axes }).shrunk_to(2_000_000);
        let kept = rng.pick(&[Kept::Plain, Kept::Plain, Kept::Ragged]);
        let to = Move { kept, ragged_q: rng.chance(0.3), heads_first: rng.chance(0.5), ..Move::default() };
        let to = if axes.storage == Storage::SharedKv { Move::default() } else { to };
        let case_seed = rng.next();
        let pass = pass(axes, to, case_seed);
        let run = std::panic::AssertUnwindSafe(|| hold(&pass, draw % 2 == 0));
        if let Err(panic) = std::panic::catch_unwind(run) {
            eprintln!("broken with WGPU_ATTENTION_SEED={seed:#x}");
            std::panic::resume_unwind(panic);
        }
    }
}

/// What lies at a pair that nothing keeps reaches no gradient, and what lies at one that is kept reaches no other.
#[test]
fn nan_stays_with_the_pairs_that_keep_it() {
    // Query i sees the keys up to i - 10: the first ten see none.
    let causal = Some(Align::BottomRight);
    let axes = Axes { seq_q: 70, seq_kv: 60, causal, head_dim: 32, ..Axes::default() };
    let mut pass = pass(axes, Move::default(), 5);
    let p = pass.case.problem.clone();
    // Key 40 of the first head, and dout of queries 3 and 50 of the second.
    for (tensor, layout) in [(&mut pass.case.data.k, p.k), (&mut pass.case.data.v, p.v)] {
        std::sync::Arc::make_mut(tensor).set(layout.index([0, 0, 40, 3]), f32::NAN);
    }
    for i in [3, 50] {
        pass.dout.set(pass.problem.dout.index([0, 1, i, 1]), f32::NAN);
    }
    let expected = pass.expected();
    let dq = &expected.oracle.dq;
    let row = |h: usize, i: usize| &dq[(h * p.seq_q + i) * p.head_dim..][..p.head_dim];
    assert!(row(0, 49).iter().all(|x| x.is_finite()) && row(0, 50).iter().all(|x| x.is_nan()));
    assert!(row(1, 49).iter().all(|x| x.is_finite()) && row(1, 50).iter().all(|x| x.is_nan()));
    assert!(row(1, 3).iter().all(|&x| x == 0.0));
    let dv = &expected.oracle.dv[p.seq_kv * p.head_dim_v..];
    let row = |j: usize| &dv[j * p.head_dim_v..][..p.head_dim_v];
    assert!(row(40)[1].is_nan() && row(40)[0].is_finite() && row(41).iter().all(|x| x.is_finite()));
    for (gpu, family) in gpus().into_iter().flatten().flat_map(|gpu| FAMILIES.map(|family| (gpu, family))) {
        pass.check(&pass.run(gpu, family, false).unwrap(), &expected).unwrap();
    }
}

/// The oracle's gradients are the slopes of its own forward pass.
#[test]
fn oracle_is_the_slope_of_the_forward_pass() {
    let base = Axes { seq_q: 5, seq_kv: 6, head_dim: 4, head_dim_v: 3, heads: (4, 2), ..Axes::default() };
    let axes = [
        base,
        Axes { softcap: Some(1.5), scale: Some(0.7), ..base },
        Axes { causal: Some(Align::BottomRight), sinks: true, ..base },
        Axes { alibi: true, bias: Some((Dtype::F32, Spread::Full, true)), mask: Some(Spread::Full), ..base },
        Axes {
            batch: 2,
            lens: Lens::FirstEmpty,
            window: Some(Window { left: Some(2), right: Some(1) }),
            ..base
        },
    ];
    for (at, axes) in axes.into_iter().enumerate() {
        let mut pass = pass(Axes { storage: Storage::Bhsd, ..axes }, Move::default(), 77 + at as u64);
        // Where bias has one element for several, its gradient has, too.
        pass.problem.dbias = BackwardProblem::of(&pass.case.problem).dbias;
        let (p, expected) = (&pass.case.problem, pass.expected());
        let dout: Vec<f64> = common::case::indices(p.shape(Operand::O))
            .map(|at| f64::from(pass.dout.as_ref().get(pass.problem.dout.index(at))))
            .collect();
        let loss = |case: &Case| -> f64 {
            let o = reference::oracle(p, &case.data.inputs()).unwrap().o;
            o.iter().zip(&dout).map(|(o, dout)| o * dout).sum()
        };
        for operand in Operand::GRADIENTS {
            let gradient = expected.oracle.get(operand);
            let places: Vec<_> = common::case::indices(pass.problem.shape(operand)).collect();
            let n = gradient.len();
            for element in (0..n).step_by(n.div_ceil(40).max(1)) {
                let moved = |by: f32| {
                    let mut case = pass.case.clone();
                    let data = &mut case.data;
                    let (tensor, place) = match operand {
                        Operand::Dq => (std::sync::Arc::make_mut(&mut data.q), element),
                        Operand::Dk => (std::sync::Arc::make_mut(&mut data.k), element),
                        Operand::Dv => (std::sync::Arc::make_mut(&mut data.v), element),
                        Operand::Dbias => {
                            (data.bias.as_mut().unwrap(), p.bias.unwrap().layout.index(places[element]))
                        }
                        _ => {
                            let sink = &mut data.sinks.as_mut().unwrap()[element];
                            *sink += by;
                            let moved = f64::from(*sink);
                            return (loss(&case), moved);
                        }
                    };
                    let x = tensor.as_ref().get(place);
                    tensor.set(place, x + by);
                    let moved = f64::from(tensor.as_ref().get(place));
                    (loss(&case), moved)
                };
                let ((above, x1), (below, x0)) = (moved(1e-3), moved(-1e-3));
                // A row that does not exist holds poison, and has no gradient.
                let slope = if !x1.is_finite() { 0.0 } else { (above - below) / (x1 - x0) };
                let error = (slope - gradient[element]).abs();
                assert!(
                    error <= 1e-5 * slope.abs().max(1.0),
                    "{operand}[{element}]: {slope} {}\n{}",
                    gradient[element],
                    pass.case.name
                );
            }
        }
    }
}

/// Gradients of a packed projection lie in one buffer, as q, k and v do.
#[test]
fn packed_gradients() {
    for dtype in Dtype::FLOATS {
        // Widths that quads cut, and widths whose halves of words belong to different gradients.
        for head_dim in [16, 7] {
            let axes =
                Axes { dtype, out_dtype: dtype, seq_q: 33, storage: Storage::Packed, ..Axes::default() };
            let mut pass = pass(Axes { head_dim, head_dim_v: head_dim, ..axes }, Move::default(), 3);
            pass.problem =
                BackwardProblem { dout: pass.problem.dout, ..BackwardProblem::of(&pass.case.problem) };
            let (p, expected) = (pass.problem.clone(), pass.expected());
            assert_eq!((p.dq.strides[2], p.dk.offset), (3 * 2 * head_dim, 2 * head_dim));
            if let Some(gpu) = gpu::get(Kind::Full, false) {
                let (device, queue) = (gpu.attention.device(), gpu.attention.queue());
                let upload = |x: &Tensor| gpu::upload(device, "operand", x.as_ref().bytes(), gpu::USAGE);
                let (qkv, dout) = (upload(&pass.case.data.q), upload(&pass.dout));
                let o = upload(&Tensor::zeros(dtype, p.extent(Operand::O) as usize));
                let lse = upload(&Tensor::zeros(Dtype::F32, p.extent(Operand::Lse).max(1) as usize));
                let dqkv = upload(&Tensor::zeros(dtype, p.extent(Operand::Dv) as usize));
                let all = qkv.slice(..);
                let forward =
                    Operands { lse: Some(lse.slice(..)), ..Operands::new(all, all, all, o.slice(..)) };
                let to = Some(dqkv.slice(..));
                let operands = BackwardOperands {
                    dq: to,
                    dk: to,
                    dv: to,
                    ..BackwardOperands::new(forward, dout.slice(..))
                };
                let plan = gpu.attention.plan(&p.attention).unwrap();
                let work = gpu.attention.prepare(&plan, &forward).unwrap();
                let work = work.then(gpu.attention.prepare_backward(&p, &operands).unwrap());
                let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
                work.encode(&mut encoder);
                queue.submit([encoder.finish()]);
                let got = Tensor::from_bytes(dtype, &gpu::download(device, queue, &dqkv));
                let logical = |operand| {
                    let Some(layout) = p.layout(operand) else { return Vec::new() };
                    let all = common::case::indices(p.shape(operand));
                    all.map(|at| f64::from(got.as_ref().get(layout.index(at)))).collect()
                };
                pass.check(&Operand::GRADIENTS.map(logical), &expected).unwrap();
                // One element further, and two gradients have places in common.
                let moved = BackwardProblem { dk: p.dk.at(p.dk.offset - 1), ..p.clone() };
                let error = gpu.attention.prepare_backward(&moved, &operands).unwrap_err();
                assert_eq!(error, Error::Aliased { operand: Operand::Dq, with: Operand::Dk });
            }
        }
    }
}

fn plain() -> AttentionProblem {
    AttentionProblem::new(2, 4, 2, 3, 5, 8, 8)
}

#[test]
fn what_has_no_gradient_is_said() {
    let cached = |cache, dtype| plain().with_cache(cache, dtype);
    for (problem, of) in [
        (plain().with_similarity(Similarity::Cosine), "a cosine similarity"),
        (
            plain().with_similarity(Similarity::Bilinear { query_dim: 8, per_head: false }),
            "a bilinear similarity",
        ),
        (
            plain().with_similarity(Similarity::Additive { query_dim: 8, hidden: 4, per_head: false }),
            "an additive similarity",
        ),
        (cached(Cache::Ring { capacity: 5 }, Dtype::F32), "keys in a ring"),
        (cached(Cache::Paged { pages: 9, page_size: 4, max_blocks: 2 }, Dtype::F32), "keys in pages"),
        (cached(Cache::Contiguous, Dtype::Int8), "keys of int8"),
    ] {
        assert_eq!(problem.validate(), Ok(()), "{of}");
        let error = BackwardProblem::of(&problem).validate();
        assert_eq!(error, Err(Error::NoGradient { of: of.into() }));
    }
    assert_eq!(
        BackwardProblem::of(&AttentionProblem { heads_q: 5, ..plain() }).validate(),
        Err(Error::HeadGroups { heads_q: 5, heads_kv: 2 })
    );
    // Keys that all entries share have gradients that they do not share.
    let shared = AttentionProblem { k: Layout { strides: [0, 40, 8, 1], ..plain().k }, ..plain() };
    let backward = BackwardProblem::of(&shared);
    assert_eq!((backward.dk, backward.validate()), (Layout::bhsd(2, 5, 8), Ok(())));
    let overlaps = BackwardProblem { dk: shared.k, ..backward.clone() }.validate();
    assert!(matches!(overlaps, Err(Error::Overlaps { operand: Operand::Dk, .. })), "{overlaps:?}");
    // A bias that repeats over keys, or queries, has none by itself; one that repeats over entries or heads has.
    let biased = |strides| {
        let bias = Some(Bias { dtype: Dtype::F32, layout: Layout { offset: 0, strides } });
        BackwardProblem::of(&AttentionProblem { bias, ..plain() })
    };
    assert_eq!(biased([0, 15, 5, 1]).extent(Operand::Dbias), 60);
    for (strides, over) in [([20, 5, 0, 1], "queries"), ([12, 3, 1, 0], "keys")] {
        let backward = biased(strides);
        assert_eq!((backward.dbias, backward.validate()), (None, Ok(())));
        let asked = BackwardProblem { dbias: Some(Layout { offset: 0, strides }), ..backward.clone() };
        let of = format!("a bias that repeats over {over}");
        assert_eq!(asked.validate(), Err(Error::NoGradient { of }));
        let all = BackwardProblem { dbias: Some(Layout::bhsd(4, 3, 5)), ..backward };
        assert_eq!((all.extent(Operand::Dbias), all.validate()), (2 * 60, Ok(())));
    }
    let tangled = BackwardProblem {
        dbias: Some(Layout { offset: 0, strides: [0, 14, 5, 1] }),
        ..biased([0, 15, 5, 1])
    };
    let error = tangled.validate();
    assert!(matches!(error, Err(Error::Overlaps { operand: Operand::Dbias, .. })), "{error:?}");
    let far = BackwardProblem { dout: Layout::bhsd(4, 3, 8).at(usize::MAX), ..backward }.validate();
    assert!(matches!(far, Err(Error::TooLarge { .. })), "{far:?}");
}

/// Buffers of 2 KiB, more than any operand of [`plain`] has.
struct Buffers(Vec<wgpu::Buffer>);

impl Buffers {
    fn new(attention: &Attention) -> Self {
        let one = |_| gpu::upload(attention.device(), "operand", &[0; 2048], gpu::USAGE);
        Self((0..9).map(one).collect())
    }

    fn operands(&self) -> BackwardOperands<'_> {
        let of = |at: usize| self.0[at].slice(..);
        let forward = Operands { lse: Some(of(4)), ..Operands::new(of(0), of(1), of(2), of(3)) };
        let gradients = BackwardOperands::new(forward, of(5));
        BackwardOperands { dq: Some(of(6)), dk: Some(of(7)), dv: Some(of(8)), ..gradients }
    }
}

#[test]
fn what_is_wrong_with_buffers_is_said_and_nothing_recorded() {
    let Some(gpu) = gpu::get(Kind::Full, false) else { return };
    let (attention, problem) = (gpu.fresh(), BackwardProblem::of(&plain()));
    let buffers = Buffers::new(&attention);
    let (of, good) = (|at: usize| &buffers.0[at], buffers.operands());
    let unusable = attention.device().create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: 2048,
        usage: wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    let align = u64::from(attention.caps().storage_alignment);
    let said = |operands: BackwardOperands<'_>| {
        let mut encoder =
            attention.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let error = attention.encode_backward(&mut encoder, &problem, &operands).unwrap_err();
        assert_eq!((attention.pipelines(), attention.scratch_bytes()), (0, 0), "{error}");
        error
    };
    let forward = |forward| said(BackwardOperands { forward, ..good });
    let (lse, bias) = (Operand::Lse, Operand::Bias);
    assert_eq!(forward(Operands { lse: None, ..good.forward }), Error::MissingOperand { operand: lse });
    assert_eq!(
        forward(Operands { bias: Some(of(0).slice(..)), ..good.forward }),
        Error::UnexpectedOperand { operand: bias }
    );
    let (unit, container) = ("bytes", "buffer");
    assert_eq!(
        said(BackwardOperands { dk: Some(of(7).slice(..636)), ..good }),
        Error::OutOfBounds { operand: Operand::Dk, need: 640, got: 636, unit, container }
    );
    assert_eq!(
        said(BackwardOperands { dout: of(5).slice(4..), ..good }),
        Error::Misaligned { operand: Operand::Dout, need: align.max(4), got: 4 }
    );
    for (operands, operand) in [
        (BackwardOperands { dbias: good.dq, ..good }, Operand::Dbias),
        (BackwardOperands { dsinks: good.dq, ..good }, Operand::Dsinks),
    ] {
        assert_eq!(said(operands), Error::UnexpectedOperand { operand });
    }
    let error = said(BackwardOperands { dv: Some(unusable.slice(..)), ..good });
    assert!(matches!(error, Error::BufferUsage { operand: Operand::Dv, .. }), "{error}");
    for (operands, operand, with) in [
        (BackwardOperands { dq: Some(of(0).slice(..)), ..good }, Operand::Dq, Operand::Q),
        (BackwardOperands { dq: Some(of(5).slice(..)), ..good }, Operand::Dq, Operand::Dout),
        (BackwardOperands { dk: Some(of(8).slice(..)), ..good }, Operand::Dk, Operand::Dv),
        (BackwardOperands { dv: Some(of(4).slice(..)), ..good }, Operand::Dv, Operand::Lse),
    ] {
        assert_eq!(said(operands), Error::Aliased { operand, with });
    }
    let unfit = |problem: &BackwardProblem, family| {
        let error = attention.prepare_backward_with(problem, &good, family).unwrap_err();
        assert!(matches!(error, Error::KernelUnfit { .. }), "{error}");
    };
    unfit(&problem, Family::StagedTile);
    unfit(&BackwardProblem::of(&AttentionProblem::new(1, 1, 1, 1, 1, 160, 8)), Family::FusedRow);

    // What only the forward call writes is passed by.
    let noted =
        BackwardProblem::of(&AttentionProblem { weights: true, status: true, kv_lens: true, ..plain() });
    let noting = Operands { kv_lens: good.dq, weights: good.dk, status: good.dv, ..good.forward };
    let noting = BackwardOperands { dk: None, dv: None, dq: good.forward.bias, forward: noting, ..good };
    assert_eq!(attention.prepare_backward(&noted, &noting).unwrap().dispatches(), 0);
    let error = attention.prepare_backward(&problem, &noting).unwrap_err();
    assert!(matches!(error, Error::UnexpectedOperand { .. }), "{error}");

    // And the object works: scratch is what the problem says.
    assert_eq!(attention.prepare_backward(&problem, &good).unwrap().dispatches(), 4);
    assert_eq!(problem.scratch_bytes(attention.caps()), Ok(attention.scratch_bytes()));
}

/// A gradient that nobody asks for costs nothing, and the others are the same.
#[test]
fn gradients_are_asked_for_one_by_one() {
    let Some(gpu) = gpu::get(Kind::Full, false) else { return };
    let (attention, problem) = (gpu.fresh(), BackwardProblem::of(&plain()));
    let buffers = Buffers::new(&attention);
    let all = buffers.operands();
    for (operands, pipelines) in [
        (BackwardOperands { dq: None, dk: None, dv: None, ..all }, 0),
        (BackwardOperands { dk: None, dv: None, ..all }, 2),
        (BackwardOperands { dq: None, dk: None, ..all }, 3),
        (all, 4),
    ] {
        let prepared = attention.prepare_backward(&problem, &operands).unwrap();
        let asked = [operands.dq, operands.dk, operands.dv].iter().flatten().count();
        assert_eq!(prepared.dispatches(), if asked > 0 { 1 + asked } else { 0 });
        assert_eq!(attention.pipelines(), pipelines);
    }
}
