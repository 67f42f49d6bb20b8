//! Random problems: sizes at tile edges, every option, uneven strides, every second one in a cache or a ragged
//! batch, poison wherever no kernel may read.

use wgpu_attention::{Align, AttentionProblem, Bias, Dtype, Layout, Operand, Similarity, Tensor, Window};

use super::kept;
use crate::data::Data;
use crate::prng::Prng;

/// Lengths around the sizes that tiles have.
const LENGTHS: [usize; 22] =
    [0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 257];
const LONG: [usize; 4] = [1000, 2049, 4096, 10_001];
const WIDTHS: [usize; 16] = [1, 2, 3, 4, 8, 16, 20, 31, 32, 33, 64, 65, 80, 96, 128, 256];
/// Multiply-adds of one case: the oracle computes each.
const MAX_WORK: usize = 3_000_000;

/// A problem and its data.
pub(crate) fn case(prng: &mut Prng, dtype: Dtype) -> (AttentionProblem, Data) {
    let mut problem = sizes(prng, dtype);
    options(prng, &mut problem);
    layouts(prng, &mut problem);
    debug_assert_eq!(problem.validate(), Ok(()));
    let mut data = Data::random(&problem, prng);
    vary(prng, &problem, &mut data);
    poison(&problem, &mut data);
    let (problem, data) = if prng.one_in(2) { kept::moved(prng, problem, data) } else { (problem, data) };
    debug_assert_eq!(problem.validate(), Ok(()));
    (problem, data)
}

fn sizes(prng: &mut Prng, dtype: Dtype) -> AttentionProblem {
    loop {
        let long = prng.one_in(12);
        let heads_kv = prng.pick(&[1, 1, 2, 3]);
        let heads_q = heads_kv * prng.pick(&[1, 1, 2, 4]);
        let batch = prng.pick(&[1, 1, 2, 3]);
        let seq_q = if long { 1 + prng.below(3) } else { prng.pick(&LENGTHS) };
        let seq_kv = if long { prng.pick(&LONG) } else { prng.pick(&LENGTHS) };
        let head_dim = prng.pick(&WIDTHS);
        let head_dim_v = if prng.one_in(3) { prng.pick(&WIDTHS) } else { head_dim };
        // Empty problems are legal and quickly tried: a few are enough.
        if seq_q * seq_kv == 0 && !prng.one_in(4) {
            continue;
        }
        let p = AttentionProblem::new(batch, heads_q, heads_kv, seq_q, seq_kv, head_dim, head_dim_v);
        if p.rows() * seq_kv * (head_dim + head_dim_v) <= MAX_WORK {
            return p.with_dtype(dtype);
        }
    }
}

fn options(prng: &mut Prng, p: &mut AttentionProblem) {
    let align = [Align::TopLeft, Align::BottomRight];
    p.similarity = match prng.below(8) {
        0 | 1 => Similarity::Dot,
        2 | 3 => {
            let query_dim = if prng.one_in(2) { p.head_dim } else { prng.pick(&WIDTHS[..11]) };
            Similarity::Bilinear { query_dim, per_head: prng.one_in(2) }
        }
        4 => Similarity::Cosine,
        5 => {
            let query_dim = if prng.one_in(2) { p.head_dim } else { prng.pick(&WIDTHS[..11]) };
            Similarity::Additive { query_dim, hidden: 1 + prng.below(24), per_head: prng.one_in(2) }
        }
        _ => Similarity::ScaledDot,
    };
    p.scale = prng.one_in(4).then(|| prng.pick(&[0.5, 0.125, -0.3, 1.0, 0.0]));
    p.softcap = prng.one_in(4).then(|| prng.pick(&[2.0, 30.0, 50.0]));
    let pairs = [p.batch, p.heads_q, p.seq_q, p.seq_kv];
    p.bias =
        prng.one_in(4).then(|| Bias { dtype: prng.pick(&Dtype::FLOATS), layout: broadcast(prng, pairs) });
    p.mask = prng.one_in(4).then(|| broadcast(prng, pairs));
    p.alibi = prng.one_in(5);
    p.causal = prng.one_in(3).then(|| prng.pick(&align));
    p.window = prng.one_in(4).then(|| {
        let mut side = || (!prng.one_in(3)).then(|| prng.pick(&[0, 1, 2, 7, 16, 33, 100]));
        Window { left: side(), right: side() }
    });
    p.align = prng.pick(&align);
    p.kv_lens = prng.one_in(4);
    p.sinks = prng.one_in(5);
    p.lse = !prng.one_in(4);
    p.weights = prng.one_in(3);
    if prng.one_in(6) {
        p.out_dtype = Dtype::F32;
    }
}

/// Each dimension whole or repeated.
fn broadcast(prng: &mut Prng, full: [usize; 4]) -> Layout {
    Layout::broadcast(full.map(|n| if prng.one_in(3) { 1 } else { n })).at(prng.pick(&[0, 0, 1, 5]))
}

fn layouts(prng: &mut Prng, p: &mut AttentionProblem) {
    p.q = layout(prng, p.shape(Operand::Q), true);
    p.k = layout(prng, p.shape(Operand::K), true);
    p.v = layout(prng, p.shape(Operand::V), true);
    p.o = layout(prng, p.shape(Operand::O), true);
}

/// One of the usual orders, now and then with gaps between rows, between elements if they are `apart`, or in
/// front.
pub(crate) fn layout(prng: &mut Prng, [_, h, s, d]: [usize; 4], apart: bool) -> Layout {
    let step = if prng.one_in(10) && apart { 2 } else { 1 };
    let row = d * step + prng.pick(&[0, 0, 0, 1, 4]);
    let (head, token) = if prng.one_in(2) { (row * s, row) } else { (row, row * h) };
    let entry = row * s * h + prng.pick(&[0, 0, 0, 3, 8]);
    Layout { offset: prng.pick(&[0, 0, 0, 4, 7]), strides: [entry, head, token, step] }
}

/// What the plain generator does not bring: no key at all for some queries, biases of -inf, sinks
/// and key lengths at their ends.
fn vary(prng: &mut Prng, p: &AttentionProblem, data: &mut Data) {
    if let Some(mask) = &mut data.mask {
        let keep_one_in = prng.pick(&[1, 2, 20]);
        for byte in mask.iter_mut() {
            // Any byte but 0 keeps.
            *byte = if prng.one_in(keep_one_in) { prng.pick(&[1, 1, 2, 255]) } else { 0 };
        }
    }
    if let Some(bias) = &mut data.bias {
        for at in 0..bias.as_ref().len() {
            if prng.one_in(9) {
                bias.set(at, f32::NEG_INFINITY);
            }
        }
    }
    if let Some(lens) = &mut data.kv_lens {
        for len in lens {
            *len = prng.pick(&[0, 1, p.seq_kv as u32, *len, *len]).min(p.seq_kv as u32);
        }
    }
}

/// NaN at every element that no kernel may read: between rows, before the first, behind the keys.
fn poison(p: &AttentionProblem, data: &mut Data) {
    let clean = |p: &AttentionProblem, operand: Operand, tensor: &Tensor, lens: Option<&[u32]>| {
        let Some(layout) = p.layout(operand) else { return tensor.clone() };
        let [b, h, s, d] = p.shape(operand);
        let mut poisoned = Tensor::from_f32(tensor.as_ref().dtype(), &vec![f32::NAN; tensor.as_ref().len()]);
        for entry in 0..b {
            // Keys are rows of k and v, and columns of the bias.
            let len = lens.map_or(usize::MAX, |lens| lens[entry] as usize);
            let shape = if operand == Operand::Bias { [1, h, s, d.min(len)] } else { [1, h, s.min(len), d] };
            let here = layout.at(layout.index([entry, 0, 0, 0]));
            each_index(&here, shape, |at| poisoned.set(at, tensor.as_ref().get(at)));
        }
        poisoned
    };
    let lens = data.kv_lens.as_deref();
    data.q = clean(p, Operand::Q, &data.q, None);
    data.k = clean(p, Operand::K, &data.k, lens);
    data.v = clean(p, Operand::V, &data.v, lens);
    data.bias = data.bias.as_ref().map(|bias| clean(p, Operand::Bias, bias, lens));
}

/// Calls `each` with the index of every element of a shape.
pub(crate) fn each_index(layout: &Layout, [b, h, s, d]: [usize; 4], mut each: impl FnMut(usize)) {
    for row in 0..b * h * s {
        for x in 0..d {
            each(layout.index([row / s / h, row / s % h, row % s, x]));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::describe;

    #[test]
    fn cases_are_valid_and_the_same_again() {
        for seed in 0..300 {
            let (p, data) = case(&mut Prng::new(seed), Dtype::FLOATS[seed as usize % 3]);
            assert!(data.inputs().check(&p).is_ok(), "seed {seed}: {:?}", data.inputs().check(&p));
            let (again, _) = case(&mut Prng::new(seed), Dtype::FLOATS[seed as usize % 3]);
            assert_eq!(p, again);
            // What is read is no poison: the cache has every key that it must have.
            if p.bias.is_none() {
                let o = wgpu_attention::reference::oracle(&p, &data.inputs()).unwrap().o;
                assert!(o.iter().all(|x| x.is_finite()), "seed {seed}: {}", describe(&p));
            }
        }
    }
}
