//! What a warm step of decoding costs the host: encoding it, nothing submitted.
//! `cargo bench --bench encode`.

use std::time::{Duration, Instant};

use wgpu_attention::{
    Align, Append, AppendOperands, Attention, AttentionProblem, DeviceRequest, Operands, Rope,
};

const CALLS: u32 = 1000;
const ROUNDS: usize = 9;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let attention = pollster::block_on(Attention::request(&DeviceRequest::default()))?;
    let device = attention.device();
    println!("on {}", attention.caps().adapter);
    let problem = AttentionProblem {
        causal: Some(Align::BottomRight),
        kv_lens: true,
        ..AttentionProblem::new(1, 32, 8, 1, 4096, 128, 128)
    };
    let append = Append {
        rope: Some(Rope { positions: 4096, ..Rope::new(128) }),
        q_new: Some(problem.q),
        advance: true,
        ..Append::new(&problem)
    };
    let plan = attention.plan(&problem)?;
    let buffer = |elements: usize| {
        device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: 4 * elements as u64,
            usage: wgpu::BufferUsages::STORAGE,
            mapped_at_creation: false,
        })
    };
    let (q_new, k_new, v_new) = (buffer(32 * 128), buffer(8 * 128), buffer(8 * 128));
    let (q, k, v) = (buffer(32 * 128), buffer(8 * 4096 * 128), buffer(8 * 4096 * 128));
    let (o, kv_lens, rope) = (buffer(32 * 128), buffer(1), buffer(4096 * 128));
    let new = AppendOperands {
        rope: Some(rope.slice(..)),
        q_new: Some(q_new.slice(..)),
        q: Some(q.slice(..)),
        ..AppendOperands::new(k_new.slice(..), v_new.slice(..), k.slice(..), v.slice(..), kv_lens.slice(..))
    };
    let attend = Operands {
        kv_lens: Some(kv_lens.slice(..)),
        ..Operands::new(q.slice(..), k.slice(..), v.slice(..), o.slice(..))
    };
    let prepared = attention.prepare_append(&append, &new)?.then(attention.prepare(&plan, &attend)?);

    measure("attention, encoded", device, |encoder| attention.encode(encoder, &plan, &attend))?;
    measure("append and attention, encoded", device, |encoder| {
        attention.encode_append(encoder, &append, &new)?;
        attention.encode(encoder, &plan, &attend)
    })?;
    measure("append and attention, prepared", device, |encoder| {
        prepared.encode(encoder);
        Ok(())
    })?;
    println!("append and attention are {} dispatches", prepared.dispatches());
    Ok(())
}

fn measure(
    what: &str,
    device: &wgpu::Device,
    step: impl Fn(&mut wgpu::CommandEncoder) -> wgpu_attention::Result<()>,
) -> wgpu_attention::Result<()> {
    let mut rounds: Vec<[f64; 2]> = Vec::new();
    for _ in 0..=ROUNDS {
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let start = Instant::now();
        for _ in 0..CALLS {
            step(&mut encoder)?;
        }
        let encoded = start.elapsed();
        // wgpu hands the commands to the driver only now, with the barriers between them.
        drop(encoder.finish());
        let micros = |time: Duration| time.as_secs_f64() * 1e6 / f64::from(CALLS);
        rounds.push([micros(encoded), micros(start.elapsed())]);
    }
    // The first round compiles.
    let warm = &mut rounds[1..];
    warm.sort_unstable_by(|a, b| a[1].total_cmp(&b[1]));
    let [encoded, finished] = warm[ROUNDS / 2];
    println!(
        "{encoded:6.1} microseconds, {finished:.1} with the encoder's end: {what} (median of {ROUNDS} x {CALLS})"
    );
    Ok(())
}
