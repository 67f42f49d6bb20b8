//! burn's attention on wgpu over Vulkan, as CSV on stdout. Started by ../burn_wgpu.
//!
//! Inputs and output stay on the device. A sample ends when the device has no work left.

use std::panic::{self, AssertUnwindSafe};
use std::process::exit;
use std::time::Instant;

use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::wgpu::WgpuBackend;
use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_backend::ops::FloatTensorOps;
use burn_cubecl::cubecl::device::WgpuDeviceKind;
use burn_cubecl::cubecl::future::reader::read_sync;
use burn_cubecl::kernel::attention::flash_attention;
use burn_cubecl::{CubeBackend, CubeDevice};
use cubek::attention::forward::launch::{BlueprintStrategy, Strategy};
use half::f16;

const USAGE: &str = "usage: burn_wgpu [--shapes BxHq[/Hkv]xSq[/Sk]xD[/Dv],...] [--options plain,causal]
  [--dtype f32,f16] [--repeat N] [--op unit|public]";
const BURN: &str = "0.22.1"; // as in Cargo.toml

fn fail(message: impl std::fmt::Display) -> ! {
    eprintln!("burn_wgpu: {message}");
    exit(2)
}

// --- the command ---

#[derive(Clone, Copy, PartialEq)]
enum Op {
    /// The call of burn's users, which tries its kernels on the first call and keeps one.
    Public,
    /// Its fused kernel without matrix units, by name.
    Unit,
}

struct Args {
    shapes: Vec<Shape>,
    options: Vec<String>,
    dtypes: Vec<String>,
    repeat: usize,
    op: Op,
}

struct Shape {
    text: String,
    b: usize,
    hq: usize,
    hkv: usize,
    sq: usize,
    sk: usize,
    d: usize,
    dv: usize,
}

/// `BxHq[/Hkv]xSq[/Sk]xD[/Dv]`
fn parse_shape(text: &str) -> Option<Shape> {
    let number = |s: &str| s.parse::<usize>().ok().filter(|n| *n > 0);
    let pair = |s: &str| match s.split_once('/') {
        Some((a, b)) => Some((number(a)?, number(b)?)),
        None => number(s).map(|n| (n, n)),
    };
    let mut parts = text.split('x');
    let b = number(parts.next()?)?;
    let [(hq, hkv), (sq, sk), (d, dv)] = [pair(parts.next()?)?, pair(parts.next()?)?, pair(parts.next()?)?];
    let shape = Shape { text: text.into(), b, hq, hkv, sq, sk, d, dv };
    (parts.next().is_none() && hq % hkv == 0).then_some(shape)
}

fn parse_args() -> Args {
    let (mut shapes, mut options, mut dtype) = ("1x8x512x64,1x8x1024x64,1x8x2048x64", "plain,causal", "f32");
    let (mut repeat, mut op) = ("10", "unit");
    let argv: Vec<String> = std::env::args().skip(1).collect();
    let mut words = argv.iter();
    while let Some(word) = words.next() {
        let (name, value) = match word.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (word.as_str(), None),
        };
        let place = match name {
            "--shapes" => &mut shapes,
            "--options" => &mut options,
            "--dtype" => &mut dtype,
            "--repeat" => &mut repeat,
            "--op" => &mut op,
            "-h" | "--help" => {
                println!("{USAGE}");
                exit(0)
            }
            _ => fail(format!("unknown argument '{word}'\n{USAGE}")),
        };
        let value = value.or_else(|| words.next().map(String::as_str));
        *place = value.unwrap_or_else(|| fail(format!("{name} takes a value\n{USAGE}")));
    }
    let list = |text: &str, known: &[&str], what: &str| -> Vec<String> {
        if let Some(s) = text.split(',').find(|s| !known.contains(s)) {
            fail(format!("unknown {what} '{s}'"));
        }
        text.split(',').map(String::from).collect()
    };
    let shape = |s| {
        let bad = || fail(format!("bad shape '{s}', expected BxHq[/Hkv]xSq[/Sk]xD[/Dv]"));
        parse_shape(s).unwrap_or_else(bad)
    };
    Args {
        shapes: shapes.split(',').map(shape).collect(),
        options: list(options, &["plain", "causal"], "option"),
        dtypes: list(dtype, &["f32", "f16"], "dtype"),
        repeat: repeat.parse().ok().filter(|n| *n > 0).unwrap_or_else(|| fail("--repeat starts at 1")),
        op: match op {
            "public" => Op::Public,
            "unit" => Op::Unit,
            _ => fail(format!("unknown operator '{op}'")),
        },
    }
}

// --- numbers ---

/// mulberry32 through Box and Muller.
struct Normals(u32);

impl Normals {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x6d2b_79f5);
        let mut t = (self.0 ^ (self.0 >> 15)).wrapping_mul(1 | self.0);
        t ^= t.wrapping_add((t ^ (t >> 7)).wrapping_mul(61 | t));
        f64::from(t ^ (t >> 14)) / 2f64.powi(32)
    }

    /// `n` of them, rounded to f16 if that is what they are stored in.
    fn take(&mut self, n: usize, half: bool) -> Vec<f32> {
        let mut next = || {
            let (r, a) =
                ((-2.0 * (1.0 - self.uniform()).ln()).sqrt(), std::f64::consts::TAU * self.uniform());
            (r * a.cos()) as f32
        };
        (0..n).map(|_| if half { f16::from_f32(next()).to_f32() } else { next() }).collect()
    }
}

fn median(mut xs: Vec<f64>) -> f64 {
    xs.sort_by(f64::total_cmp);
    (xs[(xs.len() - 1) / 2] + xs[xs.len() / 2]) / 2.0
}

/// At most `most` of 0..n, evenly spread, the first and the last among them.
fn spread(n: usize, most: usize) -> Vec<usize> {
    if n <= most {
        return (0..n).collect();
    }
    (0..most).map(|i| (i as f64 * (n - 1) as f64 / (most - 1) as f64).round() as usize).collect()
}

/// max|o - o64| over up to 32 (batch, head) pairs and 64 rows of each, o64 computed in float64.
fn max_error(shape: &Shape, [q, k, v, o]: [&[f32]; 4], causal: bool) -> f64 {
    let &Shape { b, hq, sq, sk, d, dv, .. } = shape;
    let row = |x: &[f32], i: usize, width: usize| -> Vec<f64> {
        x[i * width..][..width].iter().map(|x| f64::from(*x)).collect()
    };
    let mut worst = 0.0;
    for pair in spread(b * hq, 32) {
        let keys: Vec<_> = (0..sk).map(|j| row(k, pair * sk + j, d)).collect();
        let values: Vec<_> = (0..sk).map(|j| row(v, pair * sk + j, dv)).collect();
        for i in spread(sq, 64) {
            let query = row(q, pair * sq + i, d);
            let kept = if causal { i + 1 } else { sk };
            let dot = |key: &Vec<f64>| query.iter().zip(key).map(|(a, b)| a * b).sum::<f64>();
            let s: Vec<f64> = keys[..kept].iter().map(|key| dot(key) / (d as f64).sqrt()).collect();
            let top = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let (mut sum, mut o64) = (0.0, vec![0.0; dv]);
            for (x, value) in s.iter().zip(&values) {
                let p = (x - top).exp();
                sum += p;
                o64.iter_mut().zip(value).for_each(|(o, v)| *o += p * v);
            }
            for (x, x64) in row(o, pair * sq + i, dv).iter().zip(&o64) {
                let error = (x - x64 / sum).abs();
                if !(error <= worst) {
                    worst = error; // NaN stays
                }
            }
        }
    }
    worst
}

fn data(x: &[f32], shape: [usize; 4], half: bool) -> TensorData {
    if half {
        return TensorData::new(x.iter().map(|x| f16::from_f32(*x)).collect(), shape);
    }
    TensorData::new(x.to_vec(), shape)
}

fn numbers(data: TensorData) -> Vec<f32> {
    data.iter::<f32>().collect()
}

// --- running ---

/// Seconds of each sample, and the last output.
fn measure<O>(repeat: usize, call: impl Fn() -> O, wait: impl Fn()) -> (Vec<f64>, O) {
    let sample = |calls: usize| {
        let start = Instant::now();
        let mut outputs: Vec<O> = (0..calls).map(|_| call()).collect(); // all kept: none is left out as unused
        wait();
        (start.elapsed().as_secs_f64() / calls as f64, outputs.swap_remove(0))
    };
    sample(1); // compiles, and for `public` tries its kernels
    sample(1);
    // Short calls are counted several to a sample, so that waiting for the GPU weighs little.
    let calls = (0.02 / sample(1).0).ceil().clamp(1.0, 64.0) as usize;
    let mut samples: Vec<_> = (1..repeat).map(|_| sample(calls).0).collect();
    let (seconds, o) = sample(calls);
    samples.push(seconds);
    (samples, o)
}

struct Timed {
    seconds: f64,
    error: f64,
}

fn run(
    shape: &Shape,
    causal: bool,
    half: bool,
    args: &Args,
    (device, cube): (&Device, &CubeDevice),
) -> Result<Timed, String> {
    let &Shape { b, hq, hkv, sq, sk, d, dv, .. } = shape;
    if hq != hkv {
        return Err("its attention has no grouped heads".into());
    }
    let mut normals = Normals(1);
    let [q, k, v] = [b * hq * sq * d, b * hq * sk * d, b * hq * sk * dv].map(|n| normals.take(n, half));
    let inputs = [(&q, [b, hq, sq, d]), (&k, [b, hq, sk, d]), (&v, [b, hq, sk, dv])];
    let inputs = inputs.map(|(x, shape)| data(x, shape, half));
    let options = AttentionModuleOptions { is_causal: causal, ..Default::default() };
    let (samples, o) = match args.op {
        Op::Public => {
            let dtype = if half { DType::F16 } else { DType::F32 };
            let [q, k, v] = inputs.map(|x| Tensor::<4>::from_data(x, (device, dtype)));
            let call = || attention(q.clone(), k.clone(), v.clone(), None, None, options);
            let (samples, o) = measure(args.repeat, call, || device.sync().expect("the device"));
            (samples, numbers(o.try_into_data().map_err(|e| e.to_string())?))
        }
        Op::Unit => {
            let [q, k, v] = inputs.map(|x| CubeBackend::float_from_data(x, cube));
            // burn's own entry to it, `AttentionStrategy::FlashUnit`, takes the unfused path where this one refuses.
            let call = || {
                let unit = Strategy::Unit(BlueprintStrategy::Inferred(()));
                flash_attention(q.clone(), k.clone(), v.clone(), None, None, options, unit)
            };
            call().map_err(|e| format!("{e:?}"))?;
            let wait = || read_sync(cube.client().sync()).expect("the device");
            let (samples, o) = measure(args.repeat, || call().expect("as before"), wait);
            (samples, numbers(read_sync(CubeBackend::float_into_data(o)).map_err(|e| e.to_string())?))
        }
    };
    Ok(Timed { seconds: median(samples), error: max_error(shape, [&q, &k, &v, &o], causal) })
}

fn main() {
    let args = parse_args();
    let device = Device::wgpu_options().graphics_api(WgpuBackend::Vulkan).init();
    let device = device.unwrap_or_else(|e| fail(e));
    let cube = CubeDevice::vulkan(WgpuDeviceKind::DefaultDevice).expect("the same");
    let client = cube.client();
    let adapter = client.properties().identity.name.replace('"', "'");
    // "wgpu<spirv>" or "wgpu<wgsl>": what its kernels are compiled to on this adapter.
    let language = client.name().trim_start_matches("wgpu<").trim_end_matches('>').to_string();
    let op = if args.op == Op::Public { "public" } else { "unit" };

    // A kernel that cannot run panics somewhere inside: said once, as the reason for no row.
    panic::set_hook(Box::new(|_| {}));
    println!("peer,version,adapter,dtype,shape,options,ms,gflops,max_error");
    let mut rows = 0;
    for dtype in &args.dtypes {
        for shape in &args.shapes {
            for option in &args.options {
                let causal = option == "causal";
                let Shape { text, b, hq, sq, sk, d, dv, .. } = shape;
                if causal && sq != sk {
                    eprintln!("burn_wgpu: {text} causal skipped: peers align Sq != Sk differently");
                    continue;
                }
                let timed = AssertUnwindSafe(|| run(shape, causal, dtype == "f16", &args, (&device, &cube)));
                match panic::catch_unwind(timed).unwrap_or_else(|e| Err(reason(e.as_ref()))) {
                    Ok(Timed { seconds, error }) => {
                        let flop = (2 * b * hq * sq * sk * (d + dv)) as f64 / if causal { 2.0 } else { 1.0 };
                        let (ms, gflops) = (seconds * 1e3, flop / seconds / 1e9);
                        print!("burn_wgpu,{BURN} {op} {language},\"{adapter}\",{dtype},{text},{option},");
                        println!("{ms:.4},{gflops:.2},{error:.3e}");
                        rows += 1;
                    }
                    Err(e) => {
                        let e = e.lines().next().unwrap_or_default();
                        eprintln!("burn_wgpu: {text} {option} ({op}) skipped: {e}");
                    }
                }
            }
        }
    }
    exit(if rows > 0 { 0 } else { 1 })
}

fn reason(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| s.to_string());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "it panicked".into())
}
