//! Ten thousand steps of generation leave no allocation behind.

mod common;

use std::alloc::System;

use common::gpu::{self, Kind, USAGE, upload};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use wgpu_attention::{
    Align, Append, AppendOperands, Attention, AttentionProblem, Cache, Dtype, Operands, Rope,
};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const STEPS: usize = 10_000;

/// Allocations that are alive, and their bytes.
fn alive() -> [isize; 2] {
    let stats = ALLOCATOR.stats();
    [
        stats.allocations as isize - stats.deallocations as isize,
        stats.bytes_allocated as isize - stats.bytes_deallocated as isize,
    ]
}

/// Submits, and waits until everything has run and been cleaned up.
fn submit(attention: &Attention, encoder: wgpu::CommandEncoder) {
    attention.queue().submit([encoder.finish()]);
    attention.device().poll(wgpu::PollType::wait_indefinitely()).expect("the device answers");
}

/// Each step is submitted by itself; every other is encoded anew rather than prepared.
#[test]
fn steps_of_generation_leak_nothing() {
    let Some(gpu) = gpu::get(Kind::Full, false) else { return };
    let attention = &gpu.attention;
    let (heads_q, heads_kv, dim, capacity) = (4, 2, 16, 64);
    let problem = AttentionProblem {
        causal: Some(Align::BottomRight),
        kv_lens: true,
        status: true,
        ..AttentionProblem::new(1, heads_q, heads_kv, 1, capacity, dim, dim)
    }
    .with_cache(Cache::Paged { pages: 8, page_size: 8, max_blocks: 8 }, Dtype::F32);
    let rope = Rope { positions: capacity, ..Rope::new(dim) };
    let append = Append { rope: Some(rope), q_new: Some(problem.q), advance: true, ..Append::new(&problem) };
    let device = attention.device();
    let zeros = |elements: usize| upload(device, "zeros", &vec![0; 4 * elements], USAGE);
    let (row_q, row_kv, pool) = (heads_q * dim, heads_kv * dim, capacity * heads_kv * dim);
    let (q_new, k_new, v_new) = (zeros(row_q), zeros(row_kv), zeros(row_kv));
    let (q, k, v, o) = (zeros(row_q), zeros(pool), zeros(pool), zeros(row_q));
    let (kv_lens, status) = (zeros(1), zeros(1));
    let table = upload(device, "table", bytemuck::cast_slice(&[3_u32, 1, 4, 0, 5, 2, 6, 7]), USAGE);
    let table_of_angles = upload(device, "rope", bytemuck::cast_slice(&rope.table(1e4)), USAGE);
    let new = AppendOperands {
        block_table: Some(table.slice(..)),
        rope: Some(table_of_angles.slice(..)),
        q_new: Some(q_new.slice(..)),
        q: Some(q.slice(..)),
        status: Some(status.slice(..)),
        ..AppendOperands::new(k_new.slice(..), v_new.slice(..), k.slice(..), v.slice(..), kv_lens.slice(..))
    };
    let attend = Operands {
        kv_lens: Some(kv_lens.slice(..)),
        block_table: Some(table.slice(..)),
        status: Some(status.slice(..)),
        ..Operands::new(q.slice(..), k.slice(..), v.slice(..), o.slice(..))
    };
    let plan = attention.plan(&problem).expect("served");
    let prepared = attention
        .prepare_append(&append, &new)
        .and_then(|append| Ok(append.then(attention.prepare(&plan, &attend)?)))
        .expect("served");
    let step = |number: usize| {
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        if number.is_multiple_of(capacity) {
            encoder.clear_buffer(&kv_lens, 0, None);
        }
        if number.is_multiple_of(2) {
            prepared.encode(&mut encoder);
        } else {
            attention.encode_append(&mut encoder, &append, &new).expect("served");
            attention.encode(&mut encoder, &plan, &attend).expect("served");
        }
        submit(attention, encoder);
    };
    // Pools fill up first.
    (0..STEPS / 10).for_each(step);
    let (before, scratch) = (alive(), attention.scratch_bytes());
    (0..STEPS).for_each(step);
    let after = alive();
    common::say(&format!("{before:?} allocations and bytes alive before {STEPS} steps, {after:?} after"));
    assert_eq!(attention.scratch_bytes(), scratch);
    // A leak of one a step would be thousands; pools may still take a few.
    assert!(after[0] - before[0] < 100, "{} more allocations", after[0] - before[0]);
    assert!(after[1] - before[1] < 256 << 10, "{} more bytes", after[1] - before[1]);
}
