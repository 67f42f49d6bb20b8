//! Linear maps: every kernel against the f64 oracle, over the edges of its tiles, element types, layouts and
//! both orders of W, on each kind of device, with and without the shaders' run-time checks, which must give
//! the same bits.

mod common;

use std::hash::{DefaultHasher, Hash, Hasher};

use common::check::poison;
use common::gpu::{self, Gpu, Kind, USAGE, download, upload};
use common::pool::Pieces;
use common::rng::{Rng, fresh_seed, slice};
use wgpu_attention::reference::{LinearReference, linear};
use wgpu_attention::{
    Attention, Bias, Dtype, Error, Layout, LinearInputs, LinearKernel, LinearOperands, LinearProblem,
    Operand, Tensor,
};

const FLOATS: [Dtype; 3] = Dtype::FLOATS;
/// Elements of poison after every operand.
const GUARD: usize = 64;

/// Both kinds of device, without run-time checks and with them.
fn gpus() -> Vec<[&'static Gpu; 2]> {
    let kinds = [Kind::Full, Kind::Minimal].into_iter();
    kinds.filter_map(|kind| Some([gpu::get(kind, false)?, gpu::get(kind, true)?])).collect()
}

/// The kernels that some device here has.
fn kernels() -> Vec<LinearKernel> {
    let gpus = gpus();
    let mut all = LinearKernel::ALL.to_vec();
    all.retain(|&kernel| gpus.iter().all(|[gpu, _]| gpu.kind == Kind::Minimal || !lacks(kernel, gpu)));
    all
}

fn lacks(kernel: LinearKernel, gpu: &Gpu) -> bool {
    kernel.lacks(gpu.attention.caps()).is_some()
}

/// The problem by a kernel, in types that it multiplies.
fn by(kernel: Option<LinearKernel>, problem: LinearProblem) -> LinearProblem {
    let p = LinearProblem { kernel, ..problem };
    match kernel {
        Some(LinearKernel::Matrix) => LinearProblem { dtype: Dtype::F16, weight_dtype: Dtype::F16, ..p },
        _ => p,
    }
}

/// Runs a law on numbers from a seed of its own, which a failure prints.
fn hold(law: impl FnOnce(&mut Rng)) {
    let seed = fresh_seed();
    let mut rng = Rng::new(seed);
    let run = std::panic::AssertUnwindSafe(|| law(&mut rng));
    if let Err(panic) = std::panic::catch_unwind(run) {
        eprintln!("broken with WGPU_ATTENTION_SEED={seed:#x}");
        std::panic::resume_unwind(panic);
    }
}

/// A linear map and its data. What no element of an operand lies on is NaN.
#[derive(Clone, Debug)]
struct Map {
    problem: LinearProblem,
    x: Tensor,
    w: Tensor,
    bias: Option<Tensor>,
}

impl Map {
    fn draw(problem: LinearProblem, rng: &mut Rng) -> Self {
        Self::fill(problem, || rng.normal())
    }

    fn fill(problem: LinearProblem, mut next: impl FnMut() -> f32) -> Self {
        problem.validate().unwrap_or_else(|e| panic!("{e}: {problem:?}"));
        let p = problem;
        let mut tensor = |layout: Layout, dtype, [rows, columns]: [usize; 2]| {
            let reach = layout.extent([1, 1, rows, columns]) as usize + GUARD;
            let mut all = Tensor::from_f32(dtype, &vec![f32::NAN; reach]);
            for (row, column) in places([rows, columns]) {
                all.set(layout.index([0, 0, row, column]), next());
            }
            all
        };
        let x = tensor(p.x, p.dtype, [p.rows, p.inputs]);
        let w = tensor(p.w, p.weight_dtype, [p.outputs, p.inputs]);
        let bias = p.bias.map(|bias| tensor(bias.layout, bias.dtype, [p.rows, p.outputs]));
        Self { problem, x, w, bias }
    }

    fn inputs(&self) -> LinearInputs<'_> {
        LinearInputs { x: self.x.as_ref(), w: self.w.as_ref(), bias: self.bias.as_ref().map(Tensor::as_ref) }
    }

    fn oracle(&self) -> LinearReference {
        linear(&self.problem, &self.inputs()).expect("a valid map")
    }

    fn run(&self, gpu: &Gpu) -> Vec<f32> {
        let (device, queue) = (gpu.attention.device(), gpu.attention.queue());
        let buffers = Buffers::new(device, self);
        let all: Vec<_> = [&buffers.y, &buffers.x, &buffers.w].into_iter().chain(&buffers.bias).collect();
        let pieces = Pieces::new(gpu, all, gpu.checks);
        let operands = LinearOperands {
            bias: buffers.bias.as_ref().map(|_| pieces.slice(3)),
            ..LinearOperands::new(pieces.slice(1), pieces.slice(2), pieces.slice(0))
        };
        let mut encoder = device.create_command_encoder(&Default::default());
        let done = gpu.attention.encode_linear(&mut encoder, &self.problem, &operands);
        done.unwrap_or_else(|e| panic!("{e}\n  {:?}", self.problem));
        queue.submit([encoder.finish()]);
        pieces.give_back(&[0]);
        buffers.read(gpu, &self.problem)
    }

    /// Both shader modes on one kind of device or the other, by turns (with checks, all operands in one buffer), and the
    /// CPU path, held to the oracle; gives what the device gave.
    fn check(&self) -> Option<Vec<f32>> {
        self.check_within(1.0)
    }

    /// A number of the problem's own.
    fn turn(&self) -> usize {
        let mut hasher = DefaultHasher::new();
        self.problem.hash(&mut hasher);
        hasher.finish() as usize
    }

    /// The same with a wider budget.
    fn check_within(&self, factor: f64) -> Option<Vec<f32>> {
        let mut want = self.oracle();
        want.scale.iter_mut().for_each(|scale| *scale *= factor);
        #[cfg(feature = "cpu")]
        self.check_cpu(&want);
        let mut last = None;
        let mut gpus = gpus();
        gpus.retain(|[gpu, _]| !self.problem.kernel.is_some_and(|kernel| lacks(kernel, gpu)));
        // Each compiles anew, which takes longer than all the rest.
        if let Some(both) = gpus.get(self.turn() % gpus.len().max(1)) {
            let [y, checked] = both.map(|gpu| self.run(gpu));
            near(&self.problem, &y, &want).unwrap_or_else(|what| panic!("{:?}: {what}", both[0].kind));
            assert_eq!(
                bits(&y),
                bits(&checked),
                "{:?}: run-time checks change it\n  {:?}",
                both[0].kind,
                self.problem
            );
            last = Some(y);
        }
        last
    }
}

#[cfg(feature = "cpu")]
impl Map {
    /// The CPU path, into poison and into new memory.
    fn check_cpu(&self, want: &LinearReference) {
        let p = &self.problem;
        let reach = p.y.extent([1, 1, p.rows, p.outputs]) as usize;
        let mut into = Tensor::from_bytes(p.out_dtype, &poison(p.out_dtype).repeat(reach + GUARD));
        wgpu_attention::cpu::linear_into(p, &self.inputs(), &mut into).expect("a valid map");
        let y = logical(into.as_ref().bytes(), &[*p]).remove(0);
        near(p, &y, want).unwrap_or_else(|what| panic!("on the CPU: {what}"));
        let new = wgpu_attention::cpu::linear(p, &self.inputs()).expect("a valid map");
        assert_eq!(new.as_ref().len(), reach);
        let at = |(row, n)| new.as_ref().get(p.y.index([0, 0, row, n]));
        assert_eq!(bits(&y), bits(&places([p.rows, p.outputs]).map(at).collect::<Vec<_>>()));
    }
}

fn places([rows, columns]: [usize; 2]) -> impl Iterator<Item = (usize, usize)> {
    (0..rows * columns).map(move |i| (i / columns, i % columns))
}

fn bits(y: &[f32]) -> Vec<u32> {
    y.iter().map(|y| y.to_bits()).collect()
}

fn near(p: &LinearProblem, got: &[f32], want: &LinearReference) -> Result<(), String> {
    assert_eq!(got.len(), want.y.len());
    for (i, (&got, &y)) in got.iter().zip(&want.y).enumerate() {
        let (got, budget) = (f64::from(got), want.tolerance(p, i));
        let fine = got == y || (got.is_nan() && y.is_nan()) || (got - y).abs() <= budget;
        if !fine {
            let (row, output) = (i / p.outputs, i % p.outputs);
            return Err(format!("y[{row}, {output}] is {got:e}, expected {y:e} +- {budget:e}\n  {p:?}"));
        }
    }
    Ok(())
}

/// A map's buffers; y is poison all over.
struct Buffers {
    x: wgpu::Buffer,
    w: wgpu::Buffer,
    bias: Option<wgpu::Buffer>,
    y: wgpu::Buffer,
}

impl Buffers {
    fn new(device: &wgpu::Device, map: &Map) -> Self {
        let input = |name, x: &Tensor| upload(device, name, x.as_ref().bytes(), USAGE);
        Self {
            x: input("x", &map.x),
            w: input("w", &map.w),
            bias: map.bias.as_ref().map(|bias| input("bias", bias)),
            y: target(device, &map.problem),
        }
    }

    fn operands(&self) -> LinearOperands<'_> {
        LinearOperands {
            bias: self.bias.as_ref().map(|b| b.slice(..)),
            ..LinearOperands::new(self.x.slice(..), self.w.slice(..), self.y.slice(..))
        }
    }

    fn read(&self, gpu: &Gpu, problem: &LinearProblem) -> Vec<f32> {
        read(gpu, &self.y, &[*problem]).remove(0)
    }
}

/// Poison for a y.
fn target(device: &wgpu::Device, p: &LinearProblem) -> wgpu::Buffer {
    let elements = p.y.extent([1, 1, p.rows, p.outputs]) as usize + GUARD;
    upload(device, "y", &poison(p.out_dtype).repeat(elements.next_multiple_of(2)), USAGE)
}

/// What maps with outputs of one type have written into a buffer, `[rows, outputs]` for each.
///
/// # Panics
/// When something else was written, too, or an element was not.
fn read(gpu: &Gpu, y: &wgpu::Buffer, problems: &[LinearProblem]) -> Vec<Vec<f32>> {
    logical(&download(gpu.attention.device(), gpu.attention.queue(), y), problems)
}

/// The same from a tensor's bytes.
fn logical(bytes: &[u8], problems: &[LinearProblem]) -> Vec<Vec<f32>> {
    let dtype = problems[0].out_dtype;
    let mut written = vec![false; bytes.len() / dtype.bytes()];
    for p in problems {
        places([p.rows, p.outputs]).for_each(|(row, n)| written[p.y.index([0, 0, row, n])] = true);
    }
    for (i, element) in bytes.chunks(dtype.bytes()).enumerate() {
        match (written[i], element == poison(dtype)) {
            (true, true) => panic!("element {i} was never written\n  {problems:?}"),
            (false, false) => panic!("gap {i} was overwritten with {element:02x?}\n  {problems:?}"),
            _ => {}
        }
    }
    let all = Tensor::from_bytes(dtype, bytes).to_f32();
    let one = |p: &LinearProblem| {
        let y = p.y;
        places([p.rows, p.outputs]).map(|(row, n)| all[y.index([0, 0, row, n])]).collect()
    };
    problems.iter().map(one).collect()
}

/// Around the edges of tiles: each kernel, and the one that the device would take.
#[test]
fn shapes_around_tile_edges() {
    let shapes = [
        [1, 1, 1],
        [1, 64, 64],
        [2, 257, 257],
        [3, 4, 15],
        [4, 16, 17],
        [7, 129, 65],
        [8, 128, 36],
        [9, 256, 260],
        [15, 17, 16],
        [16, 63, 64],
        [16, 257, 63],
        [17, 64, 65],
        [31, 3, 128],
        [33, 20, 1],
        [63, 65, 63],
        [64, 64, 64],
        [65, 127, 4],
        [127, 16, 129],
        [128, 128, 128],
        [129, 129, 3],
        [257, 4, 16],
    ];
    hold(|rng| {
        for (i, [rows, inputs, outputs]) in slice(shapes.into_iter().enumerate()) {
            let p = LinearProblem::new(rows, inputs, outputs);
            for kernel in kernels().into_iter().map(Some).chain([None]) {
                let p = by(kernel, p);
                // Behind the last input the binding ends: only the other half of a word is seen there.
                let weight_dtype = if i % 4 == 2 { Dtype::F16 } else { p.weight_dtype };
                let transposed = LinearProblem { weight_dtype, ..p }.with_transposed_weights();
                // Alternately, not to compile every kernel twice.
                let maps = match i % 2 {
                    0 => [p.with_bias(Dtype::F32), transposed],
                    _ => [p, transposed.with_bias(Dtype::F32)],
                };
                for p in maps {
                    Map::draw(p, rng).check();
                }
            }
        }
    });
}

/// x, W, bias and y of every type, together and apart.
#[test]
fn every_type() {
    let kernels = kernels();
    let of_floats: Vec<_> =
        kernels.iter().copied().filter(|&kernel| kernel != LinearKernel::Matrix).collect();
    let mut maps = Vec::new();
    for (i, dtype) in FLOATS.into_iter().enumerate() {
        for (j, weight_dtype) in FLOATS.into_iter().enumerate() {
            for (k, out_dtype) in FLOATS.into_iter().enumerate() {
                // Quads, and single elements.
                for [rows, inputs, outputs] in [[18, 20, 24], [5, 19, 23]] {
                    let p = LinearProblem::new(rows, inputs, outputs).with_bias(FLOATS[(i + j + k) % 3]);
                    let p = LinearProblem { dtype, weight_dtype, out_dtype, ..p };
                    let p = if (i + j) % 2 == 0 { p } else { p.with_transposed_weights() };
                    if i == j && j == k {
                        maps.extend(of_floats.iter().map(|&kernel| (p, kernel)));
                        let n = of_floats.len();
                        maps.push((p.with_transposed_weights(), of_floats[(i + rows) % n]));
                    } else {
                        maps.push((p, of_floats[(i + k + rows) % of_floats.len()]));
                    }
                    if kernels.contains(&LinearKernel::Matrix) && [dtype, weight_dtype] == [Dtype::F16; 2] {
                        maps.push((p, LinearKernel::Matrix));
                        maps.push((p.with_transposed_weights(), LinearKernel::Matrix));
                    }
                }
            }
        }
    }
    hold(|rng| {
        for (p, kernel) in slice(maps) {
            Map::draw(LinearProblem { kernel: Some(kernel), ..p }, rng).check();
        }
    });
}

/// Offsets and gaps, in quads or anyhow; elements apart; residuals.
#[test]
fn any_layout() {
    let kernels = kernels();
    hold(|rng| {
        for i in slice(0..40) {
            let quads = rng.chance(0.5);
            let unit = if quads { 4 } else { 1 };
            let gap = |rng: &mut Rng| unit * rng.below(4);
            let [rows, inputs, outputs] =
                [1 + rng.below(40), unit * (1 + rng.below(12)), unit * (1 + rng.below(20))];
            let matrix = |rows: usize, columns: usize, rng: &mut Rng| {
                let step = if !quads && rng.chance(0.3) { 2 } else { 1 };
                let stride = columns * step + gap(rng);
                let layout = if rng.chance(0.3) {
                    Layout { offset: 0, strides: [0, 0, step, rows * step + gap(rng)] }
                } else {
                    Layout { offset: 0, strides: [0, 0, stride, step] }
                };
                layout.at(unit * rng.below(80))
            };
            let bias = match rng.below(3) {
                0 => None,
                1 => Some(Layout::rows(0).at(rng.below(9))),
                _ => Some(matrix(rows, outputs, rng)),
            };
            let dtype = rng.pick(&FLOATS);
            let p = LinearProblem {
                dtype,
                weight_dtype: rng.pick(&[dtype, Dtype::F32]),
                out_dtype: dtype,
                x: matrix(rows, inputs, rng),
                w: matrix(outputs, inputs, rng),
                y: matrix(rows, outputs, rng),
                bias: bias.map(|layout| Bias { dtype, layout }),
                ..LinearProblem::new(rows, inputs, outputs)
            };
            Map::draw(by(Some(kernels[i % kernels.len()]), p), rng).check();
        }
    });
}

/// The error does not grow with the inputs, also where all products have one sign, or are all alike.
#[test]
fn long_sums_stay_exact() {
    hold(|rng| {
        for kernel in kernels() {
            for (rows, inputs) in slice([(20, 1 << 14), (3, 4096)]) {
                let p = by(Some(kernel), LinearProblem::new(rows, inputs, 8));
                for p in slice([p, p.with_transposed_weights()]) {
                    Map::fill(p, || 0.5 + rng.uniform() as f32).check();
                    // All products alike: each addition of a chain may err in the same direction.
                    Map::fill(p, || 1.1).check_within(4.0);
                }
            }
        }
        // The longest: a thread has to reach the end on adapters that count its iterations.
        for kernel in kernels() {
            let p = by(Some(kernel), LinearProblem::new(1, 1 << 17, 3));
            Map::draw(p, rng).check();
            Map::draw(p.with_transposed_weights(), rng).check();
        }
    });
}

/// What is not finite in a row of x changes no bit of another row; in W it takes its output alone.
#[test]
fn nan_stays_in_its_row() {
    hold(|rng| {
        for kernel in kernels() {
            for (dtype, [rows, inputs, outputs]) in [(Dtype::F32, [37, 24, 40]), (Dtype::Bf16, [7, 11, 13])] {
                let p = LinearProblem::new(rows, inputs, outputs).with_dtype(dtype).with_bias(Dtype::F32);
                let p = by(Some(kernel), p);
                let clean = Map::draw(p, rng);
                let Some(before) = clean.check() else { return };
                for bad in [f32::NAN, f32::INFINITY] {
                    let (mut in_x, mut in_w) = (clean.clone(), clean.clone());
                    let (row, output, input) = (rng.below(rows), rng.below(outputs), rng.below(inputs));
                    in_x.x.set(p.x.index([0, 0, row, input]), bad);
                    in_w.w.set(p.w.index([0, 0, output, input]), bad);
                    for (map, is_hit) in [
                        (in_x, &(|r, _| r == row) as &dyn Fn(usize, usize) -> bool),
                        (in_w, &|_, n| n == output),
                    ] {
                        let y = map.check().expect("there is a device");
                        for (i, (r, n)) in places([rows, outputs]).enumerate() {
                            let fine = if is_hit(r, n) {
                                !y[i].is_finite()
                            } else {
                                y[i].to_bits() == before[i].to_bits()
                            };
                            assert!(fine, "{bad} reaches y[{r}, {n}]: {} {}\n  {p:?}", y[i], before[i]);
                        }
                    }
                }
            }
        }
    });
}

/// q, k and v of one row side by side in one buffer, prepared together and recorded twice in one pass. The
/// slices share words where they are odd.
#[test]
fn projections_share_a_buffer() {
    hold(|rng| {
        for (dtype, widths) in [(Dtype::F32, [16, 8, 8]), (Dtype::Bf16, [5, 3, 3]), (Dtype::F16, [8, 3, 5])] {
            let (rows, inputs, packed) = (19, 12, widths.iter().sum());
            let mut offset = 2;
            let maps = widths.map(|outputs| {
                let y = Layout::rows(packed).at(offset);
                offset += outputs;
                Map::draw(
                    LinearProblem { y, ..LinearProblem::new(rows, inputs, outputs) }.with_dtype(dtype),
                    rng,
                )
            });
            for gpu in gpus().into_iter().flatten() {
                let (attention, device) = (&gpu.attention, gpu.attention.device());
                let y = target(device, &maps[2].problem);
                let buffers = maps.each_ref().map(|map| Buffers::new(device, map));
                let [to_q, to_k, to_v] = [0, 1, 2].map(|i| {
                    let operands = LinearOperands { y: y.slice(..), ..buffers[i].operands() };
                    attention.prepare_linear(&maps[i].problem, &operands).expect("served")
                });
                let all = to_q.then(to_k).then(to_v);
                assert_eq!(all.dispatches(), 3);
                for _ in 0..2 {
                    let mut encoder = device.create_command_encoder(&Default::default());
                    all.encode_in_pass(&mut encoder.begin_compute_pass(&Default::default()));
                    attention.queue().submit([encoder.finish()]);
                    let got = read(gpu, &y, &maps.each_ref().map(|map| map.problem));
                    for (map, y) in maps.iter().zip(&got) {
                        near(&map.problem, y, &map.oracle()).unwrap_or_else(|what| panic!("{what}"));
                    }
                }
            }
        }
    });
}

/// More workgroups than one dimension of a dispatch has.
#[test]
fn folded_dispatches() {
    hold(|rng| {
        // 70000 workgroups.
        let p = LinearProblem { kernel: Some(LinearKernel::Few), ..LinearProblem::new(70_000 * 8, 1, 1) };
        Map::draw(p, rng).check();
    });
}

#[test]
fn no_rows_write_nothing() {
    for gpu in gpus().into_iter().flatten() {
        let device = gpu.attention.device();
        let buffer = upload(device, "any", &[0; 64], USAGE);
        let problem = LinearProblem::new(0, 4, 4);
        let w = upload(device, "w", &[0; 64], USAGE);
        let operands = LinearOperands::new(buffer.slice(..), w.slice(..), buffer.slice(..));
        assert!(gpu.attention.prepare_linear(&problem, &operands).expect("legal").is_empty());
    }
    let empty: &[f32] = &[];
    #[cfg(feature = "cpu")]
    {
        let inputs = LinearInputs::new(empty, &[0.0_f32; 16][..]);
        let y = wgpu_attention::cpu::linear(&LinearProblem::new(0, 4, 4), &inputs).expect("legal");
        assert_eq!(y.as_ref().len(), 0);
    }
    let y =
        linear(&LinearProblem::new(0, 4, 4), &LinearInputs::new(empty, &[0.0_f32; 16][..])).expect("legal");
    assert_eq!(y, LinearReference { y: vec![], scale: vec![] });
}

#[test]
fn invalid_problems() {
    let p = LinearProblem::new(4, 8, 12);
    let too_large = |what: &str, got, max| Error::TooLarge { what: what.into(), got, max };
    let unfit = |operand, got| Error::DtypeUnfit { operand, got, need: "f32, f16, bf16" };
    let most = u64::from(u32::MAX);
    for (p, error) in [
        (LinearProblem { inputs: 0, ..p }, Error::ZeroSize { what: "inputs" }),
        (LinearProblem { outputs: 0, ..p }, Error::ZeroSize { what: "outputs" }),
        (LinearProblem { rows: usize::MAX, ..p }, too_large("rows", usize::MAX as u128, 1 << 28)),
        (LinearProblem { inputs: (1 << 17) + 1, ..p }, too_large("inputs", (1 << 17) + 1, 1 << 17)),
        (LinearProblem { outputs: 1 << 29, ..p }, too_large("outputs", 1 << 29, 1 << 28)),
        (
            LinearProblem { x: p.x.at(1 << 33), ..p },
            too_large("x's last element index", (1 << 33) + 32, most),
        ),
        (
            LinearProblem { w: Layout::rows(1 << 32), ..p },
            too_large("w's last element index", (11 << 32) + 8, most),
        ),
        (
            LinearProblem { y: p.y.at(1 << 32), ..p },
            too_large("y's last element index", (1 << 32) + 48, most),
        ),
        (p.with_dtype(Dtype::Int8), unfit(Operand::X, Dtype::Int8)),
        (LinearProblem { weight_dtype: Dtype::Int4, ..p }, unfit(Operand::W, Dtype::Int4)),
        (LinearProblem { out_dtype: Dtype::Int8, ..p }, unfit(Operand::Y, Dtype::Int8)),
        (p.with_bias(Dtype::Int4), unfit(Operand::Bias, Dtype::Int4)),
        (
            LinearProblem { y: Layout::rows(11), ..p },
            Error::Overlaps { operand: Operand::Y, shape: [1, 1, 4, 12], strides: [0, 0, 11, 1] },
        ),
    ] {
        assert_eq!(p.validate(), Err(error.clone()), "{p:?}");
        let inputs = LinearInputs::new(&[0.0_f32][..], &[0.0_f32][..]);
        assert_eq!(linear(&p, &inputs).err(), Some(error.clone()));
        #[cfg(feature = "cpu")]
        assert_eq!(wgpu_attention::cpu::linear(&p, &inputs).err(), Some(error));
    }
    // Strides that would overflow are no panic.
    let worst = Layout { offset: usize::MAX, strides: [usize::MAX; 4] };
    assert!(matches!(LinearProblem { x: worst, ..p }.validate(), Err(Error::TooLarge { .. })));
}

#[test]
fn bad_slices() {
    let p = LinearProblem::new(2, 4, 3).with_bias(Dtype::F32);
    let (x, w, b) = ([0.0_f32; 8], [0.0_f32; 12], [0.0_f32; 3]);
    let good = LinearInputs { bias: Some(b[..].into()), ..LinearInputs::new(&x[..], &w[..]) };
    assert!(linear(&p, &good).is_ok());
    let refused = |p: &LinearProblem, inputs| linear(p, &inputs).expect_err("it passed");
    let operand = Operand::Bias;
    assert_eq!(refused(&p, LinearInputs { bias: None, ..good }), Error::MissingOperand { operand });
    let without = LinearProblem { bias: None, ..p };
    assert_eq!(refused(&without, good), Error::UnexpectedOperand { operand });
    let (need, got) = (Dtype::F16, Dtype::F32);
    let half = LinearProblem { weight_dtype: need, ..p };
    assert_eq!(refused(&half, good), Error::DtypeMismatch { operand: Operand::W, need, got });
    let (unit, container) = ("elements", "slice");
    for (operand, need) in [(Operand::X, 8), (Operand::W, 12), (Operand::Bias, 3)] {
        let mut short = good;
        match operand {
            Operand::X => short.x = x[..7].into(),
            Operand::W => short.w = w[..11].into(),
            _ => short.bias = Some(b[..2].into()),
        }
        let error = Error::OutOfBounds { operand, need, got: need - 1, unit, container };
        assert_eq!(refused(&p, short), error);
    }
}

#[test]
fn bad_buffers() {
    for gpu in gpus().into_iter().flatten() {
        let (device, queue) = (gpu.attention.device(), gpu.attention.queue());
        let of = |elements: usize, usage| upload(device, "a buffer", &vec![0; 4 * elements], usage);
        let p = LinearProblem::new(4, 8, 12).with_bias(Dtype::F32);
        let (x, w, bias) = (of(32, USAGE), of(96, USAGE), of(12, USAGE));
        let y = target(device, &p);
        let good = LinearOperands {
            bias: Some(bias.slice(..)),
            ..LinearOperands::new(x.slice(..), w.slice(..), y.slice(..))
        };
        let refused = |problem: &LinearProblem, operands: LinearOperands<'_>| -> Error {
            let mut encoder = device.create_command_encoder(&Default::default());
            let error = gpu.attention.encode_linear(&mut encoder, problem, &operands).expect_err("it passed");
            assert_eq!(gpu.attention.prepare_linear(problem, &operands).err(), Some(error.clone()));
            queue.submit([encoder.finish()]);
            error
        };
        let operand = Operand::Bias;
        assert_eq!(refused(&LinearProblem { inputs: 0, ..p }, good), Error::ZeroSize { what: "inputs" });
        assert_eq!(refused(&p, LinearOperands { bias: None, ..good }), Error::MissingOperand { operand });
        let without = LinearProblem { bias: None, ..p };
        assert_eq!(refused(&without, good), Error::UnexpectedOperand { operand });

        // Without the usage, one word short, and y in the place of another: each operand.
        let (need, got) = (wgpu::BufferUsages::STORAGE, wgpu::BufferUsages::COPY_SRC);
        for (operand, words) in [(Operand::X, 32), (Operand::W, 96), (Operand::Bias, 12), (Operand::Y, 48)] {
            let (useless, short) = (of(words, got), of(words - 1, USAGE));
            let words = words as u64;
            let bounds = Error::OutOfBounds {
                operand,
                need: 4 * words,
                got: 4 * words - 4,
                unit: "bytes",
                container: "buffer",
            };
            for (bad, error) in [(&useless, Error::BufferUsage { operand, need, got }), (&short, bounds)] {
                let (bad, mut with) = (bad.slice(..), good);
                match operand {
                    Operand::X => with.x = bad,
                    Operand::W => with.w = bad,
                    Operand::Bias => with.bias = Some(bad),
                    _ => with.y = bad,
                }
                assert_eq!(refused(&p, with), error);
            }
        }
        let small = LinearProblem::new(2, 4, 2).with_bias(Dtype::F32);
        for (with, buffer) in [(Operand::X, &x), (Operand::W, &w), (Operand::Bias, &bias)] {
            let error = Error::Aliased { operand: Operand::Y, with };
            assert_eq!(refused(&small, LinearOperands { y: buffer.slice(..), ..good }), error);
        }
        // (Apart in one buffer they are no such thing: `Map::run`.) Inputs may share theirs.
        assert!(gpu.attention.prepare_linear(&small, &LinearOperands { x: w.slice(..), ..good }).is_ok());
        // Nothing has been recorded so far.
        let bytes = download(device, queue, &y);
        assert!(bytes.chunks(4).all(|x| x == poison(Dtype::F32)));

        // A binding beyond what the device allows.
        if gpu.kind == Kind::Minimal {
            let huge = LinearProblem::new(1, 1 << 13, (1 << 12) + 1);
            let buffer = device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("huge"),
                size: (128 << 20) + (1 << 15),
                usage: USAGE,
                mapped_at_creation: false,
            });
            let (x, y) = (of(1 << 13, USAGE), of((1 << 12) + 1, USAGE));
            let error = Error::LimitExceeded {
                what: "w: bytes of one storage binding".into(),
                need: (128 << 20) + (1 << 15),
                got: 128 << 20,
            };
            assert_eq!(
                refused(&huge, LinearOperands::new(x.slice(..), buffer.slice(..), y.slice(..))),
                error
            );
        }
    }
}

/// A device of a caller's that is too small for a forced kernel.
#[test]
fn forced_kernels_that_do_not_fit() {
    let Some(full) = gpu::get(Kind::Full, false) else { return };
    let adapter = gpu::adapter_of(&full.attention).expect("it was listed");
    let descriptor = wgpu::DeviceDescriptor {
        required_limits: wgpu::Limits {
            max_compute_invocations_per_workgroup: 32,
            ..wgpu::Limits::default().or_worse_values_from(&adapter.limits())
        },
        ..Default::default()
    };
    let (device, queue) =
        pollster::block_on(adapter.request_device(&descriptor)).expect("less than there is");
    let small = Gpu { kind: Kind::Minimal, checks: false, attention: Attention::new(&device, &queue) };
    hold(|rng| {
        let map = Map::draw(LinearProblem::new(20, 8, 12), rng);
        near(&map.problem, &map.run(&small), &map.oracle()).unwrap_or_else(|what| panic!("{what}"));
        let threads = |need: u32| format!("it needs {need} threads a workgroup, the device has 32");
        for (kernel, why) in [
            (LinearKernel::Tile, threads(128)),
            (LinearKernel::Few, threads(64)),
            (
                LinearKernel::FewSubgroup,
                "it needs subgroup operations, which the device does not offer (SUBGROUP)".into(),
            ),
            (
                LinearKernel::Matrix,
                "it needs cooperative matrices of f16 with f32 sums (EXPERIMENTAL_COOPERATIVE_MATRIX)".into(),
            ),
        ] {
            let problem = LinearProblem { kernel: Some(kernel), ..map.problem };
            let buffers = Buffers::new(&device, &map);
            let error = small.attention.prepare_linear(&problem, &buffers.operands()).expect_err("too small");
            assert_eq!(error, Error::KernelUnfit { kernel: kernel.to_string(), why });
        }
    });
}

/// A map whose device is lost is an error, and no panic.
#[test]
fn lost_device() {
    if gpus().is_empty() {
        return;
    }
    let attention = pollster::block_on(Attention::request(&gpu::request())).expect("there was one before");
    let device = attention.device();
    let map = Map::fill(LinearProblem::new(2, 3, 4), || 1.0);
    let buffers = Buffers::new(device, &map);
    device.destroy();
    let error = attention.prepare_linear(&map.problem, &buffers.operands()).expect_err("lost");
    assert!(matches!(error, Error::DeviceLost { .. }), "{error:?}");
}
