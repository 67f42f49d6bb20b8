//! One tile's query rows, a vector lane each.

use crate::host::Inputs;
use crate::problem::{AttentionProblem, Bias};
use std::ops::Range;

/// Everything that stays the same over one call.
pub(super) struct Context<'a> {
    pub(super) problem: &'a AttentionProblem,
    pub(super) inputs: &'a Inputs<'a>,
    /// Factor on q: the similarity's, and log2(e) where nothing follows but the exponential.
    pub(super) q_scale: f32,
    /// What turns a difference of scores into an exponent of two: log2(e), or 1 where q has it.
    pub(super) to_log2: f32,
}

impl<'a> Context<'a> {
    pub(super) fn new(problem: &'a AttentionProblem, inputs: &'a Inputs<'a>) -> Self {
        let scale = problem.effective_scale();
        // Scores in natural units where something is compared with them or added. A bias of f32's
        // lowest number would become -inf otherwise.
        let natural = problem.softcap.is_some()
            || problem.bias.is_some()
            || problem.alibi
            || problem.sinks
            || problem.weights;
        let log2_e = core::f64::consts::LOG2_E;
        let (q_scale, to_log2) =
            if natural { (scale as f32, log2_e as f32) } else { ((scale * log2_e) as f32, 1.0) };
        Self { problem, inputs, q_scale, to_log2 }
    }

    /// Whether a lane may read a key.
    pub(super) fn keeps(&self, tile: &Tile, lane: usize, key: usize) -> bool {
        let Lane { head, query, range } = &tile.lanes[lane];
        let at = [tile.batch, *head, *query, key];
        let dropped = match (self.problem.mask, self.inputs.mask) {
            (Some(layout), Some(mask)) => mask[layout.index(at)] == 0,
            _ => false,
        };
        let excluded = match (self.problem.bias, self.inputs.bias) {
            (Some(Bias { layout, .. }), Some(bias)) => bias.get(layout.index(at)) == f32::NEG_INFINITY,
            _ => false,
        };
        range.contains(&key) && !dropped && !excluded
    }
}

/// A query row.
pub(super) struct Lane {
    pub(super) head: usize,
    pub(super) query: usize,
    /// The keys that causality, window and key length leave it.
    pub(super) range: Range<usize>,
}

/// A run of query rows that share a key-value head.
pub(super) struct Tile {
    pub(super) batch: usize,
    pub(super) kv_head: usize,
    pub(super) lanes: Vec<Lane>,
    /// Keys that any lane may read.
    pub(super) keys: Range<usize>,
    /// Keys that every lane may read: no edge of a range lies inside.
    pub(super) full: Range<usize>,
    /// Position of query 0 for ALiBi.
    pub(super) offset: i64,
}

impl Tile {
    /// `rows` are numbered over `[batch, heads_q, seq_q]` and lie in one batch entry and one
    /// key-value head. There is at least one.
    pub(super) fn new(context: &Context<'_>, rows: Range<usize>) -> Self {
        let p = context.problem;
        let (batch, head) = (rows.start / p.seq_q / p.heads_q, rows.start / p.seq_q % p.heads_q);
        let len_k = context.inputs.len_k(p, batch);
        let lanes: Vec<Lane> = rows
            .map(|row| {
                let (head, query) = (row / p.seq_q % p.heads_q, row % p.seq_q);
                Lane { head, query, range: p.kv_range(query, len_k) }
            })
            .collect();
        let some = || lanes.iter().map(|lane| &lane.range).filter(|range| !range.is_empty());
        let keys = some().map(|r| r.start).min().unwrap_or(0)..some().map(|r| r.end).max().unwrap_or(0);
        let full = lanes.iter().map(|l| l.range.start).max().unwrap_or(0)
            ..lanes.iter().map(|l| l.range.end).min().unwrap_or(0);
        let offset = p.positions_align().offset(p.seq_q, len_k);
        Self { batch, kv_head: p.kv_head(head), lanes, keys, full, offset }
    }
}
