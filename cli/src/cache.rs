//! Where the keys of a cache lie, and the numbers that its rows hold.

use wgpu_attention::{AttentionProblem, Cache, Inputs, Operand, TensorRef, dequantize, row_elements};

/// Entry and row of k and v where key `j` of a batch entry lies.
pub(crate) fn place(p: &AttentionProblem, inputs: &Inputs<'_>, batch: usize, j: usize) -> [usize; 2] {
    let list = |list: Option<&[u32]>, at: usize| list.map_or(0, |list| list[at] as usize);
    match p.cache {
        Cache::Ring { capacity } => [batch, j % capacity],
        Cache::Paged { page_size, max_blocks, .. } => {
            [list(inputs.block_table, batch * max_blocks + j / page_size), j % page_size]
        }
        Cache::Ragged { .. } => [0, list(inputs.cu_seqlens_k, batch) + j],
        _ => [batch, j],
    }
}

/// Key or value `j` of a batch entry and key-value head, widened to f32.
pub(crate) fn row(
    p: &AttentionProblem,
    inputs: &Inputs<'_>,
    operand: Operand,
    [batch, head, j]: [usize; 3],
) -> Vec<f32> {
    let (tensor, layout, dim) = match operand {
        Operand::K => (inputs.k, p.k, p.head_dim),
        _ => (inputs.v, p.v, p.head_dim_v),
    };
    let [entry, row] = place(p, inputs, batch, j);
    let at = layout.index([entry, head, row, 0]);
    let words = at..at + row_elements(tensor.dtype(), dim);
    match tensor {
        TensorRef::Int8(x) => dequantize(TensorRef::Int8(&x[words]), dim),
        TensorRef::Int4(x) => dequantize(TensorRef::Int4(&x[words]), dim),
        floats => (0..dim).map(|d| floats.get(at + d * layout.strides[3])).collect(),
    }
}

/// Bytes of the keys and values that queries see, each once: those between the first key of the first query
/// and the last of the last.
pub(crate) fn bytes_seen(p: &AttentionProblem, inputs: &Inputs<'_>) -> u64 {
    let keys = |batch: usize| {
        let len = inputs.kv_lens.map_or(p.seq_kv, |lens| lens[batch] as usize);
        let Some(last) = p.seq_q.checked_sub(1) else { return 0 };
        p.kv_range(last, len).end.saturating_sub(p.kv_range(0, len).start)
    };
    let keys: usize = (0..p.batch).map(keys).sum();
    let elements = row_elements(p.stored_kv(), p.head_dim) + row_elements(p.stored_kv(), p.head_dim_v);
    (keys * p.heads_kv) as u64 * (elements * p.stored_kv().bytes()) as u64
}
