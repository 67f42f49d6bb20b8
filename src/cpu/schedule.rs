//! Which tiles there are, how they are cut over the keys, and which thread takes them.

use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::Isa;
use super::kernel;
use super::lanes::{Context, Tile};
use super::output::TileOut;
use super::scratch::Scratch;
use super::state::State;
use super::tile::{TILE_KV, TileRun};
use crate::problem::AttentionProblem;

/// Multiply-adds below which waking other threads costs more than they save.
const PARALLEL_WORK: f64 = 200_000.0;

/// Fewest keys of a part when a tile's keys are split.
const SPLIT_KEYS: usize = 4 * TILE_KV;

/// Computes every tile and writes it.
pub(super) fn run(context: &Context<'_>, out: TileOut<'_, '_>, isa: Isa) {
    let p = context.problem;
    let tiles = tiles(p, isa.dispatch(TileRows));
    let serial = p.flops() / 2.0 < PARALLEL_WORK || rayon::current_num_threads() == 1;
    let splits = if serial || p.weights { 1 } else { splits(tiles.len(), p.seq_kv) };

    let mut rest = Some(out);
    let outs = tiles.iter().filter_map(|rows| {
        let (this, others) = rest.take()?.split(rows.len(), p.seq_kv);
        rest = Some(others);
        Some(this)
    });
    if serial {
        let mut memory = Default::default();
        tiles.iter().zip(outs).for_each(|(rows, out)| whole(context, rows, out, isa, &mut memory));
    } else if splits == 1 {
        let work: Vec<_> = tiles.iter().zip(outs).collect();
        work.into_par_iter().with_max_len(1).for_each_init(Default::default, |memory, (rows, out)| {
            whole(context, rows, out, isa, memory);
        });
    } else {
        let outs: Vec<_> = outs.collect();
        let mut parts: Vec<State> = Vec::new();
        (0..tiles.len() * splits)
            .into_par_iter()
            .with_max_len(1)
            .map_init(Scratch::default, |scratch, at| {
                let tile = Tile::new(context, tiles[at / splits].clone());
                let mut state = State::default();
                let keys = part(&tile.keys, at % splits, splits);
                let with_sink = at % splits == 0;
                let run = TileRun {
                    context,
                    tile: &tile,
                    keys,
                    with_sink,
                    scratch,
                    state: &mut state,
                    scores_out: None,
                };
                run.run(isa);
                state
            })
            .collect_into_vec(&mut parts);
        parts.par_chunks_mut(splits).zip(outs).zip(&tiles).for_each(|((parts, out), rows)| {
            // Two and two, so that rounding errors do not grow with their number.
            let mut apart = 1;
            while apart < parts.len() {
                for at in (0..parts.len() - apart).step_by(2 * apart) {
                    let (to, from) = parts.split_at_mut(at + apart);
                    to[at].merge(&from[0], context.to_log2);
                }
                apart *= 2;
            }
            if let Some(first) = parts.first_mut() {
                first.write(context, &Tile::new(context, rows.clone()), out, isa);
            }
        });
    }
}

/// All keys of one tile.
fn whole(
    context: &Context<'_>,
    rows: &Range<usize>,
    mut out: TileOut<'_, '_>,
    isa: Isa,
    (scratch, state): &mut (Scratch, State),
) {
    let tile = Tile::new(context, rows.clone());
    let scores_out = out.weights.as_deref_mut();
    TileRun { context, tile: &tile, keys: tile.keys.clone(), with_sink: true, scratch, state, scores_out }
        .run(isa);
    state.write(context, &tile, out, isa);
}

/// Runs of query rows, numbered over `[batch, heads_q, seq_q]`, that one key-value head serves.
fn tiles(p: &AttentionProblem, lanes: usize) -> Vec<Range<usize>> {
    let group = p.heads_q / p.heads_kv * p.seq_q;
    // Many rows fill tiles by themselves, and heads that do not share one share no masks either.
    let band = if p.has_own_matrices() || p.seq_q >= 4 * lanes { p.seq_q } else { group };
    let bands = (0..p.rows()).step_by(band);
    bands
        .flat_map(|start| {
            (start..start + band).step_by(lanes).map(move |at| at..(at + lanes).min(start + band))
        })
        .collect()
}

/// How many parts the keys are cut into, so that every thread has several pieces.
fn splits(tiles: usize, seq_kv: usize) -> usize {
    let pieces = 4 * rayon::current_num_threads();
    if tiles >= pieces { 1 } else { pieces.div_ceil(tiles).min(seq_kv / SPLIT_KEYS).max(1) }
}

/// Part `at` of `parts` of a range, cut between key blocks.
fn part(keys: &Range<usize>, at: usize, parts: usize) -> Range<usize> {
    let blocks = keys.len().div_ceil(TILE_KV);
    let edge = |at: usize| (keys.start + at * blocks / parts * TILE_KV).min(keys.end);
    edge(at)..edge(at + 1)
}

/// Query rows of a tile.
struct TileRows;

impl WithSimd for TileRows {
    type Output = usize;

    fn with_simd<S: Simd>(self, _: S) -> usize {
        kernel::most_vectors::<S>() * S::F32_LANES
    }
}
