//! Random problems moved into caches and ragged batches: the same keys, kept in another way, and poison in
//! every row and page that no key is in.

use wgpu_attention::{
    Align, AttentionProblem, Cache, Dtype, Operand, Tensor, Window, quantize, row_elements,
};

use super::random::{each_index, layout};
use crate::cache;
use crate::data::Data;
use crate::prng::Prng;

/// Moves keys and values, and now and then queries.
pub(crate) fn moved(prng: &mut Prng, plain: AttentionProblem, data: Data) -> (AttentionProblem, Data) {
    let mut to = (plain.clone(), data.clone());
    let lens: Vec<usize> = (0..plain.batch)
        .map(|b| data.kv_lens.as_ref().map_or(plain.seq_kv, |lens| lens[b] as usize))
        .collect();
    keep(prng, &mut to, &lens);
    let (p, moved) = &mut to;
    p.kv_dtype = (!prng.one_in(3)).then(|| prng.pick(Dtype::ALL));
    p.k = layout(prng, p.shape(Operand::K), p.stored_kv().is_float());
    p.v = layout(prng, p.shape(Operand::V), p.stored_kv().is_float());
    moved.k = stored(p, moved, (&plain, &data), Operand::K, &lens);
    moved.v = stored(p, moved, (&plain, &data), Operand::V, &lens);
    if prng.one_in(2) {
        pack_queries(prng, &mut to);
    }
    to
}

/// Draws the cache and its lists.
fn keep(prng: &mut Prng, (p, data): &mut (AttentionProblem, Data), lens: &[usize]) {
    match prng.below(7) {
        0 | 1 => {
            // Without a window a ring is as long as the sequence: nothing goes round.
            if !prng.one_in(4) {
                let (left, right) =
                    (Some(prng.pick(&[0, 1, 7, 16, 33])), prng.pick(&[None, Some(0), Some(2)]));
                (p.window, p.align) = (Some(Window { left, right }), Align::BottomRight);
                // A causal mask's alignment is the window's, too.
                p.causal = p.causal.map(|_| Align::BottomRight);
            }
            p.cache = Cache::Ring { capacity: p.least_ring() + prng.pick(&[0, 0, 1, 5]) };
        }
        2..=4 => {
            let page_size = prng.pick(&[1, 2, 7, 16, 16, 32, 64, 256]);
            let blocks = |len: usize| len.div_ceil(page_size);
            let used: usize = lens.iter().map(|&len| blocks(len)).sum();
            let (pages, max_blocks) = (used + 1 + prng.below(4), blocks(p.seq_kv) + prng.below(3));
            // Any permutation, and no sense in what no key needs.
            let mut free: Vec<u32> = (0..pages as u32).collect();
            let mut table: Vec<u32> =
                (0..p.batch * max_blocks).map(|_| prng.pick(&[0, 7, u32::MAX, pages as u32])).collect();
            for (b, &len) in lens.iter().enumerate() {
                for page in &mut table[b * max_blocks..][..blocks(len)] {
                    *page = free.swap_remove(prng.below(free.len()));
                }
            }
            p.cache = Cache::Paged { pages, page_size, max_blocks };
            data.block_table = Some(table);
        }
        5 => {
            let list = offsets(lens);
            p.cache = Cache::Ragged { total: list[lens.len()] as usize };
            (p.kv_lens, data.kv_lens) = (false, None);
            data.cu_seqlens_k = Some(list);
        }
        _ => {}
    }
}

/// Where each of several ragged sequences begins, and the last ends.
fn offsets(lens: &[usize]) -> Vec<u32> {
    let mut list = vec![0];
    for len in lens {
        list.push(list[list.len() - 1] + *len as u32);
    }
    list
}

/// k or v of a plain problem as the cache of another keeps it.
fn stored(
    p: &AttentionProblem,
    moved: &Data,
    (plain, data): (&AttentionProblem, &Data),
    operand: Operand,
    lens: &[usize],
) -> Tensor {
    let (layout, dim) = if operand == Operand::K { (p.k, p.head_dim) } else { (p.v, p.head_dim_v) };
    let mut tensor = poisoned(p.stored_kv(), p.extent(operand) as usize);
    let shape = [1, 1, 1, row_elements(p.stored_kv(), dim)];
    for (b, &len) in lens.iter().enumerate() {
        let first = if let Cache::Ring { capacity } = p.cache { len.saturating_sub(capacity) } else { 0 };
        for (h, j) in (0..p.heads_kv).flat_map(|h| (first..len).map(move |j| (h, j))) {
            let numbers = cache::row(plain, &data.inputs(), operand, [b, h, j]);
            let row = quantize(p.stored_kv(), &numbers, dim);
            let [entry, at] = cache::place(p, &moved.inputs(), b, j);
            let mut d = 0;
            each_index(&layout.at(layout.index([entry, h, at, 0])), shape, |to| {
                match (&mut tensor, &row) {
                    (Tensor::Int8(to_words), Tensor::Int8(row))
                    | (Tensor::Int4(to_words), Tensor::Int4(row)) => to_words[to] = row[d],
                    (tensor, row) => tensor.set(to, row.as_ref().get(d)),
                }
                d += 1;
            });
        }
    }
    tensor
}

/// Elements that make a NaN of everything.
fn poisoned(dtype: Dtype, len: usize) -> Tensor {
    match dtype {
        Dtype::Int8 => Tensor::Int8(vec![0x7fc0_7fc0; len]),
        Dtype::Int4 => Tensor::Int4(vec![0x7fc0_7fc0; len]),
        _ => Tensor::from_f32(dtype, &vec![f32::NAN; len]),
    }
}

/// Leaves some entries fewer queries or none, and no padding between them.
fn pack_queries(prng: &mut Prng, (p, data): &mut (AttentionProblem, Data)) {
    let from = p.clone();
    let counts: Vec<usize> = (0..p.batch)
        .map(|_| {
            let any = prng.below(p.seq_q + 1);
            prng.pick(&[p.seq_q, p.seq_q, p.seq_q.min(1), 0, any])
        })
        .collect();
    let list = offsets(&counts);
    p.total_q = Some(list[p.batch] as usize);
    p.q = layout(prng, p.shape(Operand::Q), true);
    p.o = layout(prng, p.shape(Operand::O), true);
    let mut q = poisoned(p.dtype, p.extent(Operand::Q) as usize);
    for (b, &count) in counts.iter().enumerate() {
        for (h, i) in (0..p.heads_q).flat_map(|h| (0..count).map(move |i| (h, i))) {
            for d in 0..p.query_dim() {
                let x = data.q.as_ref().get(from.q.index([b, h, i, d]));
                q.set(p.q.index([0, h, list[b] as usize + i, d]), x);
            }
        }
    }
    data.q = q;
    data.cu_seqlens_q = Some(list);
}
