//! Linear maps `y = x W^T + b` on every core.
//!
//! As in the rest of this module, rows lie across vector lanes, and the other operand (W) enters as scalars
//! that are broadcast. x is transposed once, `[inputs][lanes]` for each group of rows; W is read straight
//! from memory where it lies as `[outputs, inputs]` in f32, and copied block by block otherwise. Sums run in
//! levels. Few rows (decoding) would leave lanes empty: there inputs or outputs lie across them, and W is
//! read once.

use half::{bf16, f16};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::Isa;
use super::kernel::{part_of_rows, sum_products};
use super::load::{Rows, read};
use super::scratch::Aligned;
use crate::dtype::{Tensor, TensorRef};
use crate::error::{Operand, Result};
use crate::layout::Layout;
use crate::linear::{LinearInputs, LinearProblem};

/// Sums run in three levels: inputs of a chain of products, and inputs of which the outer sums take care before
/// the third level does.
const LEVEL: usize = 64;
const FAR: usize = 1024;

/// Elements of x that products with some outputs after the others read again and again: half of the first cache.
const BLOCK: usize = 4096;

/// Rows of a piece of work, and outputs: what of x it reads for each block of outputs, and its sums, fit the
/// second cache. Multiples of every vector's length, and of 6 and 8.
const BLOCK_ROWS: usize = 256;
const BLOCK_OUTPUTS: usize = 96;

/// Rows that are computed with inputs or outputs across the lanes.
const FEW_ROWS: usize = 8;

/// Elements of x that are transposed at a time (16 MiB).
const MOST_PACKED: usize = 4 << 20;

/// Multiply-adds below which waking other threads costs more than they save.
const PARALLEL_WORK: f64 = 200_000.0;

/// Computes a linear map on the CPU: y as its layout says, as long as that reaches, with 0 between its
/// elements.
///
/// ```
/// use wgpu_attention::{Dtype, LinearInputs, LinearProblem, cpu};
/// let (x, w, b) = ([1.0_f32, 2.0], [3.0_f32, 4.0, 5.0, 6.0], [0.5_f32, 0.25]);
/// let inputs = LinearInputs { bias: Some(b[..].into()), ..LinearInputs::new(&x[..], &w[..]) };
/// let y = cpu::linear(&LinearProblem::new(1, 2, 2).with_bias(Dtype::F32), &inputs)?;
/// assert_eq!(y.to_f32(), [11.5, 17.25]);
/// # Ok::<(), wgpu_attention::Error>(())
/// ```
///
/// # Errors
/// Those of [`LinearInputs::check`].
pub fn linear(problem: &LinearProblem, inputs: &LinearInputs<'_>) -> Result<Tensor> {
    inputs.check(problem)?;
    let mut y = Tensor::zeros(problem.out_dtype, problem.extent(Operand::Y) as usize);
    compute(problem, inputs, &mut y, Isa::new());
    Ok(y)
}

/// [`linear()`] into memory of the caller's, which is replaced where it is too short or of another type. What
/// lies between y's elements is left as it was: projections may share the rows of one tensor.
///
/// # Errors
/// Those of [`LinearInputs::check`]; y is then untouched.
pub fn linear_into(problem: &LinearProblem, inputs: &LinearInputs<'_>, y: &mut Tensor) -> Result<()> {
    inputs.check(problem)?;
    let need = problem.extent(Operand::Y) as usize;
    if y.as_ref().dtype() != problem.out_dtype || y.as_ref().len() < need {
        *y = Tensor::zeros(problem.out_dtype, need);
    }
    compute(problem, inputs, y, Isa::new());
    Ok(())
}

/// The call itself, checks done, with a given instruction set.
pub(super) fn compute(problem: &LinearProblem, inputs: &LinearInputs<'_>, y: &mut Tensor, isa: Isa) {
    if problem.rows == 0 {
        return;
    }
    let map = Map { problem, inputs, isa };
    match y {
        Tensor::F32(y) => map.run(y),
        Tensor::F16(y) => map.run(y),
        Tensor::Bf16(y) => map.run(y),
        // Never y.
        Tensor::Int8(_) | Tensor::Int4(_) => {}
    }
}

/// An element type of y.
trait Element: Copy + Default + Send + Sync {
    fn of(x: f32) -> Self;
}

impl Element for f32 {
    fn of(x: f32) -> Self {
        x
    }
}

impl Element for f16 {
    fn of(x: f32) -> Self {
        Self::from_f32(x)
    }
}

impl Element for bf16 {
    fn of(x: f32) -> Self {
        Self::from_f32(x)
    }
}

/// A call.
#[derive(Clone, Copy)]
struct Map<'a> {
    problem: &'a LinearProblem,
    inputs: &'a LinearInputs<'a>,
    isa: Isa,
}

/// A piece of work: some rows and outputs, each row's part of y a slice of its own.
struct Piece<'y, T> {
    first_row: usize,
    first_output: usize,
    y: Vec<&'y mut [T]>,
}

impl<T> Piece<'_, T> {
    fn shape(&self) -> Shape {
        Shape { rows: self.y.len(), first_output: self.first_output, outputs: self.y[0].len() }
    }
}

/// What of y a piece is. The sums know no more of it, and so are compiled once for all its types.
#[derive(Clone, Copy)]
struct Shape {
    rows: usize,
    first_output: usize,
    outputs: usize,
}

/// Memory that a thread keeps from piece to piece.
#[derive(Default)]
struct Scratch {
    /// Sums: `[outputs][rows]`, or `[rows][outputs]` where rows are few.
    sums: Aligned,
    /// Those of the current level, where rows are few.
    level: Aligned,
    /// Those of the last level.
    far: Aligned,
    w: Vec<f32>,
}

impl Map<'_> {
    fn run<T: Element>(&self, y: &mut [T]) {
        let p = self.problem;
        if let Some(rows) = split_rows(p.y, p.rows, p.outputs, y) {
            return self.rows(rows);
        }
        let mut dense = vec![T::default(); p.rows * p.outputs];
        self.rows(dense.chunks_exact_mut(p.outputs).collect());
        for (i, value) in dense.into_iter().enumerate() {
            y[p.y.index([0, 0, i / p.outputs, i % p.outputs])] = value;
        }
    }

    fn rows<T: Element>(&self, mut y: Vec<&mut [T]>) {
        let p = self.problem;
        let serial = p.flops() / 2.0 < PARALLEL_WORK || rayon::current_num_threads() == 1;
        let lanes = self.isa.dispatch(Lanes);
        if p.rows <= FEW_ROWS {
            let mut x = vec![0.0; p.rows * p.inputs];
            for (row, x) in x.chunks_exact_mut(p.inputs).enumerate() {
                self.read_x(row, 0, x);
            }
            let pieces = pieces(0, &mut y, p.outputs);
            return each(serial, pieces, |piece, scratch| {
                let shape = piece.shape();
                self.isa.dispatch(Few { map: self, x: &x, shape, scratch });
                let sums = &*scratch.sums.get(shape.rows * shape.outputs);
                self.write(piece, &mut scratch.w, |row| sums[row * shape.outputs..][..shape.outputs].iter());
            });
        }
        let vectors = if p.rows <= lanes { 1 } else { 2 };
        let width = vectors * lanes;
        let most = (MOST_PACKED / p.inputs / BLOCK_ROWS).max(1) * BLOCK_ROWS;
        let mut packed = Aligned::default();
        for (at, y) in y.chunks_mut(most).enumerate() {
            let (first, count) = (at * most, y.len());
            let packed = packed.get(count.div_ceil(width) * width * p.inputs);
            let groups = packed.chunks_exact_mut(width * p.inputs).enumerate();
            let pack = |(group, to): (usize, &mut [f32])| {
                let rows = first + group * width..(first + count).min(first + (group + 1) * width);
                self.pack(rows, to, width);
            };
            if serial {
                groups.for_each(pack);
            } else {
                groups.collect::<Vec<_>>().into_par_iter().for_each(pack);
            }
            let packed = &*packed;
            each(serial, pieces(first, y, p.outputs), |piece, scratch| {
                let groups = (piece.first_row - first) / width..;
                let x = &packed[groups.start * width * p.inputs..];
                let shape = piece.shape();
                let stride = match vectors {
                    1 => self.isa.dispatch(Many::<1> { map: self, x, shape, scratch }),
                    _ => self.isa.dispatch(Many::<2> { map: self, x, shape, scratch }),
                };
                let sums = &*scratch.sums.get(shape.outputs * stride);
                self.write(piece, &mut scratch.w, |row| sums[row..].iter().step_by(stride));
            });
        }
    }

    /// Neighbouring inputs of a row of x, widened.
    fn read_x(&self, row: usize, input: usize, to: &mut [f32]) {
        let x = self.problem.x;
        read(&self.inputs.x, x.index([0, 0, row, input]), step(x, self.problem.inputs), to);
    }

    /// Rows of x, transposed: `to[input * width + lane]`; 0 in lanes that have no row.
    fn pack(&self, rows: std::ops::Range<usize>, to: &mut [f32], width: usize) {
        // Few enough that the lines which are written stay in the first cache.
        const INPUTS: usize = 64;
        let mut x = [0.0; INPUTS];
        for (at, to) in to.chunks_mut(INPUTS * width).enumerate() {
            let x = &mut x[..to.len() / width];
            for lane in 0..width {
                match rows.start + lane < rows.end {
                    true => self.read_x(rows.start + lane, at * INPUTS, x),
                    false => x.fill(0.0),
                }
                to[lane..].iter_mut().step_by(width).zip(&*x).for_each(|(to, x)| *to = *x);
            }
        }
    }

    /// Rows of W for some outputs, from an input on: borrowed where they lie so.
    fn w<'b>(
        &'b self,
        first_output: usize,
        outputs: usize,
        input: usize,
        inputs: usize,
        buffer: &'b mut Vec<f32>,
    ) -> Rows<'b> {
        let (p, w) = (self.problem, self.inputs.w);
        let [.., to_output, _] = p.w.strides;
        let at = |output: usize, input: usize| p.w.index([0, 0, output, input]);
        let to_input = step(p.w, p.inputs);
        if let (TensorRef::F32(w), 1) = (w, to_input) {
            let stride = if p.outputs > 1 { to_output } else { inputs };
            return Rows { data: &w[at(first_output, input)..], stride };
        }
        buffer.resize(outputs * inputs, 0.0);
        if to_input == 1 {
            for (i, row) in buffer.chunks_exact_mut(inputs).enumerate() {
                read(&w, at(first_output + i, input), 1, row);
            }
        } else {
            let mut column = [0.0; BLOCK_OUTPUTS];
            for i in 0..inputs {
                let column = &mut column[..outputs];
                read(&w, at(first_output, input + i), if p.outputs > 1 { to_output } else { 1 }, column);
                buffer[i..].iter_mut().step_by(inputs).zip(&*column).for_each(|(to, w)| *to = *w);
            }
        }
        Rows { data: buffer, stride: inputs }
    }

    /// Writes the sums of a piece: those of each of its rows, as `sums` gives them.
    fn write<'s, T: Element, I: Iterator<Item = &'s f32>>(
        &self,
        piece: Piece<'_, T>,
        buffer: &mut Vec<f32>,
        sums: impl Fn(usize) -> I,
    ) {
        let first_row = piece.first_row;
        let (Some(bias), Some(values)) = (self.problem.bias, self.inputs.bias) else {
            for (row, y) in piece.y.into_iter().enumerate() {
                y.iter_mut().zip(sums(row)).for_each(|(y, sum)| *y = T::of(*sum));
            }
            return;
        };
        let [.., to_row, _] = bias.layout.strides;
        for (row, y) in piece.y.into_iter().enumerate() {
            buffer.resize(y.len(), 0.0);
            // Most often all rows have one.
            if row == 0 || to_row != 0 {
                let at = bias.layout.index([0, 0, first_row + row, piece.first_output]);
                read(&values, at, step(bias.layout, self.problem.outputs), buffer);
            }
            y.iter_mut().zip(sums(row)).zip(&*buffer).for_each(|((y, sum), bias)| *y = T::of(sum + bias));
        }
    }
}

/// The step from one input to the next; 1 where there is but one.
fn step(layout: Layout, inputs: usize) -> usize {
    if inputs > 1 { layout.strides[3] } else { 1 }
}

/// The rows of y, each a slice of its own, so that threads can write them; `None` where they are not
/// contiguous.
fn split_rows<T>(layout: Layout, rows: usize, outputs: usize, mut y: &mut [T]) -> Option<Vec<&mut [T]>> {
    if step(layout, outputs) != 1 {
        return None;
    }
    let mut all = Vec::with_capacity(rows);
    let mut at = 0;
    for row in 0..rows {
        let start = layout.index([0, 0, row, 0]);
        let (_, rest) = y.split_at_mut(start - at);
        let (this, rest) = rest.split_at_mut(outputs);
        all.push(this);
        (y, at) = (rest, start + outputs);
    }
    Some(all)
}

/// Rows of y, of which the first is `first`, cut into pieces.
fn pieces<'y, T>(first: usize, y: &'y mut [&mut [T]], outputs: usize) -> Vec<Piece<'y, T>> {
    let mut all = Vec::new();
    for (block, rows) in y.chunks_mut(BLOCK_ROWS).enumerate() {
        let mut across: Vec<Piece<'y, T>> = (0..outputs)
            .step_by(BLOCK_OUTPUTS)
            .map(|first_output| Piece { first_row: first + block * BLOCK_ROWS, first_output, y: Vec::new() })
            .collect();
        for row in rows {
            for (piece, y) in across.iter_mut().zip(row.chunks_mut(BLOCK_OUTPUTS)) {
                piece.y.push(y);
            }
        }
        all.extend(across);
    }
    all
}

fn each<'y, T: Element>(
    serial: bool,
    pieces: Vec<Piece<'y, T>>,
    work: impl Fn(Piece<'y, T>, &mut Scratch) + Sync,
) {
    if serial {
        let mut scratch = Scratch::default();
        pieces.into_iter().for_each(|piece| work(piece, &mut scratch));
    } else {
        let pieces = pieces.into_par_iter().with_max_len(1);
        pieces.for_each_init(Scratch::default, |scratch, piece| work(piece, scratch));
    }
}

/// f32 lanes of a vector.
struct Lanes;

impl WithSimd for Lanes {
    type Output = usize;

    fn with_simd<S: Simd>(self, _: S) -> usize {
        S::F32_LANES
    }
}

/// The sums of a piece of many rows, `NV` vectors of them at a time: `[outputs][stride]`. Gives the stride.
struct Many<'a, const NV: usize> {
    map: &'a Map<'a>,
    /// Transposed, from the piece's first row on.
    x: &'a [f32],
    shape: Shape,
    scratch: &'a mut Scratch,
}

impl<const NV: usize> WithSimd for Many<'_, NV> {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> usize {
        let Self { map, x, shape: Shape { rows, first_output, outputs }, scratch } = self;
        let (inputs, width) = (map.problem.inputs, NV * S::F32_LANES);
        let groups = rows.div_ceil(width);
        // A line more, so that columns do not all begin in the same few sets of a cache.
        let stride = groups * width + 16;
        let sums = scratch.sums.get(outputs * stride);
        sums.fill(0.0);
        let far = scratch.far.get(if inputs > FAR { outputs * stride } else { 0 });
        far.fill(0.0);
        let block = (BLOCK / width).min(FAR);
        for input in (0..inputs).step_by(block) {
            if input > 0 && input % FAR == 0 {
                fold(sums, far);
            }
            let count = block.min(inputs - input);
            let w = map.w(first_output, outputs, input, count, &mut scratch.w);
            for group in 0..groups {
                let x = &x[(group * inputs + input) * width..][..count * width];
                let sums = &mut sums[group * width..];
                let mut at = 0;
                macro_rules! blocks_of {
                    ($outputs:literal) => {
                        while outputs - at >= $outputs {
                            let w = Rows { data: &w.data[at * w.stride..], stride: w.stride };
                            products::<S, $outputs, NV>(simd, x, w, &mut sums[at * stride..], stride);
                            at += $outputs;
                        }
                    };
                }
                // With more of them the sums might not stay in registers: the compiler does not unroll so far.
                if S::REGISTER_COUNT >= 32 {
                    blocks_of!(8);
                }
                blocks_of!(6);
                blocks_of!(1);
            }
        }
        sums.iter_mut().zip(&*far).for_each(|(sum, far)| *sum += far);
        stride
    }
}

/// `sums[output * stride + lane] += sum over inputs of w[output][input] * x[input][lane]`.
#[inline(always)]
fn products<S: Simd, const N: usize, const NV: usize>(
    simd: S,
    x: &[f32],
    w: Rows<'_>,
    sums: &mut [f32],
    stride: usize,
) {
    let x = S::as_simd_f32s(x).0.as_chunks::<NV>().0;
    for (level, x) in x.chunks(LEVEL).enumerate() {
        let w = part_of_rows(w.data, w.stride, level * LEVEL, x.len());
        let sum = sum_products::<S, N, NV>(simd, w, x);
        for n in 0..N {
            let to = S::as_mut_simd_f32s(&mut sums[n * stride..][..NV * S::F32_LANES]).0;
            for v in 0..NV {
                to[v] = simd.add_f32s(to[v], sum[n][v]);
            }
        }
    }
}

/// `far += sums`, and nothing is left in `sums`.
#[inline(always)]
fn fold(sums: &mut [f32], far: &mut [f32]) {
    for (sum, far) in sums.iter_mut().zip(far) {
        *far += core::mem::take(sum);
    }
}

/// The sums of a piece of few rows: `[rows][outputs]`.
struct Few<'a> {
    map: &'a Map<'a>,
    /// `[rows][inputs]`.
    x: &'a [f32],
    shape: Shape,
    scratch: &'a mut Scratch,
}

impl WithSimd for Few<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { map, x, shape: Shape { rows, first_output, outputs }, scratch } = self;
        let p = map.problem;
        let Scratch { sums, level, far, w: buffer } = scratch;
        let sums = sums.get(rows * outputs);
        sums.fill(0.0);
        if step(p.w, p.inputs) == 1 {
            // Inputs across the lanes, some rows of W at a time.
            let level = LEVEL * S::F32_LANES;
            for input in (0..p.inputs).step_by(level) {
                let count = level.min(p.inputs - input);
                let w = map.w(first_output, outputs, input, count, buffer);
                let x = &x[input..];
                let mut output = 0;
                macro_rules! blocks_of {
                    ($outputs:literal, $rows:literal, $row:ident) => {
                        while rows - $row >= $rows {
                            let w = core::array::from_fn(|o| &w.data[(output + o) * w.stride..][..count]);
                            let x = core::array::from_fn(|r| &x[($row + r) * p.inputs..][..count]);
                            let dots = dots::<S, $outputs, $rows>(simd, w, x);
                            for (r, dots) in dots.iter().enumerate() {
                                let sums = &mut sums[($row + r) * outputs + output..];
                                sums.iter_mut().zip(dots).for_each(|(sum, dot)| *sum += dot);
                            }
                            $row += $rows;
                        }
                    };
                }
                while outputs - output >= 4 {
                    let mut row = 0;
                    if S::REGISTER_COUNT >= 32 {
                        blocks_of!(4, 4, row);
                    }
                    blocks_of!(4, 2, row);
                    blocks_of!(4, 1, row);
                    output += 4;
                }
                while output < outputs {
                    let mut row = 0;
                    blocks_of!(1, 1, row);
                    output += 1;
                }
            }
        } else {
            // Outputs across the lanes.
            let level = level.get(rows * outputs);
            level.fill(0.0);
            let to_output = if p.outputs > 1 { p.w.strides[2] } else { 1 };
            buffer.resize(outputs.max(buffer.len()), 0.0);
            let far = far.get(rows * outputs);
            far.fill(0.0);
            for first in (0..p.inputs).step_by(LEVEL) {
                if first > 0 && first % FAR == 0 {
                    fold(sums, far);
                }
                for input in first..(first + LEVEL).min(p.inputs) {
                    let at = p.w.index([0, 0, first_output, input]);
                    let w = match (map.inputs.w, to_output) {
                        (TensorRef::F32(w), 1) => &w[at..][..outputs],
                        (w, _) => {
                            read(&w, at, to_output, &mut buffer[..outputs]);
                            &buffer[..outputs]
                        }
                    };
                    for (row, level) in level.chunks_exact_mut(outputs).enumerate() {
                        add_product(simd, level, x[row * p.inputs + input], w);
                    }
                }
                fold(level, sums);
            }
            sums.iter_mut().zip(&*far).for_each(|(sum, far)| *sum += far);
        }
    }
}

/// The products of rows of W with rows of x.
#[inline(always)]
fn dots<S: Simd, const O: usize, const R: usize>(simd: S, w: [&[f32]; O], x: [&[f32]; R]) -> [[f32; O]; R] {
    let w = w.map(|w| S::as_simd_f32s(w));
    let x = x.map(|x| S::as_simd_f32s(x));
    let mut sum = [[simd.splat_f32s(0.0); O]; R];
    // All have one length; told so, the compiler checks no index.
    let vectors = w[0].0.len();
    let (w_body, x_body) = (w.map(|w| &w.0[..vectors]), x.map(|x| &x.0[..vectors]));
    for at in 0..vectors {
        for r in 0..R {
            for o in 0..O {
                sum[r][o] = simd.mul_add_e_f32s(w_body[o][at], x_body[r][at], sum[r][o]);
            }
        }
    }
    // Loops: a closure might not be inlined, and so not be compiled for the wide vectors.
    let mut dots = [[0.0; O]; R];
    for r in 0..R {
        let x = simd.partial_load_f32s(x[r].1);
        for o in 0..O {
            let w = simd.partial_load_f32s(w[o].1);
            dots[r][o] = simd.reduce_sum_f32s(simd.mul_add_e_f32s(w, x, sum[r][o]));
        }
    }
    dots
}

/// `sums += x * w`.
#[inline(always)]
fn add_product<S: Simd>(simd: S, sums: &mut [f32], x: f32, w: &[f32]) {
    let x = simd.splat_f32s(x);
    let (sums, sums_tail) = S::as_mut_simd_f32s(sums);
    let (w, w_tail) = S::as_simd_f32s(w);
    for (sum, w) in sums.iter_mut().zip(w) {
        *sum = simd.mul_add_e_f32s(x, *w, *sum);
    }
    if !w_tail.is_empty() {
        let sum = simd.mul_add_e_f32s(x, simd.partial_load_f32s(w_tail), simd.partial_load_f32s(sums_tail));
        simd.partial_store_f32s(sums_tail, sum);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::isas;
    use super::*;
    use crate::reference;

    /// Each instruction set against the oracle: [`linear`] itself takes only the best one.
    #[test]
    fn every_instruction_set() {
        for isa in isas() {
            for (rows, inputs, outputs) in
                [(1, 300, 100), (3, 70, 5), (8, 33, 97), (9, 64, 24), (17, 259, 13), (70, 31, 200)]
            {
                let p = LinearProblem::new(rows, inputs, outputs);
                let numbers = |n: usize| -> Vec<f32> { (0..n).map(|i| (i as f32 * 0.73).sin()).collect() };
                let (x, w) = (numbers(rows * inputs), numbers(outputs * inputs));
                let inputs = LinearInputs::new(&x[..], &w[..]);
                for p in [p, p.with_transposed_weights()] {
                    let want = reference::linear(&p, &inputs).unwrap();
                    let mut y = Tensor::zeros(p.out_dtype, rows * outputs);
                    compute(&p, &inputs, &mut y, isa);
                    for (i, (got, y)) in y.to_f32().into_iter().zip(&want.y).enumerate() {
                        let error = (f64::from(got) - y).abs();
                        assert!(error <= want.tolerance(&p, i), "{isa:?} {p:?}: y[{i}] = {got}, {y}");
                    }
                }
            }
        }
    }
}
