//! What a warm call costs the host: encoding a step of decoding, nothing submitted.
//! `cargo bench --bench encode`.

use std::time::Instant;

use wgpu_attention::{Attention, AttentionProblem, DeviceRequest, Operands};

const CALLS: u32 = 1000;
const ROUNDS: usize = 9;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let attention = pollster::block_on(Attention::request(&DeviceRequest::default()))?;
    let device = attention.device();
    println!("on {}", attention.caps().adapter);
    let problem = AttentionProblem { kv_lens: true, ..AttentionProblem::new(1, 32, 8, 1, 4096, 128, 128) };
    let plan = attention.plan(&problem)?;
    let buffer = |elements: usize| {
        device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: 4 * elements as u64,
            usage: wgpu::BufferUsages::STORAGE,
            mapped_at_creation: false,
        })
    };
    let (q, k, v) = (buffer(32 * 128), buffer(8 * 4096 * 128), buffer(8 * 4096 * 128));
    let (o, kv_lens) = (buffer(32 * 128), buffer(1));
    let operands = Operands { kv_lens: Some(&kv_lens), ..Operands::new(&q, &k, &v, &o) };
    let mut rounds: Vec<f64> = Vec::new();
    for _ in 0..=ROUNDS {
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let start = Instant::now();
        for _ in 0..CALLS {
            attention.encode(&mut encoder, &plan, &operands)?;
        }
        rounds.push(start.elapsed().as_secs_f64() * 1e6 / f64::from(CALLS));
        drop(encoder);
    }
    // The first round compiles.
    let warm = &mut rounds[1..];
    warm.sort_unstable_by(f64::total_cmp);
    println!(
        "{:.1} microseconds to encode a step of {} dispatches (median of {ROUNDS} rounds of {CALLS})",
        warm[ROUNDS / 2],
        plan.dispatches().count()
    );
    Ok(())
}
