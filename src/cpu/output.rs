//! Writing finished tiles: o by rows, wherever its layout puts them, lse and weights as they come.

use half::{bf16, f16};
use pulp::{Simd, WithSimd};

use super::Isa;
use super::lanes::{Context, Tile};
use super::math::exp2;
use super::state::State;
use super::transpose::transpose;
use crate::dtype::Tensor;
use crate::error::Operand;
use crate::host::Outputs;
use crate::problem::AttentionProblem;

/// The rows of o in logical order, each a slice of its own, so that threads can write them.
pub(super) enum RowsOut<'a> {
    F32(Vec<&'a mut [f32]>),
    F16(Vec<&'a mut [f16]>),
    Bf16(Vec<&'a mut [bf16]>),
}

impl<'a> RowsOut<'a> {
    /// `None` when o's rows are not contiguous.
    pub(super) fn new(problem: &AttentionProblem, o: &'a mut Tensor) -> Option<Self> {
        Some(match o {
            Tensor::F32(x) => Self::F32(split_rows(problem, x)?),
            Tensor::F16(x) => Self::F16(split_rows(problem, x)?),
            Tensor::Bf16(x) => Self::Bf16(split_rows(problem, x)?),
            // Never o.
            Tensor::Int8(_) | Tensor::Int4(_) => return None,
        })
    }

    /// A view of all rows.
    pub(super) fn all(&mut self) -> RowsMut<'_, 'a> {
        match self {
            Self::F32(x) => RowsMut::F32(x),
            Self::F16(x) => RowsMut::F16(x),
            Self::Bf16(x) => RowsMut::Bf16(x),
        }
    }
}

fn split_rows<'a, T>(problem: &AttentionProblem, mut rest: &'a mut [T]) -> Option<Vec<&'a mut [T]>> {
    let [b, h, s, d] = problem.shape(Operand::O);
    let layout = problem.o;
    if layout.strides[3] != 1 && d != 1 {
        return None;
    }
    let mut order: Vec<(usize, usize)> = Vec::with_capacity(b * h * s);
    for head in 0..b * h {
        order.extend((0..s).map(|i| (layout.index([head / h, head % h, i, 0]), head * s + i)));
    }
    if !order.is_sorted() {
        order.sort_unstable();
    }
    let mut out: Vec<&mut [T]> = order.iter().map(|_| Default::default()).collect();
    let mut at = 0;
    for (start, row) in order {
        // Rows interleave only where an innermost dimension of 1 hides another's stride.
        let (_, tail) = rest.split_at_mut_checked(start.checked_sub(at)?)?;
        let (this, tail) = tail.split_at_mut_checked(d)?;
        (out[row], rest, at) = (this, tail, start + d);
    }
    Some(out)
}

/// Some consecutive rows of o.
pub(super) enum RowsMut<'t, 'a> {
    F32(&'t mut [&'a mut [f32]]),
    F16(&'t mut [&'a mut [f16]]),
    Bf16(&'t mut [&'a mut [bf16]]),
}

/// What one tile writes: its rows of every output.
pub(super) struct TileOut<'t, 'a> {
    pub(super) o: RowsMut<'t, 'a>,
    pub(super) lse: Option<&'t mut [f32]>,
    pub(super) weights: Option<&'t mut [f32]>,
}

impl<'t, 'a> TileOut<'t, 'a> {
    /// The first `rows` rows, and the others.
    pub(super) fn split(self, rows: usize, seq_kv: usize) -> (Self, Self) {
        fn pair<T>((a, b): (T, T)) -> (Option<T>, Option<T>) {
            (Some(a), Some(b))
        }
        let (o, o_rest) = match self.o {
            RowsMut::F32(x) => x.split_at_mut(rows).map_both(RowsMut::F32),
            RowsMut::F16(x) => x.split_at_mut(rows).map_both(RowsMut::F16),
            RowsMut::Bf16(x) => x.split_at_mut(rows).map_both(RowsMut::Bf16),
        };
        let (lse, lse_rest) = self.lse.map_or((None, None), |x| pair(x.split_at_mut(rows)));
        let (weights, weights_rest) =
            self.weights.map_or((None, None), |x| pair(x.split_at_mut(rows * seq_kv)));
        (Self { o, lse, weights }, Self { o: o_rest, lse: lse_rest, weights: weights_rest })
    }
}

trait MapBoth<T> {
    fn map_both<U>(self, f: impl Fn(T) -> U) -> (U, U);
}

impl<T> MapBoth<T> for (T, T) {
    fn map_both<U>(self, f: impl Fn(T) -> U) -> (U, U) {
        (f(self.0), f(self.1))
    }
}

impl State {
    /// Writes the rows that these sums give.
    pub(super) fn write(&mut self, context: &Context<'_>, tile: &Tile, out: TileOut<'_, '_>, isa: Isa) {
        let (p, width) = (context.problem, self.width);
        let (acc, row_sum) = self.acc.split_at_mut(p.head_dim_v * width);
        // Without a key o is 0 whatever the sink is.
        let is_empty = |lane: usize| !tile.keys.clone().any(|key| context.keeps(tile, lane, key));
        let inverse: Vec<f32> = (row_sum.iter().enumerate())
            .map(|(lane, &sum)| match sum {
                0.0 => 0.0,
                _ if sum.is_nan() && lane < tile.lanes.len() && is_empty(lane) => 0.0,
                _ => 1.0 / sum,
            })
            .collect();
        acc.iter_mut().zip(&self.non_finite).for_each(|(x, more)| *x += more);
        let shape = [p.head_dim_v, tile.lanes.len()];
        self.rows.resize(shape[0] * shape[1], 0.0);
        transpose(shape, acc, width, &mut self.rows, p.head_dim_v);
        let from = self.rows.chunks_exact(p.head_dim_v).zip(&inverse);
        match out.o {
            RowsMut::F32(rows) => write_rows(rows, from, |x| x),
            RowsMut::F16(rows) => write_rows(rows, from, f16::from_f32),
            RowsMut::Bf16(rows) => write_rows(rows, from, bf16::from_f32),
        }
        let unit = f64::from(context.to_log2) * core::f64::consts::LN_2;
        if let Some(lse) = out.lse {
            for ((lse, &sum), &max) in lse.iter_mut().zip(&*row_sum).zip(&self.row_max) {
                let max = if context.to_log2 == 1.0 { f64::from(max) * unit } else { f64::from(max) };
                *lse = if sum == 0.0 { f32::NEG_INFINITY } else { (max + f64::from(sum).ln()) as f32 };
            }
        }
        if let Some(weights) = out.weights {
            for (lane, row) in weights.chunks_exact_mut(p.seq_kv.max(1)).enumerate() {
                let (max, factor) = (self.row_max[lane], inverse[lane]);
                row[..tile.keys.start].fill(0.0);
                row[tile.keys.end..].fill(0.0);
                let row = &mut row[tile.keys.clone()];
                if factor.is_nan() {
                    // Keys that the row does not read weigh 0 all the same.
                    for (j, weight) in row.iter_mut().enumerate() {
                        *weight = if context.keeps(tile, lane, tile.keys.start + j) { f32::NAN } else { 0.0 };
                    }
                    continue;
                }
                isa.dispatch(Weights { row, max, factor, to_log2: context.to_log2 });
            }
        }
    }
}

/// Rows times their factors.
fn write_rows<'a, T>(
    out: &mut [&mut [T]],
    from: impl Iterator<Item = (&'a [f32], &'a f32)>,
    convert: impl Fn(f32) -> T,
) {
    for (out, (row, factor)) in out.iter_mut().zip(from) {
        out.iter_mut().zip(row).for_each(|(to, &x)| *to = convert(x * factor));
    }
}

/// Scores of one row to weights, in place.
struct Weights<'a> {
    row: &'a mut [f32],
    max: f32,
    factor: f32,
    to_log2: f32,
}

impl WithSimd for Weights<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let [max, factor, to_log2] = [self.max, self.factor, self.to_log2].map(|x| simd.splat_f32s(x));
        let (body, tail) = S::as_mut_simd_f32s(self.row);
        for s in body {
            *s = weight(simd, *s, max, factor, to_log2);
        }
        let last = weight(simd, simd.partial_load_f32s(tail), max, factor, to_log2);
        simd.partial_store_f32s(tail, last);
    }
}

/// `exp(s - max) * factor`. A function, since a closure might not be inlined, and what is not
/// inlined is not compiled for the wide vectors.
#[inline(always)]
fn weight<S: Simd>(simd: S, s: S::f32s, max: S::f32s, factor: S::f32s, to_log2: S::f32s) -> S::f32s {
    simd.mul_f32s(exp2(simd, simd.mul_f32s(simd.sub_f32s(s, max), to_log2)), factor)
}

/// Copies `[batch, heads, seq, dim]` in logical order to a layout whose rows are not contiguous.
pub(super) fn scatter(problem: &AttentionProblem, from: &Tensor, to: &mut Tensor) {
    let [b, h, s, d] = problem.shape(Operand::O);
    let from = from.as_ref();
    for at in 0..b * h * s * d {
        let (row, d) = (at / d, at % d);
        to.set(problem.o.index([row / s / h, row / s % h, row % s, d]), from.get(at));
    }
}

/// Whether `outputs` has the tensors and sizes that the problem gives.
pub(super) fn fits(problem: &AttentionProblem, outputs: &Outputs) -> bool {
    let len = |x: &Option<Vec<f32>>| x.as_ref().map(|x| x.len() as u128);
    let want = |operand| problem.layout(operand).map(|_| problem.extent(operand));
    let o = outputs.o.as_ref();
    (o.dtype(), o.len() as u128) == (problem.out_dtype, problem.extent(Operand::O))
        && len(&outputs.lse) == want(Operand::Lse)
        && len(&outputs.weights) == want(Operand::Weights)
}
