//! Generation against a paged cache that stays on the GPU: 64 steps, each of which appends the new token's
//! key and value, turned by its position, and attends. What a step does is prepared once; nothing is read
//! back in between. `cargo run --release --example generate_step`.

use std::time::Instant;

use wgpu_attention::{
    Align, Append, AppendOperands, Attention, AttentionProblem, Cache, DeviceRequest, Dtype, Inputs, Layout,
    Operands, PageAllocator, Rope, Sequence, Status, read_buffer, reference,
};

const STEPS: usize = 64;
/// Pages of the cache, tokens of a page, and the most pages of a sequence.
const PAGES: usize = 32;
const PAGE: usize = 16;
const BLOCKS: usize = 16;
/// A small model's layer: query heads, key-value heads, and their width.
const HEADS: usize = 9;
const HEADS_KV: usize = 3;
const DIM: usize = 64;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    pollster::block_on(run())
}

async fn run() -> Result<(), Box<dyn std::error::Error>> {
    let attention = Attention::request(&DeviceRequest::default()).await?;
    let (device, queue) = (attention.device(), attention.queue());
    println!("on {}", attention.caps().adapter);

    // One new token against all up to it. How many there are lies on the GPU: one plan serves every length.
    let capacity = PAGE * BLOCKS;
    let problem = AttentionProblem {
        causal: Some(Align::BottomRight),
        kv_lens: true,
        status: true,
        ..AttentionProblem::new(1, HEADS, HEADS_KV, 1, capacity, DIM, DIM)
    }
    .with_cache(Cache::Paged { pages: PAGES, page_size: PAGE, max_blocks: BLOCKS }, Dtype::F32);
    let rope = Rope { positions: capacity, ..Rope::new(DIM) };
    let angles = rope.table(10_000.0);
    let append = Append { rope: Some(rope), q_new: Some(problem.q), advance: true, ..Append::new(&problem) };

    // New buffers are zero: an empty cache, and nothing wrong yet.
    let buffer = |label, elements: usize| {
        device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(label),
            size: 4 * elements as u64,
            usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        })
    };
    let [q_new, q, o] = ["q_new", "q", "o"].map(|label| buffer(label, HEADS * DIM));
    let [k_new, v_new] = ["k_new", "v_new"].map(|label| buffer(label, HEADS_KV * DIM));
    let [k, v] = ["k", "v"].map(|label| buffer(label, PAGES * PAGE * HEADS_KV * DIM));
    let [kv_lens, status] = ["kv_lens", "status"].map(|label| buffer(label, 1));
    let block_table = buffer("block_table", BLOCKS);
    let table = buffer("rope", angles.len());
    queue.write_buffer(&table, 0, bytemuck::cast_slice(&angles));

    let step = attention
        .prepare_append(
            &append,
            &AppendOperands {
                q_new: Some(q_new.slice(..)),
                q: Some(q.slice(..)),
                rope: Some(table.slice(..)),
                block_table: Some(block_table.slice(..)),
                status: Some(status.slice(..)),
                ..AppendOperands::new(
                    k_new.slice(..),
                    v_new.slice(..),
                    k.slice(..),
                    v.slice(..),
                    kv_lens.slice(..),
                )
            },
        )?
        .then(attention.prepare(
            &attention.plan(&problem)?,
            &Operands {
                kv_lens: Some(kv_lens.slice(..)),
                block_table: Some(block_table.slice(..)),
                status: Some(status.slice(..)),
                ..Operands::new(q.slice(..), k.slice(..), v.slice(..), o.slice(..))
            },
        )?);

    // What the model's projections would make of each token, [token, head, dim].
    let wave =
        |step: f32, heads| (0..STEPS * heads * DIM).map(|i| (i as f32 * step).sin()).collect::<Vec<_>>();
    let (mut queries, mut keys, values) = (wave(0.37, HEADS), wave(0.11, HEADS_KV), wave(0.73, HEADS_KV));
    let outputs = buffer("o of all steps", STEPS * HEADS * DIM);

    let mut pages = PageAllocator::new(PAGES as u32);
    let mut sequence = Sequence::new(PAGE)?;
    let start = Instant::now();
    for token in 0..STEPS {
        if !sequence.append(&mut pages, 1)?.is_empty() {
            queue.write_buffer(&block_table, 0, bytemuck::cast_slice(sequence.pages()));
        }
        for (to, from) in [(&q_new, &queries), (&k_new, &keys), (&v_new, &values)] {
            let row = from.len() / STEPS;
            queue.write_buffer(to, 0, bytemuck::cast_slice(&from[token * row..][..row]));
        }
        let mut encoder = device.create_command_encoder(&Default::default());
        step.encode(&mut encoder);
        encoder.copy_buffer_to_buffer(&o, 0, &outputs, token as u64 * o.size(), o.size());
        queue.submit([encoder.finish()]);
    }
    let bytes = read_buffer(device, queue, &outputs, 0..outputs.size()).await?;
    let outputs: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes);
    println!("{STEPS} steps in {:.1} ms", start.elapsed().as_secs_f64() * 1e3);
    let word = read_buffer(device, queue, &status, 0..4).await?;
    println!("status: {}", Status(bytemuck::pod_read_unaligned(&word)));

    // All steps at once are causal attention of each token over itself and those before it.
    for (rows, heads) in [(&mut queries, HEADS), (&mut keys, HEADS_KV)] {
        rows.chunks_mut(DIM).enumerate().for_each(|(i, row)| rope.turn(row, i / heads, &angles));
    }
    let problem = AttentionProblem {
        causal: Some(Align::TopLeft),
        q: Layout::bshd(HEADS, STEPS, DIM),
        k: Layout::bshd(HEADS_KV, STEPS, DIM),
        v: Layout::bshd(HEADS_KV, STEPS, DIM),
        ..AttentionProblem::new(1, HEADS, HEADS_KV, STEPS, STEPS, DIM, DIM)
    };
    let oracle = reference::oracle(&problem, &Inputs::new(&queries[..], &keys[..], &values[..]))?;
    // The oracle gives [head, token, dim].
    let got = (0..HEADS).flat_map(|h| (0..STEPS).map(move |t| (t * HEADS + h) * DIM));
    let got = got.flat_map(|at| outputs[at..][..DIM].iter().map(|&x| f64::from(x)));
    let (error, budget) =
        (reference::max_error(got, &oracle.o), reference::tolerance(&problem, &oracle, 0.0));
    println!("largest error of all steps against the f64 oracle: {error:.1e}, of {budget:.1e} allowed");
    if error > budget { Err("an output is wrong".into()) } else { Ok(()) }
}
