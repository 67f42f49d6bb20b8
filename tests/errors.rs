//! What bad input gets: the typed error with its fields, nothing recorded, and an object that
//! works afterwards.
//!
//! Provoked here: every variant but `NoDevice` and `OutOfMemory`, which need an adapter that fails, and `NoGradient`
//! (`tests/backward.rs`).

mod common;

use common::case::{Axes, Case, Data, Lens, Sim, Spread};
use common::check::{Expected, Gap, poison};
use common::gpu::{self, Door, Gpu, Guarded, Kind, download, upload};
use common::subject::Subject;
use wgpu_attention::{
    Append, AppendOperands, Attention, AttentionProblem, BackwardOperands, BackwardProblem, Bias, Cache,
    Caps, DeviceRequest, Dtype, Error, Family, Inputs, Layout, LinearOperands, LinearProblem, MergeOperands,
    MergeProblem, Operand, Operands, Partials, Path, Plan, PlanOptions, Similarity, TensorRef,
};

fn problem() -> AttentionProblem {
    AttentionProblem::new(2, 4, 2, 3, 5, 8, 8)
}

/// The error of a problem alone, which every way in gives.
#[track_caller]
fn invalid(problem: AttentionProblem) -> Error {
    let error = problem.validate().expect_err("an invalid problem passed");
    assert_eq!(Plan::new(&problem, &Caps::minimal(), &PlanOptions::default()), Err(error.clone()));
    let empty = Inputs::new(&[0.0_f32][..], &[0.0_f32][..], &[0.0_f32][..]);
    assert_eq!(empty.check(&problem), Err(error.clone()));
    #[cfg(feature = "cpu")]
    assert_eq!(wgpu_attention::cpu::attention(&problem, &empty), Err(error.clone()));
    assert_eq!(wgpu_attention::reference::oracle(&problem, &empty), Err(error.clone()));
    if let Some(gpu) = gpu::get(Kind::Full, false) {
        assert_eq!(gpu.attention.run_blocking(&problem, &empty), Err(error.clone()));
    }
    error
}

#[test]
fn sizes() {
    for (what, p) in [
        ("heads_q", AttentionProblem { heads_q: 0, ..problem() }),
        ("heads_kv", AttentionProblem { heads_kv: 0, ..problem() }),
        ("head_dim", AttentionProblem { head_dim: 0, ..problem() }),
        ("head_dim_v", AttentionProblem { head_dim_v: 0, ..problem() }),
        (
            "query_dim",
            AttentionProblem {
                similarity: Similarity::Bilinear { query_dim: 0, per_head: false },
                ..problem()
            },
        ),
        (
            "hidden",
            AttentionProblem {
                similarity: Similarity::Additive { query_dim: 8, hidden: 0, per_head: false },
                ..problem()
            },
        ),
    ] {
        let error = invalid(p);
        assert_eq!(error, Error::ZeroSize { what });
        assert_eq!(error.to_string(), format!("{what} must be at least 1"));
    }
    assert_eq!(
        invalid(AttentionProblem { heads_q: 5, ..problem() }),
        Error::HeadGroups { heads_q: 5, heads_kv: 2 }
    );
}

#[test]
fn too_large() {
    let max = 1 << 28;
    for (what, p) in [
        ("batch", AttentionProblem { batch: max + 1, ..problem() }),
        ("seq_q", AttentionProblem { seq_q: usize::MAX, ..problem() }),
        ("seq_kv", AttentionProblem { seq_kv: max + 1, ..problem() }),
        ("head_dim", AttentionProblem { head_dim: max + 1, ..problem() }),
        ("head_dim_v", AttentionProblem { head_dim_v: usize::MAX, ..problem() }),
    ] {
        let Error::TooLarge { what: got, max: most, .. } = invalid(p) else { panic!("{what}") };
        assert_eq!((got.as_str(), most), (what, max as u64));
    }
    // Each size is fine, their product is not.
    let rows = AttentionProblem { batch: 1 << 12, heads_q: 1 << 12, seq_q: 1 << 12, ..problem() };
    let Error::TooLarge { what, got, max } = invalid(rows) else { panic!("rows") };
    assert_eq!((what.as_str(), got, max), ("batch * heads_q * seq_q", 1 << 36, u64::from(u32::MAX)));
    // Strides and offsets of any size neither overflow nor pass.
    for strides in [[1 << 40, 1, 1, 1], [usize::MAX; 4]] {
        let k = Layout { offset: usize::MAX, strides };
        let Error::TooLarge { what, got, .. } = invalid(AttentionProblem { k, ..problem() }) else {
            panic!("k")
        };
        assert!(what.starts_with("k") && got > u128::from(u32::MAX), "{what} {got}");
    }
}

#[test]
fn numbers() {
    for got in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let Error::BadNumber { what, got: value, need } =
            invalid_number(AttentionProblem { scale: Some(got), ..problem() })
        else {
            panic!("scale {got}")
        };
        assert_eq!((what, need, value.to_bits()), ("scale", "finite", got.to_bits()));
    }
    for got in [0.0, -1.0, f32::NAN, f32::INFINITY, 1e-40] {
        let Error::BadNumber { what, got: value, need } =
            invalid_number(AttentionProblem { softcap: Some(got), ..problem() })
        else {
            panic!("softcap {got}")
        };
        assert_eq!((what, need, value.to_bits()), ("softcap", "finite and above 0", got.to_bits()));
    }
}

/// [`invalid`] for errors that hold a NaN, which is not equal to itself.
fn invalid_number(problem: AttentionProblem) -> Error {
    let error = problem.validate().expect_err("an invalid problem passed");
    let planned = Plan::new(&problem, &Caps::minimal(), &PlanOptions::default());
    assert_eq!(planned.map_err(|e| e.to_string()).err(), Some(error.to_string()));
    error
}

#[test]
fn overlapping_output() {
    for strides in [[160, 40, 8, 0], [160, 40, 7, 1], [0, 24, 8, 1], [96, 24, 8, 3]] {
        let p = AttentionProblem { o: Layout { offset: 0, strides }, ..problem() };
        let shape = [2, 4, 3, 8];
        assert_eq!(invalid(p), Error::Overlaps { operand: Operand::O, shape, strides });
    }
    // Sizes that have changed where layouts have not. Heads or rows that are all one, and entries that are windows
    // on one sequence, are no such thing.
    let stale =
        AttentionProblem { similarity: Similarity::Bilinear { query_dim: 9, per_head: false }, ..problem() };
    assert!(matches!(invalid(stale), Error::Overlaps { operand: Operand::Q, .. }));
    let stale = problem().with_cache(Cache::Contiguous, Dtype::Int8).with_dtype(Dtype::F16);
    assert!(matches!(invalid(stale), Error::Overlaps { operand: Operand::K, .. }));
    let longer = AttentionProblem { seq_kv: 2 * problem().seq_kv, ..problem() };
    assert!(matches!(invalid(longer), Error::Overlaps { operand: Operand::K, .. }));
    for strides in [[0, 0, 0, 1], [0, 0, 8, 0], [8, 0, 8, 1], [3, 50, 8, 1]] {
        let k = Layout { strides, ..problem().k };
        assert_eq!(AttentionProblem { k, ..problem() }.validate(), Ok(()));
    }
}

/// Every path checks slices alike.
#[track_caller]
fn refused(problem: &AttentionProblem, inputs: &Inputs<'_>) -> Error {
    let error = inputs.check(problem).expect_err("bad slices passed");
    #[cfg(feature = "cpu")]
    assert_eq!(wgpu_attention::cpu::attention(problem, inputs), Err(error.clone()));
    for kind in [Kind::Full, Kind::Minimal] {
        if let Some(gpu) = gpu::get(kind, false) {
            assert_eq!(gpu.attention.run_blocking(problem, inputs), Err(error.clone()));
            let plan = gpu.attention.plan(problem).expect("the problem itself is fine");
            assert_eq!(gpu.attention.run_plan_blocking(&plan, inputs), Err(error.clone()));
        }
    }
    error
}

/// A case with every operand that there is.
fn everything() -> Case {
    Axes {
        batch: 2,
        heads: (4, 2),
        seq_q: 3,
        seq_kv: 5,
        head_dim: 8,
        head_dim_v: 8,
        similarity: Sim::Bilinear { extra: 0, per_head: true },
        bias: Some((Dtype::F16, Spread::Full, false)),
        mask: Some(Spread::Full),
        alibi: true,
        sinks: true,
        lens: Lens::Full,
        lse: true,
        weights: true,
        ..Axes::default()
    }
    .build(1)
}

/// The problem without one optional operand.
fn without(mut p: AttentionProblem, operand: Operand) -> AttentionProblem {
    match operand {
        Operand::W => p.similarity = Similarity::Dot,
        Operand::Bias => p.bias = None,
        Operand::Mask => p.mask = None,
        Operand::AlibiSlopes => p.alibi = false,
        Operand::Sinks => p.sinks = false,
        Operand::KvLens => p.kv_lens = false,
        Operand::Lse => p.lse = false,
        Operand::Weights => p.weights = false,
        _ => panic!("{operand} is not optional"),
    }
    p
}

#[test]
fn slices() {
    use Operand::*;
    let case = everything();
    let (p, inputs) = (&case.problem, case.data.inputs());
    let remove = |operand: Operand| -> Inputs<'_> {
        let mut inputs = inputs;
        match operand {
            W => inputs.w = None,
            Bias => inputs.bias = None,
            Mask => inputs.mask = None,
            AlibiSlopes => inputs.alibi_slopes = None,
            Sinks => inputs.sinks = None,
            KvLens => inputs.kv_lens = None,
            _ => panic!("{operand} is always there"),
        }
        inputs
    };
    for operand in [W, Bias, Mask, AlibiSlopes, Sinks, KvLens] {
        assert_eq!(refused(p, &remove(operand)), Error::MissingOperand { operand });
        assert_eq!(refused(&without(p.clone(), operand), &inputs), Error::UnexpectedOperand { operand });
    }

    // The operands of the additive similarity, in the place of W.
    let additive =
        Axes { similarity: Sim::Additive { extra: 1, hidden: 6, per_head: true }, ..Axes::default() };
    let additive = additive.build(2);
    let (own, all) = (&additive.problem, additive.data.inputs());
    for (operand, missing, short) in [
        (Wq, Inputs { wq: None, ..all }, Inputs { wq: all.wq.map(|x| &x[1..]), ..all }),
        (Wk, Inputs { wk: None, ..all }, Inputs { wk: all.wk.map(|x| &x[1..]), ..all }),
        (ScoreV, Inputs { score_v: None, ..all }, Inputs { score_v: all.score_v.map(|x| &x[1..]), ..all }),
    ] {
        assert_eq!(refused(own, &missing), Error::MissingOperand { operand });
        let need = own.extent(operand) as u64;
        let (got, unit, container) = (need - 1, "elements", "slice");
        assert_eq!(refused(own, &short), Error::OutOfBounds { operand, need, got, unit, container });
    }
    let with_w = Inputs { w: inputs.w, ..all };
    assert_eq!(refused(own, &with_w), Error::UnexpectedOperand { operand: W });
    let dot = AttentionProblem { similarity: Similarity::Dot, ..own.clone() };
    assert_eq!(refused(&dot, &all), Error::UnexpectedOperand { operand: Wq });

    let half = vec![half::f16::ONE; 256];
    let other = TensorRef::F16(&half);
    for (operand, inputs) in [
        (Q, Inputs { q: other, ..inputs }),
        (K, Inputs { k: other, ..inputs }),
        (V, Inputs { v: other, ..inputs }),
    ] {
        let (need, got) = (Dtype::F32, Dtype::F16);
        assert_eq!(refused(p, &inputs), Error::DtypeMismatch { operand, need, got });
    }
    let bias = vec![0.0_f32; 256];
    let wrong = Inputs { bias: Some(TensorRef::F32(&bias)), ..inputs };
    let (need, got) = (Dtype::F16, Dtype::F32);
    assert_eq!(refused(p, &wrong), Error::DtypeMismatch { operand: Bias, need, got });

    // One element short, each.
    let floats = vec![0.5_f32; 4096];
    let bytes = vec![1_u8; 4096];
    let lens = vec![5_u32; 4096];
    let halves = vec![half::f16::ONE; 4096];
    for operand in [Q, K, V, W, Bias, Mask, AlibiSlopes, Sinks, KvLens] {
        let need = p.extent(operand) as u64;
        let short = need as usize - 1;
        let mut inputs = inputs;
        match operand {
            Q => inputs.q = TensorRef::F32(&floats[..short]),
            K => inputs.k = TensorRef::F32(&floats[..short]),
            V => inputs.v = TensorRef::F32(&floats[..short]),
            W => inputs.w = Some(&floats[..short]),
            Bias => inputs.bias = Some(TensorRef::F16(&halves[..short])),
            Mask => inputs.mask = Some(&bytes[..short]),
            AlibiSlopes => inputs.alibi_slopes = Some(&floats[..short]),
            Sinks => inputs.sinks = Some(&floats[..short]),
            _ => inputs.kv_lens = Some(&lens[..short]),
        }
        let (got, unit, container) = (need - 1, "elements", "slice");
        assert_eq!(refused(p, &inputs), Error::OutOfBounds { operand, need, got, unit, container });
    }

    let wrong = Inputs { kv_lens: Some(&[5, 6]), ..inputs };
    assert_eq!(refused(p, &wrong), Error::KvLen { batch: 1, got: 6, seq_kv: 5 });
    works_still();
}

/// Each device still computes what is right.
#[track_caller]
fn works_still() {
    let case = Axes { weights: true, ..Axes::default() }.build(8);
    let expected = Expected::of(&case);
    for (kind, checks) in [(Kind::Full, false), (Kind::Minimal, false)] {
        if let Some(gpu) = gpu::get(kind, checks) {
            let out =
                gpu.attention.run_blocking(&case.problem, &case.data.inputs()).expect("it worked before");
            assert!(expected.check(&case, &out, Gap::Zero).is_ok());
        }
    }
}

/// Calls `encode` and `encode_in_pass` with bad buffers. Nothing may have been recorded: what was
/// submitted then leaves every output as it was.
#[track_caller]
fn encode_refuses(gpu: &Gpu, guarded: &Guarded, operands: &Operands<'_>, plan: &Plan) -> Error {
    let (device, queue) = (gpu.attention.device(), gpu.attention.queue());
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let error = gpu.attention.encode(&mut encoder, plan, operands).expect_err("bad buffers passed");
    {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        assert_eq!(gpu.attention.encode_in_pass(&mut pass, plan, operands), Err(error.clone()));
    }
    queue.submit([encoder.finish()]);
    let bytes = download(device, queue, &guarded.o);
    let poison = poison(guarded.problem.out_dtype);
    assert!(bytes.chunks(poison.len()).all(|x| x == poison), "{error}: o was written to");
    error
}

#[test]
fn buffers() {
    use Operand::*;
    let Some(gpu) = gpu::get(Kind::Full, false) else { return };
    let device = gpu.attention.device();
    let case = everything();
    let guarded = Guarded::new(device, &case);
    let p = &guarded.problem;
    let all = guarded.operands();
    let plan = gpu.attention.plan(p).expect("served");
    fn with<'a>(mut operands: Operands<'a>, operand: Operand, b: Option<&'a wgpu::Buffer>) -> Operands<'a> {
        match (operand, b.map(|b| b.slice(..))) {
            (Q, Some(b)) => operands.q = b,
            (K, Some(b)) => operands.k = b,
            (V, Some(b)) => operands.v = b,
            (O, Some(b)) => operands.o = b,
            (W, b) => operands.w = b,
            (Bias, b) => operands.bias = b,
            (Mask, b) => operands.mask = b,
            (AlibiSlopes, b) => operands.alibi_slopes = b,
            (Sinks, b) => operands.sinks = b,
            (KvLens, b) => operands.kv_lens = b,
            (Lse, b) => operands.lse = b,
            (Weights, b) => operands.weights = b,
            (_, None) => panic!("{operand} is always there"),
            (_, Some(_)) => panic!("{operand} is unknown"),
        }
        operands
    }

    for operand in [W, Bias, Mask, AlibiSlopes, Sinks, KvLens, Lse, Weights] {
        let missing = with(all, operand, None);
        assert_eq!(encode_refuses(gpu, &guarded, &missing, &plan), Error::MissingOperand { operand });
        let plan = gpu.attention.plan(&without(p.clone(), operand)).expect("served");
        assert_eq!(encode_refuses(gpu, &guarded, &all, &plan), Error::UnexpectedOperand { operand });
    }

    for operand in [Q, K, V, O, W, Bias, Mask, AlibiSlopes, Sinks, KvLens, Lse, Weights] {
        // The last word of what the layout reaches is missing.
        let need = (p.extent(operand) as u64 * p.element_bytes(operand) as u64).next_multiple_of(4);
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
        let short = upload(device, "short", &vec![0; need as usize - 4], usage);
        let bad = with(all, operand, Some(&short));
        let (got, unit, container) = (short.size(), "bytes", "buffer");
        let error = encode_refuses(gpu, &guarded, &bad, &plan);
        assert_eq!(error, Error::OutOfBounds { operand, need, got, unit, container });

        let usage = wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let size = all.get(operand).expect("every operand is there").size();
        let useless = upload(device, "no storage", &vec![0; size as usize], usage);
        let error = encode_refuses(gpu, &guarded, &with(all, operand, Some(&useless)), &plan);
        assert_eq!(error, Error::BufferUsage { operand, need: wgpu::BufferUsages::STORAGE, got: usage });
    }

    // An output in the place of any other operand, all at the start of one buffer.
    let plan_at_0 = gpu.attention.plan(&case.problem).expect("served");
    let large = upload(device, "large", &poison(Dtype::F32).repeat(4096), wgpu::BufferUsages::STORAGE);
    for output in [O, Lse, Weights] {
        for other in [Q, K, V, W, Bias, Mask, AlibiSlopes, Sinks, KvLens, O, Lse, Weights] {
            if other == output {
                continue;
            }
            let bad = with(with(all, output, Some(&large)), other, Some(&large));
            let error = encode_refuses(gpu, &guarded, &bad, &plan_at_0);
            let named = match error {
                Error::Aliased { operand, with } => [operand, with],
                ref error => panic!("{output} and {other}: {error}"),
            };
            assert!(named.contains(&output) && named.contains(&other), "{output} and {other}: {error}");
        }
    }

    // A piece that begins where no binding can, and one that ends too early though its buffer does not.
    let lse = all.lse.expect("it is there");
    let need = gpu.attention.caps().storage_alignment.max(4).into();
    let bad = Operands { lse: Some(lse.slice(2..)), ..all };
    let error = encode_refuses(gpu, &guarded, &bad, &plan);
    assert_eq!(error, Error::Misaligned { operand: Lse, need, got: 2 });
    let need = p.extent(Lse) as u64 * 4;
    let bad = Operands { lse: Some(lse.slice(..need - 4)), ..all };
    let (got, unit, container) = (need - 4, "bytes", "buffer");
    let error = encode_refuses(gpu, &guarded, &bad, &plan);
    assert_eq!(error, Error::OutOfBounds { operand: Lse, need, got, unit, container });

    // A buffer that wgpu itself rejects.
    let destroyed = upload(device, "destroyed", &vec![0; all.k.size() as usize], all.k.buffer().usage());
    destroyed.destroy();
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let bad = with(all, K, Some(&destroyed));
    let error = gpu.attention.encode(&mut encoder, &plan, &bad).expect_err("a destroyed buffer passed");
    assert!(matches!(&error, Error::Driver { why, .. } if !why.is_empty()), "{error:?}");
    works_still();
}

/// Two devices of one adapter: the other's buffer is an error, and so is nothing else.
#[test]
fn a_buffer_of_another_device() {
    let Some(gpu) = gpu::get(Kind::Full, false) else { return };
    let adapter = gpu::adapter_of(&gpu.attention).expect("it was listed before");
    let open = || {
        let device = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor::default()));
        let (device, queue) = device.expect("default limits");
        Attention::new(&device, &queue)
    };
    let (own, other) = (open(), open());
    let case = Axes::default().build(1);
    let (guarded, foreign) = (Guarded::new(own.device(), &case), Guarded::new(other.device(), &case));
    let plan = own.plan(&guarded.problem).expect("served");
    let mut encoder = own.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let bad = Operands { v: foreign.operands().v, ..guarded.operands() };
    let error = own.encode(&mut encoder, &plan, &bad).expect_err("another device's buffer passed");
    assert!(matches!(&error, Error::Driver { why, .. } if !why.is_empty()), "{error:?}");
    let out = own.run_blocking(&case.problem, &case.data.inputs()).expect("it is still usable");
    assert!(Expected::of(&case).check(&case, &out, Gap::Zero).is_ok());
}

/// What comes back may be more than a buffer holds, as long as each output has one.
#[test]
fn outputs_that_no_buffer_holds_together() {
    let Some(gpu) = gpu::get(Kind::Full, false) else { return };
    let adapter = gpu::adapter_of(&gpu.attention).expect("it was listed before");
    let limits = wgpu::Limits::default().or_worse_values_from(&adapter.limits());
    let room = 20 << 10;
    let limits = wgpu::Limits { max_buffer_size: room, max_storage_buffer_binding_size: room, ..limits };
    let descriptor = wgpu::DeviceDescriptor { required_limits: limits, ..Default::default() };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor)).expect("a device");
    let case = Axes { seq_q: 64, seq_kv: 64, head_dim: 64, head_dim_v: 64, ..Axes::default() };
    let case = Axes { heads: (1, 1), weights: true, ..case }.build(7);
    let bytes = |operand| case.problem.buffer_bytes(operand);
    assert!(bytes(Operand::O) <= room && bytes(Operand::O) + bytes(Operand::Weights) > room);
    let attention = Attention::new(&device, &queue);
    let out = attention.run_blocking(&case.problem, &case.data.inputs()).expect("each has its own");
    assert!(Expected::of(&case).check(&case, &out, Gap::Zero).is_ok());
}

/// An output and an input may lie in one buffer, whether or not a dispatch uses both.
#[test]
fn an_output_beside_an_input() {
    let Some(gpu) = gpu::get(Kind::Full, false) else { return };
    let (device, queue) = (gpu.attention.device(), gpu.attention.queue());
    let case = Axes { seq_kv: 40, head_dim_v: 8, ..Axes::default() }.build(6);
    let guarded = Guarded::new(device, &case);
    let mut problem = guarded.problem.clone();
    // k, then o behind it, after a gap that any alignment fits; and one too narrow for any.
    let k_len = case.data.k.as_ref().as_ref().len();
    problem.k = case.problem.k;
    problem.o = case.problem.o.at((k_len + 256).next_multiple_of(64));
    let mut both = case.data.k.to_f32();
    both.resize(problem.extent(Operand::O) as usize, f32::NAN);
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
    let buffer = upload(device, "k and o", bytemuck::cast_slice(&both), usage);
    let on = |path| {
        let options = PlanOptions { path: Some(path), ..PlanOptions::default() };
        gpu.attention.plan_with(&problem, &options).expect("served")
    };
    let operands = Operands { k: buffer.slice(..), o: buffer.slice(..), ..guarded.operands() };
    let expected = Expected::of(&case);
    for path in [Path::Fused, Path::Staged] {
        queue.write_buffer(&buffer, 0, bytemuck::cast_slice(&both));
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        gpu.attention.encode(&mut encoder, &on(path), &operands).expect("they lie apart");
        queue.submit([encoder.finish()]);
        let floats: Vec<f32> = bytemuck::pod_collect_to_vec(&download(device, queue, &buffer));
        assert_eq!(floats[..k_len], both[..k_len]);
        for (got, want) in floats[problem.o.offset..].iter().zip(&expected.oracle.o) {
            assert!((f64::from(*got) - want).abs() <= expected.o, "{path}: {got} is not {want}");
        }
    }
    problem.o = case.problem.o.at(k_len - 1);
    let plan = gpu.attention.plan(&problem).expect("served");
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let refused = gpu.attention.encode(&mut encoder, &plan, &operands);
    assert!(matches!(refused, Err(Error::Aliased { operand: Operand::O, with: Operand::K })), "{refused:?}");
}

/// A length on the device cannot be checked without waiting: what is too long is all keys.
#[test]
fn lengths_on_the_device_are_clamped() {
    for kind in [Kind::Full, Kind::Minimal] {
        let Some(gpu) = gpu::get(kind, false) else { return };
        let (device, queue) = (gpu.attention.device(), gpu.attention.queue());
        let case = Axes { batch: 2, lens: Lens::Full, ..Axes::default() }.build(4);
        for family in gpu.families() {
            let subject =
                Subject::Gpu { kind, checks: false, family: Some(family), door: Door::Encode, split: false };
            let case = subject.asked(&case);
            let guarded = Guarded::new(device, &case);
            let lens = upload(
                device,
                "lengths",
                bytemuck::cast_slice(&[34_u32, u32::MAX]),
                wgpu::BufferUsages::STORAGE,
            );
            let operands = Operands { kv_lens: Some(lens.slice(..)), ..guarded.operands() };
            let options = PlanOptions { family: Some(family), ..PlanOptions::default() };
            let plan = gpu.attention.plan_with(&guarded.problem, &options).expect("served");
            let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            gpu.attention.encode(&mut encoder, &plan, &operands).expect("served");
            queue.submit([encoder.finish()]);
            let out = guarded.outputs(device, queue, &case);
            if let Err(what) = Expected::of(&case).check(&case, &out, Gap::Poison) {
                panic!("{kind:?} {family}: {what}");
            }
        }
    }
}

#[test]
fn plans() {
    // A plan for capabilities that this device does not have.
    if let Some(gpu) = gpu::get(Kind::Full, false) {
        let case = Axes::default().build(1);
        let guarded = Guarded::new(gpu.attention.device(), &case);
        let elsewhere = Caps { adapter: "elsewhere".into(), ..gpu.attention.caps().clone() };
        let plan = Plan::new(&guarded.problem, &elsewhere, &PlanOptions::default()).expect("served");
        let device = format!("adapter {:?}", gpu.attention.caps().adapter);
        let error = encode_refuses(gpu, &guarded, &guarded.operands(), &plan);
        assert_eq!(error, Error::ForeignPlan { plan: "adapter \"elsewhere\"".into(), device });
        // The first that differs is named.
        let fewer = Caps { max_dispatch: 7, ..gpu.attention.caps().clone() };
        let plan = Plan::new(&guarded.problem, &fewer, &PlanOptions::default()).expect("served");
        let other = encode_refuses(gpu, &guarded, &guarded.operands(), &plan);
        assert!(
            other.to_string().contains("a device with max_dispatch 7, this one has max_dispatch "),
            "{other}"
        );
        let foreign = Plan::new(&case.problem, &elsewhere, &PlanOptions::default()).expect("served");
        assert_eq!(gpu.attention.run_plan_blocking(&foreign, &case.data.inputs()), Err(error));
        works_still();
    }

    let caps = Caps::minimal();
    let plan = |p: &AttentionProblem, caps: &Caps, options: &PlanOptions| Plan::new(p, caps, options);
    // One operand beyond one binding.
    let large = AttentionProblem::new(1, 1, 1, 1, 1 << 20, 64, 64);
    let Err(Error::LimitExceeded { what, need, got }) = plan(&large, &caps, &PlanOptions::default()) else {
        panic!("256 MiB of keys in a binding of 128 MiB")
    };
    assert!(what.starts_with('k'), "{what}");
    assert_eq!((need, got), (256 << 20, caps.max_storage_binding));
    // A budget below one row.
    let staged = PlanOptions { path: Some(Path::Staged), ..PlanOptions::default() };
    let options = PlanOptions { scratch_budget: Some(15), ..staged.clone() };
    let Err(Error::LimitExceeded { what, need, got: 15 }) = plan(&problem(), &caps, &options) else {
        panic!("a row of scores in 15 bytes")
    };
    assert!(what.contains("scratch_budget") && need > 15, "{what} {need}");
    // What the error says is needed is enough.
    let options = PlanOptions { scratch_budget: Some(need), ..staged };
    assert!(plan(&problem(), &caps, &options).is_ok());

    // The fused kernels make no weights; the plan's own choice does.
    let weights = AttentionProblem { weights: true, ..problem() };
    let options = PlanOptions { path: Some(Path::Fused), ..PlanOptions::default() };
    let Err(Error::KernelUnfit { why, .. }) = plan(&weights, &caps, &options) else {
        panic!("weights from a kernel that has none")
    };
    assert!(why.contains("weights"), "{why}");
    assert_eq!(plan(&weights, &caps, &PlanOptions::default()).expect("served").path(), Path::Staged);
    // A family of another path than the one asked for.
    let options = PlanOptions { family: Some(Family::StagedTile), ..options };
    assert!(matches!(plan(&problem(), &caps, &options), Err(Error::KernelUnfit { .. })));

    let few = Caps { max_invocations: 64, ..Caps::minimal() };
    let options = PlanOptions { family: Some(Family::StagedTile), ..PlanOptions::default() };
    let Err(Error::KernelUnfit { kernel, why }) = plan(&problem(), &few, &options) else {
        panic!("256 threads on a device that has 64")
    };
    assert!(kernel.contains("tile") && why.contains("64"), "{kernel}: {why}");
    // Without force, the plan finds kernels that fit.
    assert!(plan(&problem(), &few, &PlanOptions::default()).is_ok());
}

#[test]
fn no_adapter() {
    let request =
        DeviceRequest { adapter: Some("no adapter has this name".into()), ..DeviceRequest::default() };
    let Err(Error::NoAdapter { why }) = pollster::block_on(Attention::request(&request)) else {
        panic!("an adapter of that name")
    };
    assert!(why.contains("no adapter has this name"), "{why}");
}

/// What cannot be read back is said before anything is submitted.
#[test]
fn ranges_that_cannot_be_read() {
    let Some(gpu) = gpu::get(Kind::Full, false) else { return };
    let (device, queue) = (gpu.attention.device(), gpu.attention.queue());
    let buffer = |usage| {
        device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: 16,
            usage,
            mapped_at_creation: false,
        })
    };
    let (good, sealed) = (buffer(wgpu::BufferUsages::COPY_SRC), buffer(wgpu::BufferUsages::COPY_DST));
    let read = |buffer, range| pollster::block_on(wgpu_attention::read_buffer(device, queue, buffer, range));
    assert_eq!(read(&good, 4..12), Ok(vec![0; 8]));
    assert_eq!(read(&good, 16..16), Ok(Vec::new()));
    #[allow(clippy::reversed_empty_ranges)]
    for (buffer, range, says) in [
        (&good, 8..4, "before it begins"),
        (&good, 8..20, "behind the buffer"),
        (&good, 0..u64::MAX, "behind the buffer"),
        (&good, 0..6, "multiples of 4"),
        (&good, 2..8, "multiples of 4"),
        (&sealed, 0..8, "COPY_SRC"),
    ] {
        let error = read(buffer, range).expect_err(says);
        assert!(matches!(error, Error::ReadRange { size: 16, .. }), "{error:?}");
        assert!(error.to_string().contains(says), "{error}");
    }
}

/// A lost device is an error of every call, and no panic.
#[test]
fn lost_device() {
    if gpu::get(Kind::Full, false).is_none() {
        return;
    }
    // A device of its own: losing it must not disturb the other tests.
    let attention = pollster::block_on(Attention::request(&gpu::request())).expect("there was one before");
    let case = everything();
    let guarded = Guarded::new(attention.device(), &case);
    let plan = attention.plan(&guarded.problem).expect("served");
    assert!(attention.run_blocking(&case.problem, &case.data.inputs()).is_ok());
    attention.device().destroy();

    let lost = |error: &Error| assert!(matches!(error, Error::DeviceLost { .. }), "{error:?}");
    for _ in 0..2 {
        // With pipelines that are there, and with some that would have to be compiled.
        lost(&attention.run_blocking(&case.problem, &case.data.inputs()).expect_err("lost"));
        let plain = Axes::default().build(1);
        lost(&attention.run_blocking(&plain.problem, &plain.data.inputs()).expect_err("lost"));
        let inputs = plain.data.inputs();
        lost(&pollster::block_on(attention.run(&plain.problem, &inputs)).expect_err("lost"));
        let read = wgpu_attention::read_buffer(attention.device(), attention.queue(), &guarded.o, 0..16);
        lost(&pollster::block_on(read).expect_err("lost"));
    }
    // Recording alone asks the device nothing where all is there, and must do no harm. (To ask each time took a quarter
    // of its time.)
    let mut encoder = attention.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    if let Err(error) = attention.encode(&mut encoder, &plan, &guarded.operands()) {
        lost(&error);
    }
    works_still();
}

/// What errors say is for people: the operand, what is needed, what was got.
#[test]
fn texts() {
    let p = AttentionProblem {
        bias: Some(Bias { dtype: Dtype::F16, layout: Layout::bhsd(4, 3, 5) }),
        ..problem()
    };
    let x = vec![0.0_f32; 1024];
    let data = Data::new(
        wgpu_attention::Tensor::F32(x.clone()),
        wgpu_attention::Tensor::F32(x[..7].to_vec()),
        wgpu_attention::Tensor::F32(x.clone()),
    );
    let text = |inputs: Inputs<'_>| inputs.check(&p).expect_err("bad").to_string();
    assert_eq!(text(data.inputs()), "k: the layout reaches 160 elements, the slice holds 7");
    let inputs = Inputs { k: TensorRef::F32(&x), ..data.inputs() };
    assert_eq!(text(inputs), "bias: the problem asks for it, the call did not bring it");
    let inputs = Inputs { bias: Some(TensorRef::F32(&x)), ..inputs };
    assert_eq!(text(inputs), "bias: the problem states f16, the call brings f32");
}

/// A buffer of as many bytes as is said is enough, and a word less is not: of every call's operands.
#[test]
fn buffers_of_the_size_that_is_said() {
    let Some(gpu) = gpu::get(Kind::Full, false) else { return };
    let attention = gpu.fresh();
    let buffers: Vec<_> =
        (0..9).map(|_| upload(attention.device(), "operand", &[0; 4096], gpu::USAGE)).collect();
    let hold = |operands: &[(Operand, u64)], call: &dyn Fn(&[wgpu::BufferSlice<'_>]) -> Result<(), Error>| {
        let slices = |short: Option<usize>| {
            let bytes = |at: usize| operands[at].1 - if short == Some(at) { 4 } else { 0 };
            (0..operands.len()).map(|at| buffers[at].slice(..bytes(at))).collect::<Vec<_>>()
        };
        assert_eq!(call(&slices(None)), Ok(()));
        for (at, (operand, _)) in operands.iter().enumerate() {
            let error = call(&slices(Some(at))).expect_err("a word less was enough").to_string();
            assert!(error.contains(&operand.to_string()), "{operand}: {error}");
        }
    };
    use Operand::{Bias, Dk, Dout, Dq, Dv, K, KNew, KvLens, Lse, Mask, O, Q, V, VNew, W, X, Y};
    let half =
        AttentionProblem { lse: true, ..AttentionProblem::new(1, 1, 1, 3, 5, 7, 9) }.with_dtype(Dtype::F16);
    let masked = AttentionProblem { mask: Some(Layout::bhsd(1, 3, 5)), ..half.clone() };
    let plan = attention.plan(&masked).unwrap();
    hold(&[Q, K, V, O, Lse, Mask].map(|of| (of, masked.buffer_bytes(of))), &|b| {
        let operands =
            Operands { lse: Some(b[4]), mask: Some(b[5]), ..Operands::new(b[0], b[1], b[2], b[3]) };
        attention.prepare(&plan, &operands).map(drop)
    });
    let backward = BackwardProblem::of(&half);
    hold(&[Q, K, V, O, Lse, Dout, Dq, Dk, Dv].map(|of| (of, backward.buffer_bytes(of))), &|b| {
        let forward = Operands { lse: Some(b[4]), ..Operands::new(b[0], b[1], b[2], b[3]) };
        let [dq, dk, dv] = [6, 7, 8].map(|at| Some(b[at]));
        let operands = BackwardOperands { dq, dk, dv, ..BackwardOperands::new(forward, b[5]) };
        attention.prepare_backward(&backward, &operands).map(drop)
    });
    let map = LinearProblem { dtype: Dtype::Bf16, ..LinearProblem::new(3, 5, 7) }.with_bias(Dtype::F16);
    hold(&[X, W, Y, Bias].map(|of| (of, map.buffer_bytes(of))), &|b| {
        let operands = LinearOperands { bias: Some(b[3]), ..LinearOperands::new(b[0], b[1], b[2]) };
        attention.prepare_linear(&map, &operands).map(drop)
    });
    let cached =
        AttentionProblem { kv_lens: true, ..half.clone() }.with_cache(Cache::Contiguous, Dtype::Int8);
    let append = Append::new(&cached);
    hold(&[KNew, VNew, K, V, KvLens].map(|of| (of, append.buffer_bytes(of))), &|b| {
        attention.prepare_append(&append, &AppendOperands::new(b[0], b[1], b[2], b[3], b[4])).map(drop)
    });
    let merge =
        MergeProblem { lse: true, ..MergeProblem::new(vec![Partials::stacked(3, 1, 1, 3, 9)], 1, 1, 3, 9) };
    let merge = merge.with_dtype(Dtype::F16);
    let sizes = [(Some(0), O), (Some(0), Lse), (None, O), (None, Lse)];
    hold(&sizes.map(|(partial, of)| (of, merge.buffer_bytes(partial, of))), &|b| {
        let operands = MergeOperands { partials: &[(b[0], b[1])], o: b[2], lse: Some(b[3]) };
        attention.prepare_merge(&merge, &operands).map(drop)
    });
}
