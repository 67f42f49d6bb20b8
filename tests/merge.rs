//! Merging partial results: random ones against the oracle of the merge, and those of attention over parts
//! of the keys against the oracle of the whole. On each kind of device, with and without the shaders'
//! run-time checks, which must give the same bits.

mod common;

use common::case::{Axes, Case, Storage, indices};
use common::check::{Expected, poison};
use common::gpu::{self, Gpu, Guarded, Kind, USAGE, download, upload};
use common::kept::{Kept, Move};
use common::pool::Pieces;
use common::rng::{Rng, fresh_seed};
use wgpu_attention::reference::{Merged, merge_states};
use wgpu_attention::{
    Align, Attention, AttentionProblem, Dtype, Error, Layout, MergeOperands, MergeProblem, Operand, Operands,
    Partials, Tensor,
};

const FLOATS: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];
/// Elements of poison after every output.
const GUARD: usize = 64;
const EPSILON: f64 = 1.0 / (1 << 24) as f64;

/// Both kinds of device, without run-time checks and with them.
fn gpus() -> Vec<[&'static Gpu; 2]> {
    let kinds = [Kind::Full, Kind::Minimal].into_iter();
    kinds.filter_map(|kind| Some([gpu::get(kind, false)?, gpu::get(kind, true)?])).collect()
}

/// Runs a law some times, each on other numbers, from a seed of its own that a failure prints.
fn hold(times: usize, law: impl Fn(&mut Rng)) {
    let seed = fresh_seed();
    let mut rng = Rng::new(seed);
    let run = std::panic::AssertUnwindSafe(|| (0..times).for_each(|_| law(&mut rng)));
    if let Err(panic) = std::panic::catch_unwind(run) {
        eprintln!("broken with WGPU_ATTENTION_SEED={seed:#x}");
        std::panic::resume_unwind(panic);
    }
}

/// A merge and its data: o and lse of each pair.
#[derive(Clone, Debug)]
struct Merge {
    problem: MergeProblem,
    partials: Vec<(Tensor, Vec<f32>)>,
}

/// Strides of dimensions that are nested in `order`, outermost first, with gaps between.
fn nest(sizes: [usize; 5], order: [usize; 5], mut gap: impl FnMut() -> usize) -> [usize; 5] {
    let (mut strides, mut span) = ([0; 5], 1);
    for &dim in order.iter().rev() {
        strides[dim] = span;
        span = span * sizes[dim] + gap();
    }
    strides
}

/// A layout of `[b, h, s, d]` and a step between `parts`: in quads, or anyhow.
fn lay_out(parts: usize, shape: [usize; 4], quads: bool, rng: &mut Rng) -> (Layout, usize) {
    let [b, h, s, d] = shape;
    let mut order = [0, 1, 2, 3, 4];
    rng.shuffle(&mut order[..if quads { 4 } else { 5 }]);
    let sizes = [parts, b, h, s, d];
    // Sometimes every row begins at a quad and not every part.
    let odd_step = quads && rng.chance(0.2);
    if odd_step {
        order = [0, 1, 2, 3, 4];
    }
    let mut strides =
        nest(sizes, order, || if quads { 4 * rng.below(2) } else { rng.below(2) * rng.below(4) });
    strides[0] += usize::from(odd_step);
    let offset = if quads { 4 * rng.below(40) } else { rng.below(160) };
    (Layout { offset, strides: [strides[1], strides[2], strides[3], strides[4]] }, strides[0])
}

impl Merge {
    /// Parts that have seen no key of a row hold NaN there, as do all gaps.
    fn draw(rng: &mut Rng) -> Self {
        let quads = rng.chance(0.5);
        let dims: &[usize] = if quads { &[4, 8, 64, 100] } else { &[1, 2, 3, 4, 5, 7, 66, 129] };
        let (batch, heads_q, seq_q) = (1 + rng.below(3), 1 + rng.below(4), 1 + rng.below(9));
        let shape = [batch, heads_q, seq_q, rng.pick(dims)];
        let partials: Vec<Partials> = (0..1 + rng.below(3))
            .map(|_| {
                let parts = rng.pick(&[1, 1, 2, 5]);
                let (o, o_step) = lay_out(parts, shape, quads, rng);
                let (lse, lse_step) = lay_out(parts, [batch, heads_q, seq_q, 1], false, rng);
                Partials { parts, o, o_step, lse, lse_step }
            })
            .collect();
        let problem = MergeProblem {
            dtype: rng.pick(&FLOATS),
            out_dtype: rng.pick(&FLOATS),
            o: lay_out(1, shape, quads && rng.chance(0.7), rng).0,
            lse: rng.chance(0.7),
            ..MergeProblem::new(partials, batch, heads_q, seq_q, shape[3])
        };
        let (spread, none) = (rng.pick(&[1.0, 8.0, 1000.0]), rng.pick(&[0.0, 0.3, 0.8]));
        let mut lse = Rng::new(rng.next());
        Self::fill(
            problem,
            |_, _, _| if lse.chance(none) { f32::NEG_INFINITY } else { spread * lse.normal() },
            |_, _, _| rng.normal() + 0.5,
        )
    }

    /// Data by pair, part and place; o of what has no key is NaN.
    fn fill(
        problem: MergeProblem,
        mut lse: impl FnMut(usize, usize, [usize; 4]) -> f32,
        mut o: impl FnMut(usize, usize, [usize; 4]) -> f32,
    ) -> Self {
        problem.validate().expect("a valid merge");
        let p = &problem;
        let shape = [p.batch, p.heads_q, p.seq_q, p.head_dim_v];
        let mut all = Vec::new();
        for (at, of) in p.partials.iter().enumerate() {
            let len = |operand| p.extent(Some(at), operand) as usize + 5;
            let mut values = Tensor::from_f32(p.dtype, &vec![f32::NAN; len(Operand::O)]);
            let mut logs = vec![f32::NAN; len(Operand::Lse)];
            for part in 0..of.parts {
                for [b, h, s, _] in indices([shape[0], shape[1], shape[2], 1]) {
                    let log = lse(at, part, [b, h, s, 0]);
                    logs[of.lse.index([b, h, s, 0]) + part * of.lse_step] = log;
                    for d in 0..shape[3] {
                        let value = o(at, part, [b, h, s, d]);
                        let value = if log == f32::NEG_INFINITY { f32::NAN } else { value };
                        values.set(of.o.index([b, h, s, d]) + part * of.o_step, value);
                    }
                }
            }
            all.push((values, logs));
        }
        Self { problem, partials: all }
    }

    fn oracle(&self) -> Merged {
        let slices: Vec<_> = self.partials.iter().map(|(o, lse)| (o.as_ref(), &lse[..])).collect();
        merge_states(&self.problem, &slices).expect("a valid merge")
    }

    fn upload(&self, device: &wgpu::Device) -> Vec<(wgpu::Buffer, wgpu::Buffer)> {
        let pair = |(o, lse): &(Tensor, Vec<f32>)| {
            let o = upload(device, "part o", o.as_ref().bytes(), USAGE);
            (o, upload(device, "part lse", bytemuck::cast_slice(lse), USAGE))
        };
        self.partials.iter().map(pair).collect()
    }

    fn run(&self, gpu: &Gpu) -> Out {
        let (device, queue) = (gpu.attention.device(), gpu.attention.queue());
        let buffers = self.upload(device);
        let target = Target::new(device, &self.problem);
        let mut all = vec![&target.o];
        all.extend(&target.lse);
        let outputs: Vec<_> = (0..all.len()).collect();
        all.extend(buffers.iter().flat_map(|(o, lse)| [o, lse]));
        let firsts: Vec<_> = (outputs.len()..all.len()).step_by(2).collect();
        let pieces = Pieces::new(gpu, all, gpu.checks);
        let pairs: Vec<_> = firsts.iter().map(|&at| (pieces.slice(at), pieces.slice(at + 1))).collect();
        let operands = MergeOperands {
            partials: &pairs,
            o: pieces.slice(0),
            lse: target.lse.as_ref().map(|_| pieces.slice(1)),
        };
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let done = gpu.attention.merge_states(&mut encoder, &self.problem, &operands);
        done.unwrap_or_else(|e| panic!("{e}\n  {:?}", self.problem));
        queue.submit([encoder.finish()]);
        pieces.give_back(&outputs);
        target.read(device, queue, &self.problem)
    }

    /// Both shader modes on each device (with checks, all operands in one buffer), held to the oracle; gives what the last
    /// one gave.
    fn check(&self) -> Option<Out> {
        let want = self.oracle();
        let mut last = None;
        for both in gpus() {
            let [out, checked] = both.map(|gpu| self.run(gpu));
            out.hold(self, &want).unwrap_or_else(|what| panic!("{:?}: {what}", both[0].kind));
            assert_eq!(out.bits(), checked.bits(), "{:?}: run-time checks change it", both[0].kind);
            last = Some(out);
        }
        last
    }
}

/// Output buffers, poison all over.
struct Target {
    o: wgpu::Buffer,
    lse: Option<wgpu::Buffer>,
}

type Pair<'a> = (wgpu::BufferSlice<'a>, wgpu::BufferSlice<'a>);

impl Target {
    fn new(device: &wgpu::Device, problem: &MergeProblem) -> Self {
        let output = |operand, dtype| {
            let elements = (problem.extent(None, operand) as usize + GUARD).next_multiple_of(2);
            upload(device, "merged", &poison(dtype).repeat(elements), USAGE)
        };
        let lse = problem.lse.then(|| output(Operand::Lse, Dtype::F32));
        Self { o: output(Operand::O, problem.out_dtype), lse }
    }

    fn operands<'a>(&'a self, partials: &'a [Pair<'a>]) -> MergeOperands<'a> {
        MergeOperands { partials, o: self.o.slice(..), lse: self.lse.as_ref().map(|b| b.slice(..)) }
    }

    /// What was written, in logical order.
    ///
    /// # Panics
    /// When something else was written, too, or an element was not.
    fn read(&self, device: &wgpu::Device, queue: &wgpu::Queue, problem: &MergeProblem) -> Out {
        let p = problem;
        let read = |buffer: &wgpu::Buffer, dtype: Dtype, layout: Layout, shape: [usize; 4]| {
            let bytes = download(device, queue, buffer);
            let mut written = vec![false; bytes.len() / dtype.bytes()];
            indices(shape).for_each(|at| written[layout.index(at)] = true);
            for (i, element) in bytes.chunks(dtype.bytes()).enumerate() {
                match (written[i], element == poison(dtype)) {
                    (true, true) => panic!("element {i} was never written\n  {p:?}"),
                    (false, false) => panic!("gap {i} was overwritten with {element:02x?}\n  {p:?}"),
                    _ => {}
                }
            }
            let all = Tensor::from_bytes(dtype, &bytes).to_f32();
            indices(shape).map(|at| all[layout.index(at)]).collect()
        };
        let shape = [p.batch, p.heads_q, p.seq_q, p.head_dim_v];
        let lse = self.lse.as_ref().map(|buffer| {
            let shape = [p.batch, p.heads_q, p.seq_q, 1];
            read(buffer, Dtype::F32, Layout::bhsd(p.heads_q, p.seq_q, 1), shape)
        });
        Out { o: read(&self.o, p.out_dtype, p.o, shape), lse }
    }
}

/// What a merge gave, in logical order.
#[derive(Clone, Debug)]
struct Out {
    o: Vec<f32>,
    lse: Option<Vec<f32>>,
}

impl Out {
    fn bits(&self) -> Vec<u32> {
        self.o.iter().chain(self.lse.iter().flatten()).map(|x| x.to_bits()).collect()
    }

    /// Within what f32 sums of exponentials, which WGSL lets be off by a few ULP, may be wrong by.
    fn hold(&self, merge: &Merge, want: &Merged) -> Result<(), String> {
        let p = &merge.problem;
        let parts: usize = p.partials.iter().map(|of| of.parts).sum();
        // 32 parts are added up apart from the others.
        let relative = (32 + parts.min(32 + parts / 32)) as f64 * EPSILON;
        let values = merge.partials.iter().flat_map(|(o, _)| o.to_f32());
        let largest = values.filter(|x| x.is_finite()).fold(0.0_f64, |max, x| max.max(f64::from(x).abs()));
        let rounding = rounding(p.out_dtype);
        near("o", &self.o, &want.o, |want| relative * largest + rounding * (want.abs() + 1e-4))?;
        assert_eq!(self.lse.is_some(), p.lse);
        match &self.lse {
            Some(lse) => near("lse", lse, &want.lse, |want| relative * want.abs().max(1.0)),
            None => Ok(()),
        }
        .map_err(|what| format!("{what}\n  {p:?}"))
    }
}

fn rounding(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F16 => 1.0 / (1 << 11) as f64,
        Dtype::Bf16 => 1.0 / (1 << 8) as f64,
        _ => 0.0,
    }
}

fn near(what: &str, got: &[f32], want: &[f64], budget: impl Fn(f64) -> f64) -> Result<(), String> {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let got = f64::from(got);
        let fine = got == want || (got.is_nan() && want.is_nan()) || (got - want).abs() <= budget(want);
        if !fine {
            return Err(format!("{what}[{i}] is {got:e}, expected {want:e} +- {:e}", budget(want)));
        }
    }
    Ok(())
}

/// Types, widths, nestings, gaps, empty parts and empty rows, of one to three pairs.
#[test]
fn random_parts_are_merged_as_the_oracle_does() {
    hold(60, |rng| {
        Merge::draw(rng).check();
    });
}

/// The two alignments of every type, in a small form that any failure is read off from.
#[test]
fn every_type_in_and_out() {
    for (dtype, out_dtype) in FLOATS.into_iter().flat_map(|dtype| FLOATS.map(|out| (dtype, out))) {
        for (dim, pairs) in [(4, 1), (8, 2), (8, 3), (3, 1), (5, 3)] {
            let partials = vec![Partials::stacked(2, 1, 2, 3, dim); pairs];
            let problem = MergeProblem::new(partials, 1, 2, 3, dim);
            let problem = MergeProblem { dtype, out_dtype, lse: true, ..problem };
            let lse = |pair, part, [_, h, s, _]: [usize; 4]| (pair + 2 * part + h) as f32 - s as f32;
            let o = |pair, part, [_, h, s, d]: [usize; 4]| {
                (1 + pair) as f32 + (4 * part + 16 * h + 32 * s) as f32 + d as f32 / 8.0
            };
            Merge::fill(problem, lse, o).check();
        }
    }
}

/// One part is what it was: its only weight is 1. (f32 all the way: no other rounding.)
#[test]
fn one_part_comes_out_as_it_went_in() {
    let problem = MergeProblem::new(vec![Partials::stacked(3, 2, 2, 5, 7)], 2, 2, 5, 7);
    let problem = MergeProblem { lse: true, ..problem };
    let mut rng = Rng::new(fresh_seed());
    let mut values = Rng::new(rng.next());
    // Each row is in another part.
    let lse = |_, part, [_, h, s, _]: [usize; 4]| {
        let lse = 30.0 * rng.normal();
        if part == (h + s) % 3 { lse } else { f32::NEG_INFINITY }
    };
    let merge = Merge::fill(problem, lse, |_, _, _| values.normal());
    let Some(out) = merge.check() else { return };
    let (o, logs) = &merge.partials[0];
    let (o, rows) = (o.to_f32(), merge.problem.rows());
    for row in 0..rows {
        let part = (row / 5 % 2 + row % 5) % 3;
        let from = (part * rows + row) * 7;
        for d in 0..7 {
            // 1 / 1 may be off by an ULP or two on a GPU.
            let (got, want) = (out.o[row * 7 + d], o[from + d]);
            assert!((got - want).abs() <= 4.0 * f32::EPSILON * want.abs(), "{got} {want}");
        }
        let (got, want) = (out.lse.as_ref().expect("asked for")[row], logs[part * rows + row]);
        assert!((got - want).abs() <= 1e-6 * want.abs().max(1.0), "{got} {want}");
    }
}

/// No part has seen a key: exactly 0 and -inf, whatever lies in o.
#[test]
fn rows_without_a_key() {
    for dtype in FLOATS {
        for dim in [3, 8] {
            let partials = vec![Partials::stacked(2, 1, 2, 3, dim), Partials::stacked(1, 1, 2, 3, dim)];
            let problem = MergeProblem { lse: true, ..MergeProblem::new(partials, 1, 2, 3, dim) };
            let empty = |_, _, _| f32::NEG_INFINITY;
            let Some(out) = Merge::fill(problem.with_dtype(dtype), empty, |_, _, _| 0.0).check() else {
                return;
            };
            assert!(out.o.iter().all(|&x| x == 0.0), "{out:?}");
            assert!(out.lse.iter().flatten().all(|&x| x == f32::NEG_INFINITY), "{out:?}");
        }
    }
}

/// What is not finite in one row changes no bit of another; in an lse it takes the row, in o its element.
#[test]
fn nan_stays_in_its_row() {
    for (dtype, dim) in FLOATS.into_iter().flat_map(|dtype| [(dtype, 5), (dtype, 8)]) {
        let partials = vec![Partials::stacked(2, 2, 1, 4, dim), Partials::stacked(1, 2, 1, 4, dim)];
        let problem =
            MergeProblem { lse: true, ..MergeProblem::new(partials, 2, 1, 4, dim) }.with_dtype(dtype);
        let mut rng = Rng::new(fresh_seed());
        let mut values = Rng::new(rng.next());
        let clean = Merge::fill(problem, |_, _, _| rng.normal(), |_, _, _| values.normal());
        let Some(before) = clean.check() else { return };
        let row = 6;
        for (at, part) in [(0, 0), (0, 1), (1, 0)] {
            for bad in [f32::NAN, f32::INFINITY] {
                let mut spoiled = clean.clone();
                spoiled.partials[at].1[part * 8 + row] = bad;
                let out = spoiled.check().expect("there was one before");
                for (i, (x, y)) in out.o.iter().zip(&before.o).enumerate() {
                    assert!(if i / dim == row { x.is_nan() } else { x == y }, "o[{i}] is {x}, was {y}");
                }
                for (i, (x, y)) in out.lse.iter().flatten().zip(before.lse.iter().flatten()).enumerate() {
                    assert!(if i == row { x.is_nan() } else { x == y }, "lse[{i}] is {x}, was {y}");
                }
            }
            let mut spoiled = clean.clone();
            spoiled.partials[at].0.set((part * 8 + row) * dim + 2, f32::NAN);
            let out = spoiled.check().expect("there was one before");
            for (i, (x, y)) in out.o.iter().zip(&before.o).enumerate() {
                assert!(if i == row * dim + 2 { x.is_nan() } else { x == y }, "o[{i}] is {x}, was {y}");
            }
            assert_eq!(out.lse, before.lse);
            // The same NaN where that part has seen no key is nothing.
            spoiled.partials[at].1[part * 8 + row] = f32::NEG_INFINITY;
            let out = spoiled.check().expect("there was one before");
            assert!(out.o.iter().chain(out.lse.iter().flatten()).all(|x| x.is_finite()), "{out:?}");
        }
    }
}

/// Logarithms as far apart as f32 goes.
#[test]
fn distant_logarithms() {
    let logs = [-3.4028235e38_f32, 3e38, -1e4, -1e4, 88.0, -88.0, f32::NEG_INFINITY, -3.4028235e38];
    let problem = MergeProblem::new(vec![Partials::stacked(2, 1, 1, 4, 4)], 1, 1, 4, 4);
    let problem = MergeProblem { lse: true, ..problem };
    let lse = |_, part, [_, _, s, _]: [usize; 4]| logs[2 * s + part];
    Merge::fill(problem, lse, |_, part, [_, _, s, d]| (part + 2 * s + d) as f32).check();
}

/// As many parts as there may be, which is as often as a thread may loop.
#[test]
fn many_parts() {
    let parts = 1 << 14;
    let partials = vec![Partials::stacked(parts - 7, 1, 1, 2, 4), Partials::stacked(7, 1, 1, 2, 4)];
    let problem = MergeProblem { lse: true, ..MergeProblem::new(partials, 1, 1, 2, 4) };
    let mut rng = Rng::new(fresh_seed());
    let mut values = Rng::new(rng.next());
    Merge::fill(problem, |_, _, _| rng.normal(), |_, _, _| values.normal()).check();
}

/// Rounding of sums whose terms are all alike goes one way: it must not grow with the number of parts.
#[test]
fn equal_parts() {
    for parts in [33, 256, 1024] {
        let problem = MergeProblem::new(vec![Partials::stacked(parts, 1, 1, 1, 4)], 1, 1, 1, 4);
        let problem = MergeProblem { lse: true, ..problem };
        Merge::fill(problem.clone(), |_, _, _| 0.0, |_, _, _| 0.1).check();
        let one = |_, part, _: [usize; 4]| if part == 0 { 0.0 } else { -2.3 };
        Merge::fill(problem, one, |_, _, _| 0.3).check();
    }
}

/// More workgroups than fit one dimension of a dispatch.
#[test]
fn many_rows() {
    let (heads, seq) = (3, 1_400_003);
    let problem = MergeProblem::new(vec![Partials::stacked(2, 1, heads, seq, 1)], 1, heads, seq, 1);
    let problem = MergeProblem { lse: true, ..problem };
    assert!(problem.rows() > 64 * 65535);
    for gpu in gpus().into_iter().map(|[gpu, _]| gpu) {
        let rows = problem.rows();
        let o: Vec<f32> = (0..2 * rows).map(|i| (i % 1021) as f32).collect();
        let merge =
            Merge { problem: problem.clone(), partials: vec![(Tensor::F32(o.clone()), vec![1.5; 2 * rows])] };
        let out = merge.run(gpu);
        for (row, got) in out.o.iter().enumerate() {
            let want = (o[row] + o[rows + row]) / 2.0;
            assert!((got - want).abs() <= 1e-6 * want, "row {row} is {got}, expected {want}");
        }
        let lse = 1.5 + 2.0_f32.ln();
        assert!(out.lse.iter().flatten().all(|got| (got - lse).abs() < 1e-6));
    }
}

#[test]
fn nothing_to_merge() {
    for gpu in gpus().into_iter().flatten() {
        for (batch, seq) in [(0, 4), (2, 0)] {
            let problem = MergeProblem::new(vec![Partials::stacked(2, batch, 2, seq, 8)], batch, 2, seq, 8);
            let merge = Merge::fill(problem, |_, _, _| 0.0, |_, _, _| 0.0);
            assert!(merge.run(gpu).o.is_empty());
            let buffers = merge.upload(gpu.attention.device());
            let pairs: Vec<_> = buffers.iter().map(|(o, lse)| (o.slice(..), lse.slice(..))).collect();
            let target = Target::new(gpu.attention.device(), &merge.problem);
            let prepared = gpu.attention.prepare_merge(&merge.problem, &target.operands(&pairs));
            assert!(prepared.expect("valid").is_empty());
        }
    }
}

/// The same case with other keys: `seq_kv` of them from `first` on.
fn keys(case: &Case, first: usize, seq_kv: usize) -> Case {
    let mut part = case.clone();
    let p = &mut part.problem;
    p.seq_kv = seq_kv;
    p.k.offset += first * p.k.strides[2];
    p.v.offset += first * p.v.strides[2];
    part.name = format!("keys {first}.. of {}", case.name);
    part
}

/// Attention over a part of the keys, as partial results on the device.
struct Part {
    guarded: Guarded,
}

impl Part {
    fn record(attention: &Attention, encoder: &mut wgpu::CommandEncoder, case: &Case) -> Self {
        let guarded = Guarded::new(attention.device(), case);
        let plan = attention.plan(&guarded.problem).expect("served");
        attention.encode(encoder, &plan, &guarded.operands()).expect("served");
        Self { guarded }
    }

    fn pair(&self) -> Pair<'_> {
        (self.guarded.o.slice(..), self.guarded.operands().lse.expect("asked for"))
    }
}

/// Holds what merging gave against the oracle of the whole. A part's lse is off by its budget, and so are
/// the weights that it merges with; its o was rounded once more to `part_dtype`.
#[track_caller]
fn whole(case: &Case, part_dtype: Dtype, out: &Out) {
    let (p, expected) = (&case.problem, Expected::of(case));
    let largest = expected.oracle.max_value;
    let merged = 2.0 * expected.o + 4.0 * expected.lse * largest + rounding(part_dtype) * largest;
    let rounding = rounding(p.out_dtype);
    let o = near("o", &out.o, &expected.oracle.o, |want| merged + rounding * (want.abs() + 1e-4));
    let score = expected.oracle.max_score.max(1.0);
    let lse = out.lse.as_ref().expect("asked for");
    let lse = near("lse", lse, &expected.oracle.lse, |want| {
        2.0 * expected.lse * (want.abs() / score).max(1.0) + 1e-6 * score
    });
    if let Err(what) = o.and(lse) {
        panic!("{what}\n  {}", case.name);
    }
}

/// Sizes that cross a tile edge somewhere, quick enough for the oracle.
fn draw(rng: &mut Rng) -> Axes {
    Axes {
        batch: 1 + rng.below(2),
        heads: rng.pick(&[(1, 1), (2, 2), (4, 2), (3, 1)]),
        seq_q: 1 + rng.below(40),
        seq_kv: 1 + rng.below(140),
        head_dim: 1 + rng.below(40),
        head_dim_v: rng.pick(&[1, 3, 8, 17, 32, 50, 64]),
        storage: rng.pick(&[Storage::Bhsd, Storage::Bshd, Storage::Odd, Storage::Padded]),
        spread: rng.pick(&[1.0, 4.0]),
        ..Axes::default()
    }
}

/// Any split of the keys merges to the whole, all of it in one submission; more parts than pairs are merged
/// in two rounds.
#[test]
fn a_split_of_the_keys_merges_to_the_whole() {
    for gpu in gpus().into_iter().flatten() {
        for (dtype, part_dtype) in [
            (Dtype::F32, Dtype::F32),
            (Dtype::F16, Dtype::F32),
            (Dtype::F16, Dtype::F16),
            (Dtype::Bf16, Dtype::F32),
            (Dtype::Bf16, Dtype::Bf16),
        ] {
            hold(1, |rng| {
                let case = Axes { dtype, out_dtype: dtype, ..draw(rng) }.build(rng.next());
                let (attention, p) = (&gpu.attention, &case.problem);
                // Four parts; with few keys some have none.
                let mut cuts = vec![0, p.seq_kv];
                cuts.extend((0..3).map(|_| rng.below(p.seq_kv + 1)));
                cuts.sort_unstable();
                let device = attention.device();
                let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
                let parts: Vec<Part> = cuts
                    .windows(2)
                    .map(|cut| {
                        let mut part = keys(&case, cut[0], cut[1] - cut[0]);
                        part.problem.out_dtype = part_dtype;
                        Part::record(attention, &mut encoder, &part)
                    })
                    .collect();
                let merge = |of: Vec<Partials>| {
                    let merge = MergeProblem::new(of, p.batch, p.heads_q, p.seq_q, p.head_dim_v);
                    MergeProblem { dtype: part_dtype, lse: true, ..merge }
                };
                // The first three, then what came of them with the fourth.
                let of: Vec<_> = parts.iter().map(|part| Partials::of(&part.guarded.problem)).collect();
                let first = merge(of[..3].to_vec());
                let first = MergeProblem { out_dtype: part_dtype, ..first };
                let second = Partials { o: first.o, ..Partials::of(p) };
                let second = merge(vec![of[3], second]);
                let second = MergeProblem { out_dtype: p.out_dtype, o: p.o, ..second };
                let (between, target) = (Target::new(device, &first), Target::new(device, &second));
                let pairs: Vec<_> = parts.iter().map(Part::pair).collect();
                let operands = between.operands(&pairs[..3]);
                attention.merge_states(&mut encoder, &first, &operands).expect("served");
                let lse = between.lse.as_ref().expect("asked for");
                let pairs = [pairs[3], (between.o.slice(..), lse.slice(..))];
                attention.merge_states(&mut encoder, &second, &target.operands(&pairs)).expect("served");
                attention.queue().submit([encoder.finish()]);
                whole(&case, part_dtype, &target.read(device, attention.queue(), &second));
            });
        }
    }
}

/// A prefix that all sequences share is attended once, as one batch entry with all their queries, and merged
/// with what each finds in its own tail.
#[test]
fn a_shared_prefix_is_attended_once() {
    for gpu in gpus().into_iter().flatten() {
        hold(1, |rng| {
            let (batch, seq_q, prefix, tail) = (3, 4, 37, 9);
            let axes = Axes {
                batch,
                heads: (4, 2),
                seq_q,
                seq_kv: prefix + tail,
                head_dim: 24,
                head_dim_v: 20,
                causal: Some(Align::BottomRight),
                storage: Storage::Bshd,
                ..Axes::default()
            };
            let mut case = axes.build(rng.next());
            let p = case.problem.clone();
            // Every sequence begins with the keys of the first.
            for (x, layout, width) in
                [(&mut case.data.k, p.k, p.head_dim), (&mut case.data.v, p.v, p.head_dim_v)]
            {
                let mut shared = (**x).clone();
                for [b, h, j, d] in indices([batch, p.heads_kv, prefix, width]) {
                    shared
                        .set(layout.index([b, h, j, d]), x.as_ref().as_ref().get(layout.index([0, h, j, d])));
                }
                *x = shared.into();
            }
            let (attention, device) = (&gpu.attention, gpu.attention.device());
            let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            let mut once = keys(&case, 0, prefix);
            (once.problem.batch, once.problem.seq_q, once.problem.causal) = (1, batch * seq_q, None);
            let once = Part::record(attention, &mut encoder, &once);
            let own = Part::record(attention, &mut encoder, &keys(&case, prefix, tail));

            let shared = Partials {
                o: Layout::bshd(4, seq_q, 20).at(once.guarded.problem.o.offset),
                lse: Layout { offset: 0, strides: [seq_q, batch * seq_q, 1, 1] },
                ..Partials::stacked(1, batch, 4, seq_q, 20)
            };
            let of = vec![shared, Partials::of(&own.guarded.problem)];
            let problem = MergeProblem { lse: true, ..MergeProblem::new(of, batch, 4, seq_q, 20) };
            let target = Target::new(device, &problem);
            let pairs = [once.pair(), own.pair()];
            attention.merge_states(&mut encoder, &problem, &target.operands(&pairs)).expect("served");
            attention.queue().submit([encoder.finish()]);
            whole(&case, Dtype::F32, &target.read(device, attention.queue(), &problem));
        });
    }
}

/// Parts of the keys as batch entries of one call: all of them in one pair of buffers. Prepared together with
/// the merge, and recorded twice into a pass of the caller's.
#[test]
fn parts_as_batch_entries() {
    for gpu in gpus().into_iter().flatten() {
        hold(1, |rng| {
            let (parts, chunk, last) = (5, 16, 11);
            let seq_kv = (parts - 1) * chunk + last;
            let axes = Axes { heads: (3, 1), seq_q: 6, seq_kv, head_dim_v: 12, ..Axes::default() };
            let case = axes.build(rng.next());
            let mut split = case.clone();
            let p = &mut split.problem;
            (p.batch, p.seq_kv, p.kv_lens) = (parts, chunk, true);
            p.q.strides[0] = 0;
            p.k.strides[0] = chunk * p.k.strides[2];
            p.v.strides[0] = chunk * p.v.strides[2];
            p.o = Layout::bhsd(3, 6, 12);
            let mut lens = vec![chunk as u32; parts];
            lens[parts - 1] = last as u32;
            split.data.kv_lens = Some(lens);
            // The last entry's layout reaches beyond the keys that there are.
            for x in [&mut split.data.k, &mut split.data.v] {
                let mut longer = x.to_f32();
                longer.resize(longer.len() + chunk * 16, f32::NAN);
                *x = Tensor::F32(longer).into();
            }
            let (attention, device) = (&gpu.attention, gpu.attention.device());
            let guarded = Guarded::new(device, &split);
            let plan = attention.plan(&guarded.problem).expect("served");
            let stacked = Partials { o: guarded.problem.o, ..Partials::stacked(parts, 1, 3, 6, 12) };
            let problem = MergeProblem { lse: true, ..MergeProblem::new(vec![stacked], 1, 3, 6, 12) };
            let target = Target::new(device, &problem);
            let pairs = [(guarded.o.slice(..), guarded.operands().lse.expect("asked for"))];
            let merge = attention.prepare_merge(&problem, &target.operands(&pairs)).expect("served");
            assert_eq!(merge.dispatches(), 1);
            let work = attention.prepare(&plan, &guarded.operands()).expect("served").then(merge);
            for _ in 0..2 {
                let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
                work.encode_in_pass(&mut encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default()));
                attention.queue().submit([encoder.finish()]);
                whole(&case, Dtype::F32, &target.read(device, attention.queue(), &problem));
            }
        });
    }
}

/// Two pairs of one part each.
fn problem() -> MergeProblem {
    let pair = Partials::stacked(1, 2, 3, 4, 8);
    MergeProblem { lse: true, ..MergeProblem::new(vec![pair, pair], 2, 3, 4, 8) }
}

#[test]
fn invalid_problems() {
    let [mut none, mut four, mut zero, mut many, mut far, mut wide] = std::array::from_fn(|_| problem());
    none.partials.clear();
    four.partials.resize(4, four.partials[0]);
    zero.partials[1].parts = 0;
    many.partials[0].parts = 1 << 14;
    far.partials[1].lse.offset = 1 << 33;
    (wide.partials[0].parts, wide.partials[0].o_step) = (3, usize::MAX);
    let partials = |at, error| Error::Partials { at, error: Box::new(error) };
    let too_large = |what: &str, got, max| Error::TooLarge { what: what.into(), got, max };
    let most = u64::from(u32::MAX);
    let (operand, shape, strides) = (Operand::O, [2, 3, 4, 8], [96, 32, 8, 0]);
    for (p, error) in [
        (none, Error::ZeroSize { what: "partials" }),
        (zero, partials(1, Error::ZeroSize { what: "parts" })),
        (MergeProblem { heads_q: 0, ..problem() }, Error::ZeroSize { what: "heads_q" }),
        (MergeProblem { head_dim_v: 0, ..problem() }, Error::ZeroSize { what: "head_dim_v" }),
        (four, too_large("partials", 4, 3)),
        (many, too_large("parts", (1 << 14) + 1, 1 << 14)),
        (MergeProblem { batch: usize::MAX, ..problem() }, too_large("batch", usize::MAX as u128, 1 << 28)),
        (
            MergeProblem { batch: 1 << 20, seq_q: 1 << 20, ..problem() },
            too_large("batch * heads_q * seq_q", 3 << 40, most),
        ),
        (far, partials(1, too_large("lse's last element index", (1 << 33) + 24, most))),
        (wide, partials(0, too_large("o's last element index", 192 + 2 * usize::MAX as u128, most))),
        (
            MergeProblem { o: Layout { offset: 0, strides }, ..problem() },
            Error::Overlaps { operand, shape, strides },
        ),
    ] {
        assert_eq!(p.validate(), Err(error.clone()), "{p:?}");
        assert_eq!(merge_states(&p, &[]), Err(error));
    }
    // Offsets and steps that would overflow are no panic.
    let mut worst = problem();
    worst.partials[0] = Partials {
        parts: 9,
        o: Layout { offset: usize::MAX, strides: [usize::MAX; 4] },
        o_step: usize::MAX,
        lse: Layout { offset: usize::MAX, strides: [usize::MAX; 4] },
        lse_step: usize::MAX,
    };
    assert!(matches!(worst.validate(), Err(Error::Partials { at: 0, .. })));
}

#[test]
fn bad_buffers() {
    for gpu in gpus().into_iter().flatten() {
        let (device, queue) = (gpu.attention.device(), gpu.attention.queue());
        let of = |elements: usize, usage| upload(device, "a buffer", &vec![0; 4 * elements], usage);
        let (o, lse) = ([0, 1].map(|_| of(192, USAGE)), [0, 1].map(|_| of(24, USAGE)));
        let pairs = [0, 1].map(|i| (o[i].slice(..), lse[i].slice(..)));
        let target = Target::new(device, &problem());
        let good = target.operands(&pairs);
        let refused = |problem: &MergeProblem, operands: MergeOperands<'_>| -> Error {
            let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            let error = gpu.attention.merge_states(&mut encoder, problem, &operands).expect_err("it passed");
            assert_eq!(gpu.attention.prepare_merge(problem, &operands).err(), Some(error.clone()));
            queue.submit([encoder.finish()]);
            error
        };
        let partials = |at, error| Error::Partials { at, error: Box::new(error) };
        let p = problem();

        let invalid = MergeProblem { heads_q: 0, ..problem() };
        assert_eq!(refused(&invalid, good), Error::ZeroSize { what: "heads_q" });
        let missing = Error::MissingOperand { operand: Operand::O };
        assert_eq!(refused(&p, MergeOperands { partials: &pairs[..1], ..good }), partials(1, missing));
        let surplus = Error::UnexpectedOperand { operand: Operand::O };
        let three = [pairs[0], pairs[1], pairs[1]];
        assert_eq!(refused(&p, MergeOperands { partials: &three, ..good }), partials(2, surplus));
        let missing = Error::MissingOperand { operand: Operand::Lse };
        assert_eq!(refused(&p, MergeOperands { lse: None, ..good }), missing);
        let surplus = Error::UnexpectedOperand { operand: Operand::Lse };
        assert_eq!(refused(&MergeProblem { lse: false, ..problem() }, good), surplus);

        // Without the usage, and one word short: each operand.
        let (need, got) = (wgpu::BufferUsages::STORAGE, wgpu::BufferUsages::COPY_SRC);
        let useless = [of(192, got), of(24, got)];
        let short = [of(191, USAGE), of(23, USAGE)];
        for (i, (operand, words)) in [(Operand::O, 192), (Operand::Lse, 24)].into_iter().enumerate() {
            let usage = Error::BufferUsage { operand, need, got };
            let (need, got, unit, container) = (4 * words, 4 * words - 4, "bytes", "buffer");
            let bounds = Error::OutOfBounds { operand, need, got, unit, container };
            for (bad, error) in [(useless[i].slice(..), usage), (short[i].slice(..), bounds)] {
                let pair = if i == 0 { (bad, pairs[1].1) } else { (pairs[1].0, bad) };
                let with = MergeOperands { partials: &[pairs[0], pair], ..good };
                assert_eq!(refused(&p, with), partials(1, error.clone()));
                let with = if i == 0 {
                    MergeOperands { o: bad, ..good }
                } else {
                    MergeOperands { lse: Some(bad), ..good }
                };
                assert_eq!(refused(&p, with), error);
            }
        }
        // The end of the last part counts.
        let mut two = problem();
        two.partials[0] = Partials::stacked(2, 2, 3, 4, 8);
        let bounds = Error::OutOfBounds {
            operand: Operand::O,
            need: 1536,
            got: 768,
            unit: "bytes",
            container: "buffer",
        };
        assert_eq!(refused(&two, good), partials(0, bounds));

        // An output in the place of a part, or of the other output.
        let aliased = |operand, with| Error::Aliased { operand, with };
        assert_eq!(
            refused(&p, MergeOperands { o: pairs[1].0, ..good }),
            partials(1, aliased(Operand::O, Operand::O))
        );
        assert_eq!(
            refused(&p, MergeOperands { lse: Some(pairs[0].1.slice(..)), ..good }),
            partials(0, aliased(Operand::Lse, Operand::Lse))
        );
        assert_eq!(
            refused(&p, MergeOperands { lse: Some(target.o.slice(..)), ..good }),
            aliased(Operand::O, Operand::Lse)
        );
        // Parts may share theirs.
        let shared = MergeOperands { partials: &[pairs[0], pairs[0]], ..good };
        assert!(gpu.attention.prepare_merge(&p, &shared).is_ok());

        // Nothing has been recorded so far.
        for (buffer, dtype) in
            [(&target.o, p.out_dtype), (target.lse.as_ref().expect("asked for"), Dtype::F32)]
        {
            let bytes = download(device, queue, buffer);
            assert!(bytes.chunks(dtype.bytes()).all(|x| x == poison(dtype)));
        }
        // A binding beyond what the device allows.
        if gpu.kind == Kind::Minimal {
            let (heads, dim) = (1 << 10, 1 << 10);
            let huge = MergeProblem::new(vec![Partials::stacked(33, 1, heads, 1, dim)], 1, heads, 1, dim);
            let buffer = device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("huge"),
                size: 33 << 22,
                usage: USAGE,
                mapped_at_creation: false,
            });
            let logs = of(33 << 10, USAGE);
            let o = of(1 << 20, USAGE);
            let operands =
                MergeOperands { partials: &[(buffer.slice(..), logs.slice(..))], o: o.slice(..), lse: None };
            let what = "o: bytes of one storage binding".into();
            let error = Error::LimitExceeded { what, need: 33 << 22, got: 128 << 20 };
            assert_eq!(refused(&huge, operands), partials(0, error));
        }
        let error = partials(1, Error::MissingOperand { operand: Operand::Lse });
        assert_eq!(
            error.to_string(),
            "partial results 1: lse: the problem asks for it, the call did not bring it"
        );
    }
}

/// A merge whose device is lost is an error, and no panic.
#[test]
fn lost_device() {
    if gpus().is_empty() {
        return;
    }
    let attention = pollster::block_on(Attention::request(&gpu::request())).expect("there was one before");
    let device = attention.device();
    let o = upload(device, "o", &[0; 4 * 192], USAGE);
    let lse = upload(device, "lse", &[0; 4 * 24], USAGE);
    let target = Target::new(device, &problem());
    let pairs = [(o.slice(..), lse.slice(..)); 2];
    device.destroy();
    let error = attention.prepare_merge(&problem(), &target.operands(&pairs)).expect_err("lost");
    assert!(matches!(error, Error::DeviceLost { .. }), "{error:?}");
}

/// What attention writes with this problem is what [`Partials::of`] reads, also where o is not contiguous and where
/// queries are ragged.
#[test]
fn what_attention_writes_is_a_part() {
    for gpu in gpus().into_iter().flatten() {
        let padded = Axes { batch: 3, heads: (2, 1), storage: Storage::Odd, ..Axes::default() }.build(7);
        let to = Move { kept: Kept::Plain, kv_dtype: None, heads_first: true, ragged_q: true };
        let ragged = padded.moved(to, 7);
        assert!(ragged.problem.total_q.is_some_and(|total| total != ragged.problem.seq_q));
        for case in [padded, ragged] {
            let (attention, device) = (&gpu.attention, gpu.attention.device());
            let guarded = Guarded::new(device, &case);
            let g: &AttentionProblem = &guarded.problem;
            let operands: Operands<'_> = guarded.operands();
            let merge = MergeProblem { lse: true, ..MergeProblem::of(g, vec![Partials::of(g)]) };
            let target = Target::new(device, &merge);
            let pairs = [(operands.o, operands.lse.expect("asked for"))];
            let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            attention.encode(&mut encoder, &attention.plan(g).expect("served"), &operands).expect("served");
            attention.merge_states(&mut encoder, &merge, &target.operands(&pairs)).expect("served");
            attention.queue().submit([encoder.finish()]);
            whole(&case, Dtype::F32, &target.read(device, attention.queue(), &merge));
        }
    }
}
