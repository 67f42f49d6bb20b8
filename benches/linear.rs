//! The linear maps' kernels and the CPU path, in GFLOP/s: `cargo bench --bench linear [rows inputs outputs]...`.
//!
//! The time is the host's, from submission to the end, the best of several; each dispatch is long enough for
//! that (on a GPU ask for 8192 8192 8192: what takes a CPU seconds is not timed there).

use std::time::Instant;

use wgpu_attention::{
    Attention, DeviceRequest, Dtype, LinearInputs, LinearKernel, LinearOperands, LinearProblem, Tensor, cpu,
};

const ROUNDS: usize = 7;

/// Most operations that the CPU is asked for.
const MOST_ON_CPU: f64 = 1e11;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let adapter = std::env::var("WGPU_ATTENTION_ADAPTER").ok();
    let request = DeviceRequest { adapter, matrix: true, ..DeviceRequest::default() };
    let attention = pollster::block_on(Attention::request(&request))?;
    println!("on {} ({})", attention.caps().adapter, attention.caps().driver);
    let sizes: Vec<usize> = std::env::args().filter_map(|arg| arg.parse().ok()).collect();
    let mut sizes: Vec<_> = sizes.chunks_exact(3).map(|s| (s[0], s[1], s[2])).collect();
    if sizes.is_empty() {
        sizes =
            vec![(1024, 1024, 1024), (1, 1024, 1024), (8, 1024, 1024), (1024, 64, 1024), (255, 1023, 511)];
    }
    for (rows, inputs, outputs) in sizes {
        let p = LinearProblem::new(rows, inputs, outputs);
        for (name, p) in [
            ("f32", p),
            ("f32, W transposed", p.with_transposed_weights()),
            ("f16", p.with_dtype(Dtype::F16)),
        ] {
            if std::env::var("LINEAR_TYPE").is_ok_and(|only| only != name) {
                continue;
            }
            if p.flops() <= MOST_ON_CPU {
                report(&p, name, "cpu", measure_cpu(&p)?, "");
            }
            for &kernel in LinearKernel::ALL {
                if std::env::var("LINEAR_KERNEL").is_ok_and(|only| only != kernel.to_string()) {
                    continue;
                }
                let p = LinearProblem { kernel: Some(kernel), ..p };
                match measure(&attention, &p) {
                    Ok((first, best)) => {
                        report(&p, name, &kernel.to_string(), best, &format!("; first {first:.2} s"));
                    }
                    Err(error) => println!("{kernel}: {error}"),
                }
            }
        }
    }
    Ok(())
}

fn report(p: &LinearProblem, name: &str, kernel: &str, seconds: f64, more: &str) {
    println!(
        "{:5} x {:5} x {:5} {name:18} {kernel:14} {:8.1} GFLOP/s, {:6.2} ms{more}",
        p.rows,
        p.inputs,
        p.outputs,
        p.flops() / seconds / 1e9,
        seconds * 1e3
    );
}

/// Seconds of the CPU path's best run.
fn measure_cpu(p: &LinearProblem) -> wgpu_attention::Result<f64> {
    let numbers = |n: usize| Tensor::from_f32(p.dtype, &(0..n).map(|i| (i as f32).sin()).collect::<Vec<_>>());
    let (x, w) = (numbers(p.rows * p.inputs), numbers(p.outputs * p.inputs));
    let mut y = Tensor::zeros(p.out_dtype, p.rows * p.outputs);
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        cpu::linear_into(p, &LinearInputs { x: x.as_ref(), w: w.as_ref(), bias: None }, &mut y)?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// Seconds of the first run, which compiles, and of the best.
fn measure(attention: &Attention, p: &LinearProblem) -> wgpu_attention::Result<(f64, f64)> {
    let device = attention.device();
    let buffer = |elements: usize| {
        device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: (4 * elements as u64).next_multiple_of(16),
            usage: wgpu::BufferUsages::STORAGE,
            mapped_at_creation: false,
        })
    };
    let (x, w, y) = (buffer(p.rows * p.inputs), buffer(p.outputs * p.inputs), buffer(p.rows * p.outputs));
    let mut times = Vec::new();
    for _ in 0..=ROUNDS {
        let start = Instant::now();
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        attention.encode_linear(
            &mut encoder,
            p,
            &LinearOperands::new(x.slice(..), w.slice(..), y.slice(..)),
        )?;
        attention.queue().submit([encoder.finish()]);
        let _ = device.poll(wgpu::PollType::wait_indefinitely());
        times.push(start.elapsed().as_secs_f64());
    }
    let first = times.remove(0);
    Ok((first, times.into_iter().fold(f64::INFINITY, f64::min)))
}
