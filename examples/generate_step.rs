//! Generation against a cache that stays on the GPU: 64 steps, each one submission that appends the new
//! token's key and value, raises the length, and attends. One plan serves them all, and nothing is read
//! back in between. `cargo run --release --example generate_step`.

use std::time::Instant;

use wgpu_attention::{
    Align, Attention, AttentionProblem, DeviceRequest, Inputs, Layout, Operands, read_buffer, reference,
};

const STEPS: usize = 64;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    pollster::block_on(run())
}

async fn run() -> Result<(), Box<dyn std::error::Error>> {
    let attention = Attention::request(&DeviceRequest::default()).await?;
    let (device, queue) = (attention.device(), attention.queue());
    println!("on {}", attention.caps().adapter);

    // A small model's layer: 9 query heads, 3 key-value heads, width 64; [batch, seq, heads, head_dim], so
    // that what a token adds to the cache lies in one place.
    let (heads_q, heads_kv, head_dim, capacity) = (9, 3, 64, 256);
    let row = heads_kv * head_dim;
    let problem = AttentionProblem {
        q: Layout::bshd(heads_q, 1, head_dim),
        k: Layout::bshd(heads_kv, capacity, head_dim),
        v: Layout::bshd(heads_kv, capacity, head_dim),
        o: Layout::bshd(heads_q, 1, head_dim),
        causal: Some(Align::BottomRight),
        // The cache's length is a number on the GPU: the plan need not know it.
        kv_lens: true,
        ..AttentionProblem::new(1, heads_q, heads_kv, 1, capacity, head_dim, head_dim)
    };
    let plan = attention.plan(&problem)?;

    let buffer = |label, elements: usize| {
        device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(label),
            size: 4 * elements as u64,
            usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        })
    };
    // What the model's projections would write in each step, all of it made up beforehand.
    let wave = |step: f32, n: usize| (0..n).map(|i| (i as f32 * step).sin()).collect::<Vec<f32>>();
    let (q, k, v) =
        (wave(0.37, STEPS * heads_q * head_dim), wave(0.11, STEPS * row), wave(0.73, STEPS * row));
    let lengths: Vec<u32> = (1..=STEPS as u32).collect();
    let new =
        [("q of each step", &q), ("k of each step", &k), ("v of each step", &v)].map(|(label, data)| {
            let new = buffer(label, data.len());
            queue.write_buffer(&new, 0, bytemuck::cast_slice(data));
            new
        });
    let new_lens = buffer("lengths", STEPS);
    queue.write_buffer(&new_lens, 0, bytemuck::cast_slice(&lengths));

    let (q_now, o) = (buffer("q", heads_q * head_dim), buffer("o", heads_q * head_dim));
    let (k_cache, v_cache) = (buffer("k cache", capacity * row), buffer("v cache", capacity * row));
    let kv_lens = buffer("kv_lens", 1);
    let operands = Operands { kv_lens: Some(&kv_lens), ..Operands::new(&q_now, &k_cache, &v_cache, &o) };

    let start = Instant::now();
    for step in 0..STEPS as u64 {
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let (query, token) = (4 * (heads_q * head_dim) as u64, 4 * row as u64);
        encoder.copy_buffer_to_buffer(&new[0], step * query, &q_now, 0, query);
        encoder.copy_buffer_to_buffer(&new[1], step * token, &k_cache, step * token, token);
        encoder.copy_buffer_to_buffer(&new[2], step * token, &v_cache, step * token, token);
        encoder.copy_buffer_to_buffer(&new_lens, 4 * step, &kv_lens, 0, 4);
        attention.encode(&mut encoder, &plan, &operands)?;
        queue.submit([encoder.finish()]);
    }
    let last: Vec<f32> = bytemuck::pod_collect_to_vec(&read_buffer(device, queue, &o, 0..o.size()).await?);
    println!("{STEPS} steps in {:.1} ms, the first of which compiles", start.elapsed().as_secs_f64() * 1e3);

    // The last step, from scratch: its query against all keys.
    let problem = AttentionProblem {
        q: problem.q,
        k: Layout::bshd(heads_kv, STEPS, head_dim),
        v: Layout::bshd(heads_kv, STEPS, head_dim),
        o: problem.o,
        ..AttentionProblem::new(1, heads_q, heads_kv, 1, STEPS, head_dim, head_dim)
    };
    let inputs = Inputs::new(&q[(STEPS - 1) * heads_q * head_dim..], &k[..], &v[..]);
    let oracle = reference::oracle(&problem, &inputs)?;
    let error = reference::max_error(last.into_iter().map(f64::from), &oracle.o);
    println!("largest error of the last step against the f64 oracle: {error:.1e}");
    Ok(())
}
