//! Laws of the contract: relations between runs that hold whatever the numbers are. Each on fresh
//! seeds, which a failure prints (`WGPU_ATTENTION_SEED` repeats it), on the CPU and the GPU.

mod common;

use std::sync::Arc;

use common::case::{Axes, Case, Lens, Sim, Spread, Storage, fill, indices};
use common::check::Expected;
use common::rng::{Rng, fresh_seed, has_turn};
use common::subject::{Outcome, Subject};
use wgpu_attention::{Align, Bias, Dtype, Family, Layout, Operand, Outputs, Similarity, Tensor, Window};

/// Runs a law on every subject of a short list with a seed of its own. (Laws are about f32 tensors:
/// the budgets of f16 are as wide as the differences that a law looks for.)
fn hold(law: impl Fn(Subject, &mut Rng)) {
    for subject in Subject::few().into_iter().filter(|subject| subject.takes(Dtype::F32)) {
        for _ in (0..2).filter(|&time| has_turn(time)) {
            let seed = fresh_seed();
            let run = std::panic::AssertUnwindSafe(|| law(subject, &mut Rng::new(seed)));
            if let Err(panic) = std::panic::catch_unwind(run) {
                eprintln!("{subject:?} breaks the law with WGPU_ATTENTION_SEED={seed:#x}");
                std::panic::resume_unwind(panic);
            }
        }
    }
}

/// What the subject gives; every subject of the list serves everything that the laws ask for, but
/// that some give no weights.
fn run(subject: Subject, case: &Case) -> Outputs {
    match subject.run(&subject.asked(case)) {
        Ok(Outcome::Done(out, _)) => *out,
        Ok(Outcome::Unsupported(why)) => panic!("{subject:?} does not serve a law's case: {why}"),
        Err(e) => panic!("{subject:?}: {e}\n  {}", case.name),
    }
}

/// Sizes that cross a tile edge somewhere, quick enough for the oracle.
fn draw(rng: &mut Rng) -> Axes {
    Axes {
        batch: 1 + rng.below(2),
        heads: rng.pick(&[(1, 1), (2, 2), (4, 2), (3, 1)]),
        seq_q: 1 + rng.below(70),
        seq_kv: 1 + rng.below(140),
        head_dim: 1 + rng.below(70),
        head_dim_v: 1 + rng.below(70),
        storage: rng.pick(&[Storage::Bhsd, Storage::Bshd, Storage::Odd]),
        spread: rng.pick(&[1.0, 4.0]),
        weights: true,
        ..Axes::default()
    }
}

/// Two runs of what is mathematically one problem: each may be off by its own budget.
#[track_caller]
fn alike(law: &str, a: (&Case, &Outputs), b: (&Case, &Outputs)) {
    let (expected, other) = (Expected::of(a.0), Expected::of(b.0));
    let (o, lse) = (expected.o + other.o, expected.lse + other.lse);
    close(law, "o", &a.1.o_contiguous(&a.0.problem), &b.1.o_contiguous(&b.0.problem), o);
    if let (Some(x), Some(y)) = (&a.1.lse, &b.1.lse) {
        close(law, "lse", x, y, lse);
    }
}

#[track_caller]
fn close(law: &str, what: &str, got: &[f32], want: &[f32], budget: f64) {
    assert_eq!(got.len(), want.len(), "{law}: {what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let fine = got == want || f64::from((got - want).abs()) <= budget;
        assert!(fine, "{law}: {what}[{i}] is {got:e}, expected {want:e} +- {budget:e}");
    }
}

/// The same case with other keys: `seq_kv` of them from `first` on, all options that have a key
/// dimension moved along.
fn keys(case: &Case, first: usize, seq_kv: usize) -> Case {
    let mut part = case.clone();
    let p = &mut part.problem;
    p.seq_kv = seq_kv;
    for (layout, dim) in [(&mut p.k, 2), (&mut p.v, 2)] {
        layout.offset += first * layout.strides[dim];
    }
    for layout in p.mask.iter_mut().chain(p.bias.as_mut().map(|bias| &mut bias.layout)) {
        layout.offset += first * layout.strides[3];
    }
    part.name = format!("keys {first}.. of {}", case.name);
    part
}

/// Any split of the keys merges to the whole: `lse = ln sum exp(lse_i)`, `o = sum w_i o_i`.
#[test]
fn a_split_of_the_keys_merges_to_the_whole() {
    hold(|subject, rng| {
        let axes = Axes {
            mask: rng.chance(0.5).then_some(Spread::Full),
            bias: rng.chance(0.5).then_some((Dtype::F32, Spread::Shared, true)),
            ..draw(rng)
        };
        let whole = Axes { weights: false, ..axes }.build(rng.next());
        let p = &whole.problem;
        let mut cuts = vec![0, p.seq_kv];
        cuts.extend((0..3).map(|_| rng.below(p.seq_kv + 1)));
        cuts.sort_unstable();
        let parts: Vec<(Vec<f32>, Vec<f32>)> = cuts
            .windows(2)
            .map(|cut| {
                let part = keys(&whole, cut[0], cut[1] - cut[0]);
                let out = run(subject, &part);
                (out.o_contiguous(&part.problem), out.lse.expect("asked for"))
            })
            .collect();
        let (rows, dim) = (p.rows(), p.head_dim_v);
        let (mut o, mut lse) = (vec![0.0_f32; rows * dim], vec![f32::NEG_INFINITY; rows]);
        for (row, (o, lse)) in o.chunks_mut(dim).zip(&mut lse).enumerate() {
            let max = parts.iter().map(|(_, lse)| f64::from(lse[row])).fold(f64::NEG_INFINITY, f64::max);
            if max == f64::NEG_INFINITY {
                continue;
            }
            let weight = |part: &(Vec<f32>, Vec<f32>)| (f64::from(part.1[row]) - max).exp();
            let sum: f64 = parts.iter().map(weight).sum();
            *lse = (max + sum.ln()) as f32;
            for (d, o) in o.iter_mut().enumerate() {
                let part = |part| weight(part) * f64::from(part.0[row * dim + d]);
                *o = (parts.iter().map(part).sum::<f64>() / sum) as f32;
            }
        }
        let out = run(subject, &whole);
        let expected = Expected::of(&whole);
        let score = expected.oracle.max_score.max(1.0);
        // A part's lse is off by its budget, and so are the weights that it merges with.
        let merged = 2.0 * expected.o + 4.0 * expected.lse * expected.oracle.max_value;
        close("split", "o", &o, &out.o_contiguous(p), merged);
        close("split", "lse", &lse, &out.lse.expect("asked for"), 2.0 * expected.lse + 1e-6 * score);
    });
}

/// Decoding token by token is prefill, row by row: causal, with ALiBi, a window and a cap.
#[test]
fn decoding_equals_prefill() {
    hold(|subject, rng| {
        let seq = 2 + rng.below(20);
        let window = Window { left: Some(rng.below(12)), right: None };
        let axes = Axes {
            seq_q: seq,
            seq_kv: seq,
            causal: Some(Align::BottomRight),
            window: rng.chance(0.5).then_some(window),
            alibi: rng.chance(0.5),
            softcap: rng.chance(0.5).then_some(20.0),
            sinks: rng.chance(0.5),
            ..draw(rng)
        };
        let whole = axes.build(rng.next());
        let out = run(subject, &whole);
        for token in 0..seq {
            let mut step = keys(&whole, 0, token + 1);
            let p = &mut step.problem;
            p.seq_q = 1;
            p.q.offset += token * p.q.strides[2];
            p.o = Layout::bhsd(p.heads_q, 1, p.head_dim_v);
            let got = run(subject, &step);
            // The rows of the whole that this step computes.
            let w = &whole.problem;
            let rows: Vec<usize> = (0..w.batch * w.heads_q).map(|h| h * seq + token).collect();
            let (o, lse) = (out.o_contiguous(w), out.lse.as_ref().expect("asked for"));
            let want: Vec<f32> = rows
                .iter()
                .flat_map(|row| &o[row * w.head_dim_v..(row + 1) * w.head_dim_v])
                .copied()
                .collect();
            let budget = Expected::of(&whole);
            close("decode", "o", &got.o_contiguous(&step.problem), &want, 2.0 * budget.o);
            let want: Vec<f32> = rows.iter().map(|&row| lse[row]).collect();
            close("decode", "lse", &got.lse.expect("asked for"), &want, 2.0 * budget.lse);
        }
    });
}

/// Keys and values in another order, each with its mask and bias, give the same.
#[test]
fn permuting_keys_and_values_together_changes_nothing() {
    hold(|subject, rng| {
        let axes = Axes {
            mask: rng.chance(0.5).then_some(Spread::Full),
            bias: rng.chance(0.5).then_some((Dtype::F32, Spread::Full, true)),
            storage: Storage::Bhsd,
            ..draw(rng)
        };
        let case = axes.build(rng.next());
        let p = &case.problem;
        let mut order: Vec<usize> = (0..p.seq_kv).collect();
        rng.shuffle(&mut order);
        let mut other = case.clone();
        for (operand, from, to) in
            [(Operand::K, &case.data.k, &mut other.data.k), (Operand::V, &case.data.v, &mut other.data.v)]
        {
            let layout = p.layout(operand).expect("every problem has k and v");
            let permuted = fill(p.dtype, layout, p.shape(operand), 4, |[b, h, j, d]| {
                Some(from.as_ref().as_ref().get(layout.index([b, h, order[j], d])))
            });
            *to = permuted.into();
        }
        if let (Some(layout), Some(mask)) = (p.mask, &case.data.mask) {
            let moved = other.data.mask.as_mut().expect("a copy");
            for [b, h, i, j] in indices(p.shape(Operand::Mask)) {
                moved[layout.index([b, h, i, j])] = mask[layout.index([b, h, i, order[j]])];
            }
        }
        if let (Some(bias), Some(values)) = (p.bias, &case.data.bias) {
            let moved = other.data.bias.as_mut().expect("a copy");
            for [b, h, i, j] in indices(p.shape(Operand::Bias)) {
                let value = values.as_ref().get(bias.layout.index([b, h, i, order[j]]));
                moved.set(bias.layout.index([b, h, i, j]), value);
            }
        }
        alike("permutation", (&other, &run(subject, &other)), (&case, &run(subject, &case)));
    });
}

/// Adding one vector to every key adds one number to every score of a row: o stays.
#[test]
fn adding_one_vector_to_every_key_changes_nothing() {
    hold(|subject, rng| {
        let sim = rng.pick(&[Sim::Dot, Sim::ScaledDot, Sim::Bilinear { extra: 2, per_head: true }]);
        let axes = Axes { similarity: sim, causal: rng.chance(0.5).then_some(Align::TopLeft), ..draw(rng) };
        let case = axes.build(rng.next());
        let p = &case.problem;
        // Eighths of whole numbers up to 1: with them the sum is exact, or nearly.
        let shift: Vec<f32> = (0..p.head_dim).map(|_| rng.below(17) as f32 / 8.0 - 1.0).collect();
        let mut other = case.clone();
        let shifted = fill(p.dtype, p.k, p.shape(Operand::K), 4, |at| {
            Some(case.data.k.as_ref().as_ref().get(p.k.index(at)) + shift[at[3]])
        });
        other.data.k = shifted.into();
        let (a, b) = (run(subject, &other), run(subject, &case));
        // The rounding of the shifted keys themselves moves the scores.
        let budget = 3.0 * (Expected::of(&other).o + Expected::of(&case).o);
        close("shift", "o", &a.o_contiguous(p), &b.o_contiguous(p), budget);
    });
}

/// The weights of a row sum to one: V = 1 gives 1 in every row that has a key, 0 in others.
#[test]
fn values_of_one_give_one() {
    hold(|subject, rng| {
        let axes = Axes {
            mask: Some(rng.pick(&Spread::ALL)),
            causal: rng.pick(&[None, Some(Align::TopLeft), Some(Align::BottomRight)]),
            lens: rng.pick(&[Lens::None, Lens::Partial, Lens::FirstEmpty]),
            softcap: rng.chance(0.5).then_some(5.0),
            ..draw(rng)
        };
        let mut case = axes.build(rng.next());
        let p = &case.problem;
        case.data.v = Tensor::from_f32(p.dtype, &vec![1.0; p.extent(Operand::V) as usize]).into();
        let out = run(subject, &case);
        let budget = Expected::of(&case).o;
        let lse = out.lse.as_ref().expect("asked for");
        let want: Vec<f32> = lse
            .iter()
            .flat_map(|&lse| {
                let has_key = lse > f32::NEG_INFINITY;
                std::iter::repeat_n(if has_key { 1.0 } else { 0.0 }, p.head_dim_v)
            })
            .collect();
        close("V = 1", "o", &out.o_contiguous(p), &want, budget);
        let Some(weights) = out.weights.as_ref() else {
            assert!(!subject.gives_weights());
            return;
        };
        let sums: Vec<f32> = weights.chunks(p.seq_kv).map(|w| w.iter().sum()).collect();
        let want: Vec<f32> = lse.iter().map(|&lse| if lse > f32::NEG_INFINITY { 1.0 } else { 0.0 }).collect();
        close("V = 1", "sum of weights", &sums, &want, 2.0 * budget + 1e-5);
    });
}

/// The mean of equal values is that value. Rounding errors of sums whose terms are all alike go one way: they must not
/// grow with the keys. (Where O stays in a GPU's registers there is no room for what a sum cannot take, and steps add up
/// plainly: those kernels are asked as many keys as that allows.)
#[test]
fn equal_values_give_that_value() {
    for subject in Subject::few().into_iter().filter(|subject| subject.takes(Dtype::F32)) {
        let by_tiles =
            matches!(subject, Subject::Gpu { family: Some(Family::FusedTile | Family::FusedSubgroup), .. });
        for (seq_kv, head_dim_v) in [(500, 64), (8192, 8), (60_000, 64)] {
            if by_tiles && seq_kv > 8192 {
                continue;
            }
            let mut case = Axes { seq_q: 9, seq_kv, head_dim: 8, head_dim_v, ..Axes::default() }.build(7);
            let p = &case.problem;
            case.data.q = Tensor::F32(vec![0.0; p.extent(Operand::Q) as usize]).into();
            for value in [0.1, 0.7, 0.9] {
                case.data.v = Tensor::F32(vec![value; p.extent(Operand::V) as usize]).into();
                // Thrice the contract's, whose 8 roundings 64 steps of such terms can exceed (the row kernel).
                let budget = 12.0 * f64::from(f32::EPSILON) * f64::from(value);
                let o = run(subject, &case).o_contiguous(&case.problem);
                close(&format!("{subject:?}, {seq_kv} keys"), "o", &o, &vec![value; o.len()], budget);
            }
        }
    }
}

/// `p = exp(s - lse)` always: o is the weights times V, and lse is what the weights lack.
#[test]
fn weights_times_values_is_o() {
    hold(|subject, rng| {
        let axes = Axes { sinks: rng.chance(0.5), causal: Some(Align::BottomRight), ..draw(rng) };
        let case = axes.build(rng.next());
        let p = &case.problem;
        let out = run(subject, &case);
        let Some(weights) = out.weights.as_ref() else {
            assert!(!subject.gives_weights());
            return;
        };
        let v = case.data.v.as_ref().as_ref();
        let mut want = Vec::new();
        for [b, h, i, d] in indices(p.shape(Operand::O)) {
            let row = ((b * p.heads_q + h) * p.seq_q + i) * p.seq_kv;
            let kept = p.kv_range(i, p.seq_kv);
            want.push(
                kept.map(|j| {
                    f64::from(weights[row + j]) * f64::from(v.get(p.v.index([b, p.kv_head(h), j, d])))
                })
                .sum::<f64>() as f32,
            );
        }
        let expected = Expected::of(&case);
        let budget = 2.0 * expected.o + expected.weights * expected.oracle.max_value;
        close("weights", "o", &out.o_contiguous(p), &want, budget);
    });
}

#[test]
fn bilinear_with_the_identity_is_dot() {
    hold(|subject, rng| {
        let axes = Axes { similarity: Sim::Dot, ..draw(rng) };
        let dot = axes.build(rng.next());
        for per_head in [false, true] {
            let mut bilinear = dot.clone();
            let (p, d) = (&mut bilinear.problem, dot.problem.head_dim);
            p.similarity = Similarity::Bilinear { query_dim: d, per_head };
            let identity = (0..d * d).map(|at| if at / d == at % d { 1.0 } else { 0.0 });
            let heads = if per_head { p.heads_q } else { 1 };
            bilinear.data.w = Some(identity.cycle().take(heads * d * d).collect());
            alike("W = I", (&bilinear, &run(subject, &bilinear)), (&dot, &run(subject, &dot)));
        }
    });
}

/// The cosine similarity minds directions alone: queries and keys may have any length. (By powers of two, so
/// that their directions are the same to the last bit.)
#[test]
fn cosines_do_not_change_with_the_lengths_of_vectors() {
    hold(|subject, rng| {
        let axes = Axes {
            similarity: Sim::Cosine,
            scale: rng.pick(&[None, Some(1.0)]),
            causal: rng.chance(0.5).then_some(Align::BottomRight),
            ..draw(rng)
        };
        let case = axes.build(rng.next());
        let p = &case.problem;
        let mut other = case.clone();
        for (from, operand) in [(&mut other.data.q, Operand::Q), (&mut other.data.k, Operand::K)] {
            let (layout, shape) = (p.layout(operand).expect("always there"), p.shape(operand));
            let lengths: Vec<f32> =
                (0..shape[0] * shape[1] * shape[2]).map(|_| 2f32.powi(rng.below(33) as i32 - 16)).collect();
            let old = from.clone();
            let scaled = fill(p.dtype, layout, shape, 4, |[b, h, i, d]| {
                let length = lengths[(b * shape[1] + h) * shape[2] + i];
                Some(length * old.as_ref().as_ref().get(layout.index([b, h, i, d])))
            });
            *from = scaled.into();
        }
        alike("lengths", (&other, &run(subject, &other)), (&case, &run(subject, &case)));
    });
}

/// Additive scores that do not depend on the key are one for all of a row's: its weights are uniform.
#[test]
fn additive_without_keys_is_uniform() {
    hold(|subject, rng| {
        let similarity = Sim::Additive { extra: 2, hidden: 1 + rng.below(20), per_head: rng.chance(0.5) };
        let mut case = Axes { similarity, ..draw(rng) }.build(rng.next());
        if !subject.compares(&case) {
            return;
        }
        case.data.wk.as_mut().expect("additive").fill(0.0);
        let out = run(subject, &case);
        let expected = Expected::of(&case);
        let p = &case.problem;
        let weights = out.weights.as_ref().expect("asked for");
        let want = vec![1.0 / p.seq_kv as f32; weights.len()];
        close("Wk = 0", "weights", weights, &want, expected.weights);
        let v = case.data.v.as_ref().as_ref();
        let mut mean = Vec::new();
        for [b, h, _, d] in indices(p.shape(Operand::O)) {
            let values = (0..p.seq_kv).map(|j| f64::from(v.get(p.v.index([b, p.kv_head(h), j, d]))));
            mean.push((values.sum::<f64>() / p.seq_kv as f64) as f32);
        }
        close("Wk = 0", "o", &out.o_contiguous(p), &mean, expected.o);
    });
}

/// Grouped heads are repeated heads.
#[test]
fn grouped_heads_equal_repeated_heads() {
    hold(|subject, rng| {
        let axes = Axes { heads: rng.pick(&[(4, 2), (3, 1), (6, 2)]), storage: Storage::Bhsd, ..draw(rng) };
        let grouped = axes.build(rng.next());
        let mut repeated = grouped.clone();
        let g = &grouped.problem;
        let p = &mut repeated.problem;
        p.heads_kv = p.heads_q;
        p.k = Layout::bhsd(p.heads_q, p.seq_kv, p.head_dim);
        p.v = Layout::bhsd(p.heads_q, p.seq_kv, p.head_dim_v);
        let repeat = |from: &Arc<Tensor>, old: Layout, new: Layout, shape: [usize; 4]| {
            fill(g.dtype, new, shape, 0, |[b, h, j, d]| {
                Some(from.as_ref().as_ref().get(old.index([b, g.kv_head(h), j, d])))
            })
        };
        let (k, v) = (p.shape(Operand::K), p.shape(Operand::V));
        repeated.data.k = repeat(&grouped.data.k, g.k, p.k, k).into();
        repeated.data.v = repeat(&grouped.data.v, g.v, p.v, v).into();
        alike("groups", (&repeated, &run(subject, &repeated)), (&grouped, &run(subject, &grouped)));
    });
}

/// A causal mask is the window `(unbounded, 0)`, and both are a boolean mask, and that is a bias
/// of -inf.
#[test]
fn masks_have_many_spellings() {
    hold(|subject, rng| {
        let align = rng.pick(&[Align::TopLeft, Align::BottomRight]);
        let causal =
            Axes { causal: Some(align), align, storage: Storage::Bhsd, ..draw(rng) }.build(rng.next());
        let out = run(subject, &causal);
        let p = &causal.problem;
        let shape = p.shape(Operand::Mask);
        let layout = Layout::broadcast([1, 1, shape[2], shape[3]]);
        let kept = |i: usize, j: usize| p.kv_range(i, p.seq_kv).contains(&j);

        let mut window = causal.clone();
        (window.problem.causal, window.problem.window) = (None, Some(Window { left: None, right: Some(0) }));
        let mut mask = causal.clone();
        (mask.problem.causal, mask.problem.mask) = (None, Some(layout));
        mask.data.mask =
            Some(indices([1, 1, shape[2], shape[3]]).map(|at| u8::from(kept(at[2], at[3]))).collect());
        let mut bias = causal.clone();
        (bias.problem.causal, bias.problem.bias) = (None, Some(Bias { dtype: Dtype::F32, layout }));
        bias.data.bias = Some(fill(Dtype::F32, layout, [1, 1, shape[2], shape[3]], 0, |at| {
            Some(if kept(at[2], at[3]) { 0.0 } else { f32::NEG_INFINITY })
        }));
        for (law, other) in [("window", &window), ("mask", &mask), ("bias", &bias)] {
            alike(law, (other, &run(subject, other)), (&causal, &out));
        }
    });
}

/// ALiBi is a bias.
#[test]
fn alibi_is_a_bias() {
    hold(|subject, rng| {
        let causal = rng.pick(&[None, Some(Align::TopLeft), Some(Align::BottomRight)]);
        let align = rng.pick(&[Align::TopLeft, Align::BottomRight]);
        let alibi = Axes { alibi: true, causal, align, ..draw(rng) }.build(rng.next());
        let p = &alibi.problem;
        let mut bias = alibi.clone();
        bias.problem.alibi = false;
        let slopes = bias.data.alibi_slopes.take().expect("asked for");
        let dims = [1, p.heads_q, p.seq_q, p.seq_kv];
        let layout = Layout::broadcast(dims);
        bias.problem.bias = Some(Bias { dtype: Dtype::F32, layout });
        // ALiBi counts from where the causal mask does, if there is one.
        let offset = causal.unwrap_or(align).offset(p.seq_q, p.seq_kv);
        bias.data.bias = Some(fill(Dtype::F32, layout, dims, 0, |[_, h, i, j]| {
            Some(-slopes[h] * (i as i64 + offset - j as i64).abs() as f32)
        }));
        alike("ALiBi", (&bias, &run(subject, &bias)), (&alibi, &run(subject, &alibi)));
    });
}

/// Keys beyond a length do not exist: the same as a problem without them, also for what counts
/// from the end.
#[test]
fn a_key_length_is_a_shorter_problem() {
    hold(|subject, rng| {
        let axes = Axes {
            batch: 1,
            lens: Lens::Partial,
            causal: rng.pick(&[None, Some(Align::TopLeft), Some(Align::BottomRight)]),
            window: rng.chance(0.5).then_some(Window { left: Some(9), right: Some(4) }),
            alibi: rng.chance(0.5),
            weights: false,
            ..draw(rng)
        };
        let long = axes.build(rng.next());
        let len = long.data.kv_lens.as_ref().expect("asked for")[0] as usize;
        let mut short = keys(&long, 0, len);
        short.problem.kv_lens = false;
        short.data.kv_lens = None;
        alike("length", (&long, &run(subject, &long)), (&short, &run(subject, &short)));
    });
}

/// A sink is one more key with that score and a value of zero.
#[test]
fn a_sink_is_a_key_of_value_zero() {
    hold(|subject, rng| {
        let sunk = Axes { sinks: true, weights: false, ..draw(rng) }.build(rng.next());
        let mut plain = sunk.clone();
        plain.problem.sinks = false;
        let sinks = plain.data.sinks.take().expect("asked for");
        let p = &sunk.problem;
        let (with, without) = (run(subject, &sunk), run(subject, &plain));
        let o = without.o_contiguous(p);
        let (mut want_o, mut want_lse) = (Vec::new(), Vec::new());
        for (row, &lse) in without.lse.as_ref().expect("asked for").iter().enumerate() {
            let sink = f64::from(sinks[row / p.seq_q % p.heads_q]);
            let both = f64::from(lse).max(sink);
            let both = both + ((f64::from(lse) - both).exp() + (sink - both).exp()).ln();
            want_lse.push(both as f32);
            let keep = (f64::from(lse) - both).exp() as f32;
            want_o.extend(o[row * p.head_dim_v..(row + 1) * p.head_dim_v].iter().map(|o| keep * o));
        }
        let expected = Expected::of(&plain);
        let budget = 3.0 * expected.o + 3.0 * expected.lse * expected.oracle.max_value;
        close("sink", "o", &with.o_contiguous(p), &want_o, budget);
        close("sink", "lse", &with.lse.expect("asked for"), &want_lse, 4.0 * expected.lse);
    });
}

/// Where elements lie changes nothing.
#[test]
fn layouts_give_the_same() {
    hold(|subject, rng| {
        let axes = Axes { storage: Storage::Bhsd, ..draw(rng) };
        let plain = axes.build(rng.next());
        let p = &plain.problem;
        for storage in [Storage::Bshd, Storage::Odd, Storage::Padded, Storage::DimMajor] {
            let mut other = Axes { storage, ..axes }.build(rng.next());
            let o = other.problem.clone();
            for (operand, from, to) in [
                (Operand::Q, &plain.data.q, &mut other.data.q),
                (Operand::K, &plain.data.k, &mut other.data.k),
                (Operand::V, &plain.data.v, &mut other.data.v),
            ] {
                let (old, new) = (p.layout(operand).expect("there"), o.layout(operand).expect("there"));
                *to = fill(p.dtype, new, p.shape(operand), 3, |at| {
                    Some(from.as_ref().as_ref().get(old.index(at)))
                })
                .into();
            }
            alike("layout", (&other, &run(subject, &other)), (&plain, &run(subject, &plain)));
        }
    });
}
