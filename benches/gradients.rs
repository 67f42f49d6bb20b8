//! Gradients as their users record them, against the oracle, in the columns of `benches/peers`, and the forward call
//! beside them:
//!
//! ```text
//! cargo bench --bench gradients -- --shapes 1x8x1024x64,1x32/8x1024x64 --options plain,causal --dtype f16 --repeat 10
//! ```
//!
//! A shape is BxHq[/Hkv]xSxD. A time is from the first encoded command to the end of the work (operands stay where they
//! are), the median of `--repeat`. GFLOP/s count 4 B Hq S S D forward and two and a half times that backward, half of
//! either where causal. `max_error` is that of the first entry's first group of heads, which the oracle computes; ends
//! with 1 where that is more than the budget.

mod common;

use std::time::Instant;

use common::{Flags, Result, causal};
use wgpu_attention::{
    Align, Attention, AttentionProblem, BackwardOperands, BackwardProblem, DeviceRequest, Dtype, Inputs,
    Operand, Operands, Tensor, read_buffer, reference,
};

fn main() -> Result<()> {
    let flags = Flags::new();
    let (repeat, dtype) = (flags.repeat()?, flags.dtype()?);
    let adapter = std::env::var("WGPU_ATTENTION_ADAPTER").ok();
    let attention = pollster::block_on(Attention::request(&DeviceRequest { adapter, ..Default::default() }))?;
    let (version, adapter) = (env!("CARGO_PKG_VERSION"), &attention.caps().adapter);
    let mut wrong = false;
    println!("peer,version,adapter,dtype,shape,options,ms,gflops,max_error");
    for shape in flags.get("--shapes", "1x8x512x64,1x8x1024x64").split(',') {
        for option in flags.get("--options", "plain,causal").split(',') {
            let causal = causal(option)?;
            let problem = BackwardProblem::of(&problem(shape, causal, dtype)?);
            for Call { name, ms, flop, error, share } in measure(&attention, &problem, repeat)? {
                wrong = wrong || share > 1.0;
                let gflops = flop / ms / 1e6;
                println!(
                    "wgpu-attention {name},{version},\"{adapter}\",{dtype},{shape},{option},{ms:.4},{gflops:.2},{error:.3e}"
                );
            }
        }
    }
    if wrong { Err("results outside their error budget".into()) } else { Ok(()) }
}

fn problem(shape: &str, causal: Option<Align>, dtype: Dtype) -> Result<AttentionProblem> {
    let parts: Vec<&str> = shape.split('x').collect();
    let &[batch, heads, tokens, width] = parts.as_slice() else {
        return Err(format!("{shape}: want BxHq[/Hkv]xSxD").into());
    };
    let (heads_q, heads_kv) = heads.split_once('/').unwrap_or((heads, heads));
    let [batch, heads_q, heads_kv, tokens, width] = [batch, heads_q, heads_kv, tokens, width].map(str::parse);
    let (tokens, width) = (tokens?, width?);
    let new = AttentionProblem::new(batch?, heads_q?, heads_kv?, tokens, tokens, width, width);
    let problem = AttentionProblem { causal, lse: true, ..new.with_dtype(dtype) };
    problem.validate()?;
    Ok(problem)
}

/// What came of the forward or the backward call.
struct Call {
    name: &'static str,
    ms: f64,
    flop: f64,
    error: f64,
    /// The largest error as a share of its budget.
    share: f64,
}

/// The forward and the backward call.
fn measure(attention: &Attention, problem: &BackwardProblem, repeat: usize) -> Result<[Call; 2]> {
    let (device, queue) = (attention.device(), attention.queue());
    let p = &problem.attention;
    let numbers = |operand, seed: f32| {
        let n = problem.extent(operand) as usize;
        let values: Vec<f32> =
            (0..n).map(|i| (i as f32 * seed).sin() * (1.0 + (i as f32 * 0.11).cos())).collect();
        Tensor::from_f32(p.dtype, &values)
    };
    let inputs = [(Operand::Q, 0.377), (Operand::K, 0.731), (Operand::V, 0.577), (Operand::Dout, 0.913)]
        .map(|(operand, seed)| numbers(operand, seed));
    let buffer = |bytes: usize| {
        device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: bytes as u64,
            usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: false,
        })
    };
    let [q, k, v, dout] = inputs.each_ref().map(|tensor| {
        let buffer = buffer(tensor.as_ref().bytes().len());
        queue.write_buffer(&buffer, 0, tensor.as_ref().bytes());
        buffer
    });
    let bytes = |operand| problem.extent(operand) as usize * p.dtype.bytes();
    let [o, dq, dk, dv] = [Operand::O, Operand::Dq, Operand::Dk, Operand::Dv].map(|of| buffer(bytes(of)));
    let lse = buffer(4 * p.rows());
    let forward = Operands {
        lse: Some(lse.slice(..)),
        ..Operands::new(q.slice(..), k.slice(..), v.slice(..), o.slice(..))
    };
    let backward = BackwardOperands {
        dq: Some(dq.slice(..)),
        dk: Some(dk.slice(..)),
        dv: Some(dv.slice(..)),
        ..BackwardOperands::new(forward, dout.slice(..))
    };
    let calls =
        [attention.prepare(&attention.plan(p)?, &forward)?, attention.prepare_backward(problem, &backward)?];
    let mut times = [Vec::new(), Vec::new()];
    // Two of each that count for nothing; then by turns.
    for round in 0..repeat + 2 {
        for (call, times) in calls.iter().zip(&mut times) {
            let start = Instant::now();
            let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            call.encode(&mut encoder);
            queue.submit([encoder.finish()]);
            device.poll(wgpu::PollType::wait_indefinitely())?;
            if round >= 2 {
                times.push(start.elapsed().as_secs_f64() * 1e3);
            }
        }
    }
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let read = |buffer: &wgpu::Buffer| -> Result<Tensor> {
        let bytes = pollster::block_on(read_buffer(device, queue, buffer, 0..buffer.size()))?;
        Ok(Tensor::from_bytes(p.dtype, &bytes))
    };

    // One group of heads is a problem of its own, at the beginning of each tensor.
    let group = p.heads_q / p.heads_kv;
    let one = AttentionProblem {
        causal: p.causal,
        ..AttentionProblem::new(1, group, 1, p.seq_q, p.seq_kv, p.head_dim, p.head_dim).with_dtype(p.dtype)
    };
    let [q, k, v, dout] = inputs.each_ref().map(Tensor::as_ref);
    let (slices, of_one) = (Inputs::new(q, k, v), BackwardProblem::of(&one));
    let worst = |got: Tensor, want: &[f64]| {
        reference::max_error((0..want.len()).map(|at| f64::from(got.as_ref().get(at))), want)
    };
    let oracle = reference::oracle(&one, &slices)?;
    let naive = reference::naive(&one, &slices)?;
    let of_naive = reference::max_error(naive.o.iter().copied(), &oracle.o);
    let error = worst(read(&o)?, &oracle.o);
    let share = error / reference::tolerance(&one, &oracle, of_naive);
    let gradients = reference::backward(&of_one, &slices, dout)?;
    let naive = reference::backward_naive(&of_one, &slices, dout)?;
    let budgets = reference::backward_tolerance(&of_one, &gradients, &naive);
    let errors = [(&dq, &gradients.dq), (&dk, &gradients.dk), (&dv, &gradients.dv)]
        .into_iter()
        .zip(budgets)
        .map(|((buffer, want), budget)| {
            let error = worst(read(buffer)?, want);
            Ok((error, error / budget))
        })
        .collect::<Result<Vec<(f64, f64)>>>()?;
    let [of_forward, of_backward] = times.map(median);
    let forward = Call { name: "forward", ms: of_forward, flop: p.flops(), error, share };
    // A NaN among the results is an infinite error.
    let (error, share) =
        errors.into_iter().fold((0.0, 0.0), |most: (f64, f64), e| (most.0.max(e.0), most.1.max(e.1)));
    Ok([forward, Call { name: "backward", ms: of_backward, flop: problem.flops(), error, share }])
}
