//! Learns to look three tokens back: queries and keys are parameters, values are given, and gradient descent moves the
//! former until each row of o is the value of the token three places before. `cargo run --release --example train`.

use wgpu_attention::{Align, Attention, AttentionProblem, BackwardProblem, DeviceRequest, Inputs, Tensor};

const TOKENS: usize = 48;
const DIM: usize = 32;
/// How far back the answer lies.
const BACK: usize = 3;
const STEPS: usize = 300;
const RATE: f32 = 40.0;
const MOMENTUM: f32 = 0.9;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    pollster::block_on(run())
}

async fn run() -> Result<(), Box<dyn std::error::Error>> {
    let attention = Attention::request(&DeviceRequest::default()).await?;
    println!("on {}", attention.caps().adapter);
    let problem = AttentionProblem {
        causal: Some(Align::TopLeft),
        ..AttentionProblem::new(1, 1, 1, TOKENS, TOKENS, DIM, DIM)
    };
    let backward = BackwardProblem::of(&problem);

    // Any numbers that are not all alike.
    let numbers = |seed: f32| -> Vec<f32> { (1..=TOKENS * DIM).map(|i| (i as f32 * seed).sin()).collect() };
    let (mut q, mut k, v) = (numbers(12.9898), numbers(78.233), numbers(37.719));
    let (mut pace_q, mut pace_k) = (vec![0.0; q.len()], vec![0.0; k.len()]);
    // The first rows have nothing so far back: they look at the first token.
    let target = |at: usize| v[(at / DIM).saturating_sub(BACK) * DIM + at % DIM];

    for step in 0..=STEPS {
        let inputs = Inputs::new(&q[..], &k[..], &v[..]);
        let o = attention.run(&problem, &inputs).await?.o.to_f32();
        // The loss is the mean square of what is off; its gradient by o is twice that over their number.
        let off: Vec<f32> = o.iter().enumerate().map(|(at, o)| o - target(at)).collect();
        let loss = off.iter().map(|x| x * x).sum::<f32>() / off.len() as f32;
        if step % 50 == 0 {
            println!("step {step:3}: loss {loss:.5}");
        }
        let dout: Vec<f32> = off.iter().map(|x| 2.0 * x / off.len() as f32).collect();
        let gradients = attention.run_backward(&backward, &inputs, &dout[..]).await?;
        let descend = |x: &mut [f32], pace: &mut [f32], gradient: &Tensor| {
            for ((x, pace), gradient) in x.iter_mut().zip(pace).zip(gradient.to_f32()) {
                *pace = MOMENTUM * *pace - RATE * gradient;
                *x += *pace;
            }
        };
        descend(&mut q, &mut pace_q, &gradients.dq);
        descend(&mut k, &mut pace_k, &gradients.dk);
        if step == STEPS && loss > 0.01 {
            return Err(format!("a loss of {loss} after {STEPS} steps").into());
        }
    }
    Ok(())
}
