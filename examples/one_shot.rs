//! Attention from slices to vectors, on the GPU if there is one, else on the CPU:
//! `cargo run --release --example one_shot`.

use wgpu_attention::{Align, Attention, AttentionProblem, DeviceRequest, Error, Inputs, cpu, reference};

fn main() -> Result<(), Error> {
    // 4 heads of 64 tokens, width 32; each token sees itself and what came before.
    let problem = AttentionProblem {
        causal: Some(Align::TopLeft),
        lse: true,
        ..AttentionProblem::new(1, 4, 4, 64, 64, 32, 32)
    };
    let wave = |step: f32| (0..4 * 64 * 32).map(|i| (i as f32 * step).sin()).collect::<Vec<f32>>();
    let (q, k, v) = (wave(0.37), wave(0.11), wave(0.73));
    let inputs = Inputs::new(&q[..], &k[..], &v[..]);

    let outputs = match pollster::block_on(Attention::request(&DeviceRequest::default())) {
        Ok(attention) => {
            println!("on {}", attention.caps().adapter);
            attention.run_blocking(&problem, &inputs)?
        }
        Err(Error::NoAdapter { why }) => {
            println!("on the CPU, since there is no adapter: {why}");
            cpu::attention(&problem, &inputs)?
        }
        Err(error) => return Err(error),
    };

    let oracle = reference::oracle(&problem, &inputs)?;
    let o = outputs.o.to_f32().into_iter().map(f64::from);
    let error = reference::max_error(o, &oracle.o);
    let budget = reference::tolerance(&problem, &oracle, 0.0);
    println!("largest error against the f64 oracle: {error:.1e}, of {budget:.1e} allowed");
    Ok(())
}
