//! The sums that a tile gathers, and how sums over different keys of the same rows join.

use super::lanes::{Context, Tile};

/// The sums of one tile over some of its keys: `acc / row_sum` is the output.
#[derive(Default)]
pub(super) struct State {
    /// `[lanes]`, in the context's units.
    pub(super) row_max: Vec<f32>,
    /// `[head_dim_v + 1][lanes]`; the last row is row_sum.
    pub(super) acc: Vec<f32>,
    /// Lanes of a row of `acc`.
    pub(super) width: usize,
    /// `[head_dim_v][lanes]`: what NaN and infinities in v add to the output; empty when there
    /// are none.
    pub(super) non_finite: Vec<f32>,
    /// `[lanes][head_dim_v]`: the output by rows, before it is divided.
    pub(super) rows: Vec<f32>,
}

impl State {
    /// Joins the sums over other keys of the same rows.
    pub(super) fn merge(&mut self, other: &Self, to_log2: f32) {
        for lane in 0..self.width {
            let (a, b) = (self.row_max[lane], other.row_max[lane]);
            let max = if a > b { a } else { b };
            let weight = |m: f32| if m == max { 1.0 } else { ((m - max) * to_log2).exp2() };
            let (weight_a, weight_b) = (weight(a), weight(b));
            let columns = self.acc[lane..].iter_mut().step_by(self.width);
            for (a, &b) in columns.zip(other.acc[lane..].iter().step_by(self.width)) {
                *a = weight_a * *a + weight_b * b;
            }
            self.row_max[lane] = max;
        }
        if self.non_finite.is_empty() {
            self.non_finite.clone_from(&other.non_finite);
        } else {
            self.non_finite.iter_mut().zip(&other.non_finite).for_each(|(a, b)| *a += b);
        }
    }
}

/// Replaces every NaN and infinity of a block of values by 0 and adds it to the lanes that keep
/// its key.
pub(super) fn take_apart(
    context: &Context<'_>,
    tile: &Tile,
    start: usize,
    dims: usize,
    width: usize,
    values: &mut [f32],
    non_finite: &mut Vec<f32>,
) {
    for (j, row) in values.chunks_exact_mut(dims).enumerate() {
        for (d, value) in row.iter_mut().enumerate().filter(|(_, value)| !value.is_finite()) {
            non_finite.resize(dims * width, 0.0);
            for lane in 0..tile.lanes.len() {
                if context.keeps(tile, lane, start + j) {
                    non_finite[d * width + lane] += *value;
                }
            }
            *value = 0.0;
        }
    }
}
