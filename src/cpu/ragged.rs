//! Ragged batches: each entry is a problem of its own.

use rayon::prelude::*;

use super::Isa;
use super::compute;
use crate::cache::Cache;
use crate::error::Operand;
use crate::host::{Inputs, Outputs};
use crate::layout::Layout;
use crate::problem::AttentionProblem;

/// Whether queries or keys are ragged.
pub(super) fn is_ragged(problem: &AttentionProblem) -> bool {
    problem.total_q.is_some() || matches!(problem.cache, Cache::Ragged { .. })
}

/// Computes every entry, side by side, and gathers what they give.
pub(super) fn run(problem: &AttentionProblem, inputs: &Inputs<'_>, outputs: &mut Outputs, isa: Isa) {
    let entries: Vec<_> = (0..problem.batch)
        .into_par_iter()
        .map(|batch| {
            let (own, own_inputs) = entry(problem, inputs, batch);
            let mut out = Outputs::zeros(&own);
            compute(&own, &own_inputs, &mut out, isa);
            (own, out)
        })
        .collect();
    for (batch, (own, out)) in entries.iter().enumerate() {
        gather(problem, inputs, batch, own, out, outputs);
    }
}

/// One entry, with o contiguous.
fn entry<'a>(p: &AttentionProblem, inputs: &Inputs<'a>, batch: usize) -> (AttentionProblem, Inputs<'a>) {
    let mut own = AttentionProblem { batch: 1, total_q: None, ..p.clone() };
    let mut own_inputs = Inputs { cu_seqlens_q: None, cu_seqlens_k: None, ..*inputs };
    own.seq_q = inputs.len_q(p, batch);
    own.q.offset += match inputs.cu_seqlens_q {
        Some(list) => list[batch] as usize * p.q.strides[2],
        None => batch * p.q.strides[0],
    };
    own.o = Layout::bhsd(p.heads_q, own.seq_q, p.head_dim_v);
    let first = inputs.cu_seqlens_k.map_or(0, |list| list[batch] as usize);
    for layout in [&mut own.k, &mut own.v] {
        layout.offset += match p.cache {
            Cache::Contiguous | Cache::Ring { .. } => batch * layout.strides[0],
            Cache::Ragged { .. } => first * layout.strides[2],
            Cache::Paged { .. } => 0,
        };
    }
    if matches!(p.cache, Cache::Ragged { .. }) {
        own.cache = Cache::Contiguous;
        own.seq_kv = inputs.len_k(p, batch);
    }
    for layout in own.bias.iter_mut().map(|bias| &mut bias.layout).chain(own.mask.iter_mut()) {
        layout.offset += batch * layout.strides[0];
    }
    own_inputs.kv_lens = inputs.kv_lens.map(|lens| &lens[batch..=batch]);
    if let (Cache::Paged { max_blocks, .. }, Some(table)) = (p.cache, inputs.block_table) {
        own_inputs.block_table = Some(&table[batch * max_blocks..][..max_blocks]);
    }
    (own, own_inputs)
}

/// Puts what one entry gave in its places.
fn gather(
    p: &AttentionProblem,
    inputs: &Inputs<'_>,
    batch: usize,
    own: &AttentionProblem,
    from: &Outputs,
    to: &mut Outputs,
) {
    let [_, _, rows, _] = p.shape(Operand::O);
    let [first_entry, first_row] = match inputs.cu_seqlens_q {
        Some(list) => [0, list[batch] as usize],
        None => [batch, 0],
    };
    let o = from.o.as_ref();
    for (h, i) in (0..p.heads_q).flat_map(|h| (0..own.seq_q).map(move |i| (h, i))) {
        for d in 0..p.head_dim_v {
            to.o.set(p.o.index([first_entry, h, first_row + i, d]), o.get(own.o.index([0, h, i, d])));
        }
        let at = h * own.seq_q + i;
        if let (Some(to), Some(from)) = (&mut to.lse, &from.lse) {
            to[(first_entry * p.heads_q + h) * rows + first_row + i] = from[at];
        }
        if let (Some(to), Some(from)) = (&mut to.weights, &from.weights) {
            let row = ((batch * p.heads_q + h) * p.seq_q + i) * p.seq_kv;
            to[row..][..own.seq_kv].copy_from_slice(&from[at * own.seq_kv..][..own.seq_kv]);
        }
    }
}
