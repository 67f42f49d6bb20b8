//! One `Attention` for many threads and many calls: pipelines and scratch are shared, results are
//! not; and nothing is submitted or waited for behind the caller's back.

mod common;

use common::case::{Axes, Case, Sim};
use common::check::{Expected, Gap, poison};
use common::gpu::{self, Guarded, Kind, download};
use wgpu_attention::{Align, Attention, Dtype, Outputs, Path, PlanOptions};

fn cases() -> Vec<Case> {
    let base = Axes { heads: (2, 1), seq_q: 33, seq_kv: 65, ..Axes::default() };
    let axes = [
        base,
        Axes { causal: Some(Align::BottomRight), weights: true, ..base },
        Axes { dtype: Dtype::F16, out_dtype: Dtype::F16, seq_kv: 300, ..base },
        Axes { similarity: Sim::Bilinear { extra: 1, per_head: true }, sinks: true, batch: 3, ..base },
    ];
    axes.iter().enumerate().map(|(i, axes)| axes.build(i as u64)).collect()
}

fn run(attention: &Attention, case: &Case) -> Outputs {
    let out = attention.run_blocking(&case.problem, &case.data.inputs()).expect("served");
    if let Err(what) = Expected::of(case).check(case, &out, Gap::Zero) {
        panic!("{what}\n  {}", case.name);
    }
    out
}

/// A fresh object on a device that the tests share.
fn fresh(kind: Kind) -> Option<Attention> {
    gpu::get(kind, false).map(gpu::Gpu::fresh)
}

#[test]
fn two_threads_share_one_object() {
    fn send_and_sync<T: Send + Sync>(_: &T) {}
    for kind in [Kind::Full, Kind::Minimal] {
        let Some(attention) = fresh(kind) else { return };
        send_and_sync(&attention);
        if attention.caps().backend == wgpu::Backend::Gl {
            common::say("two threads: NOT TESTED, on OpenGL wgpu waits a second for its context and panics");
            return;
        }
        let cases = cases();
        let alone: Vec<Outputs> = cases.iter().map(|case| run(&attention, case)).collect();
        let built = attention.pipelines();
        // Another object, so that pipelines are missing and both threads ask for them at once.
        let shared = fresh(kind).expect("there was one before");
        std::thread::scope(|scope| {
            for thread in 0..2 {
                let (shared, cases, alone) = (&shared, &cases, &alone);
                scope.spawn(move || {
                    for turn in 0..2 * cases.len() {
                        // One thread goes forward, the other backward: they meet in the middle.
                        let i = turn % cases.len();
                        let i = if thread == 0 { i } else { cases.len() - 1 - i };
                        assert_eq!(run(shared, &cases[i]), alone[i], "{}", cases[i].name);
                    }
                });
            }
        });
        assert_eq!(shared.pipelines(), built, "each pipeline is built once");
    }
}

/// Several calls recorded before any is submitted: each keeps its own parameters and operands.
#[test]
fn recorded_calls_do_not_disturb_each_other() {
    let Some(attention) = fresh(Kind::Full) else { return };
    let (device, queue) = (attention.device(), attention.queue());
    let cases = cases();
    let mut calls = Vec::new();
    for case in &cases {
        let guarded = Guarded::new(device, case);
        let plan = attention.plan(&guarded.problem).expect("served");
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        attention.encode(&mut encoder, &plan, &guarded.operands()).expect("served");
        calls.push((guarded, encoder.finish()));
    }
    // A call with more scratch than those before, a freed scratch: what is recorded stays whole.
    run(&attention, &Axes { seq_q: 200, seq_kv: 500, ..Axes::default() }.build(1));
    attention.free_scratch();
    let (guarded, commands): (Vec<_>, Vec<_>) = calls.into_iter().unzip();
    queue.submit(commands.into_iter().rev());
    for (case, guarded) in cases.iter().zip(&guarded) {
        let out = guarded.outputs(device, queue, case);
        if let Err(what) = Expected::of(case).check(case, &out, Gap::Poison) {
            panic!("{what}\n  {}", case.name);
        }
    }
}

/// Two calls in one encoder, the second reading what the first wrote.
#[test]
fn one_call_feeds_the_next() {
    let Some(attention) = fresh(Kind::Full) else { return };
    let (device, queue) = (attention.device(), attention.queue());
    let case = Axes { seq_q: 33, seq_kv: 33, head_dim: 16, head_dim_v: 16, ..Axes::default() }.build(2);
    let mut second = case.clone();
    second.data.q = run(&attention, &case).o.into();
    let expected = Expected::of(&second);

    let (first, next) = (Guarded::new(device, &case), Guarded::new(device, &case));
    let mut problem = next.problem.clone();
    problem.q = first.problem.o;
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let plan = attention.plan(&first.problem).expect("served");
    attention.encode(&mut encoder, &plan, &first.operands()).expect("served");
    let operands = wgpu_attention::Operands { q: first.o.slice(..), ..next.operands() };
    let plan = attention.plan(&problem).expect("served");
    attention.encode(&mut encoder, &plan, &operands).expect("served");
    queue.submit([encoder.finish()]);
    let out = next.outputs(device, queue, &second);
    if let Err(what) = expected.check(&second, &out, Gap::Poison) {
        panic!("{what}");
    }
}

/// `encode` records: until the caller submits, every output is as it was.
#[test]
fn encode_submits_nothing() {
    let Some(attention) = fresh(Kind::Full) else { return };
    let (device, queue) = (attention.device(), attention.queue());
    for case in cases() {
        let guarded = Guarded::new(device, &case);
        let plan = attention.plan(&guarded.problem).expect("served");
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        attention.encode(&mut encoder, &plan, &guarded.operands()).expect("served");
        let poison = poison(guarded.problem.out_dtype);
        let untouched = |bytes: Vec<u8>| bytes.chunks(poison.len()).all(|x| x == poison);
        assert!(untouched(download(device, queue, &guarded.o)), "before finish\n  {}", case.name);
        let commands = encoder.finish();
        assert!(untouched(download(device, queue, &guarded.o)), "before submit\n  {}", case.name);
        queue.submit([commands]);
        let out = guarded.outputs(device, queue, &case);
        assert!(Expected::of(&case).check(&case, &out, Gap::Poison).is_ok(), "{}", case.name);
    }
}

/// The futures need no runtime and no polling by the caller.
#[test]
fn futures_resolve_by_themselves() {
    let Some(attention) = fresh(Kind::Full) else { return };
    let case = &cases()[0];
    let out = pollster::block_on(attention.run(&case.problem, &case.data.inputs())).expect("served");
    assert!(Expected::of(case).check(case, &out, Gap::Zero).is_ok());
    // Scores are what takes scratch.
    let staged = PlanOptions { path: Some(Path::Staged), ..PlanOptions::default() };
    let staged = attention.plan_with(&case.problem, &staged).expect("served");
    pollster::block_on(attention.run_plan(&staged, &case.data.inputs())).expect("served");
    assert_eq!(attention.scratch_bytes(), staged.scratch_bytes());
    attention.free_scratch();
    assert_eq!(attention.scratch_bytes(), 0);
    assert_eq!(run(&attention, case), out);
}

/// A second call of the same kind compiles nothing and takes no more scratch.
#[test]
fn pipelines_and_scratch_are_kept() {
    let Some(attention) = fresh(Kind::Full) else { return };
    let case = &cases()[1];
    run(&attention, case);
    let (pipelines, scratch) = (attention.pipelines(), attention.scratch_bytes());
    // Other numbers, sizes and layouts of the same kind.
    let mut other = case.clone();
    other.problem.scale = Some(0.5);
    other.problem.causal = Some(Align::TopLeft);
    run(&attention, &other);
    assert_eq!((attention.pipelines(), attention.scratch_bytes()), (pipelines, scratch));
}

/// GPU time, where the device has timestamps.
#[test]
fn timestamps() {
    let Some(attention) = fresh(Kind::Full) else { return };
    let (device, queue) = (attention.device(), attention.queue());
    let timer = wgpu_attention::GpuTimer::new(device, queue);
    assert_eq!(timer.is_some(), attention.caps().timestamps);
    let Some(timer) = timer else { return };
    let case = &cases()[0];
    let guarded = Guarded::new(device, case);
    let plan = attention.plan(&guarded.problem).expect("served");
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: None,
            timestamp_writes: Some(timer.pass_writes()),
        });
        attention.encode_in_pass(&mut pass, &plan, &guarded.operands()).expect("served");
    }
    timer.resolve(&mut encoder);
    queue.submit([encoder.finish()]);
    let ms = pollster::block_on(timer.read_ms(device, queue)).expect("it was submitted");
    assert!((0.0..60_000.0).contains(&ms), "{ms} ms");
}
