//! Every instruction set against the oracle: [`super::attention`] itself takes only the best one.

use pulp::{Simd, WithSimd};

use super::math::{exp2, tanh};
use super::{Isa, compute};
use crate::{Align, AttentionProblem, Inputs, Layout, Outputs, Similarity, reference};

/// The instruction sets that this machine has.
pub(super) fn isas() -> Vec<Isa> {
    let mut isas = vec![Isa::Scalar, Isa::new()];
    #[cfg(target_arch = "x86_64")]
    isas.extend(pulp::x86::V3::try_new().map(Isa::V3));
    isas.dedup_by_key(|isa| format!("{isa:?}"));
    isas
}

/// Applies a function of vectors to numbers.
struct Map<'a> {
    function: &'static str,
    x: &'a mut [f32],
}

impl WithSimd for Map<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for x in self.x.chunks_mut(S::F32_LANES) {
            let value = simd.partial_load_f32s(x);
            let value = if self.function == "exp2" { exp2(simd, value) } else { tanh(simd, value) };
            simd.partial_store_f32s(x, value);
        }
    }
}

#[test]
fn functions() {
    for isa in isas() {
        let x: Vec<f32> = (-60_000..60_000).map(|i| i as f32 * 2.1e-3).collect();
        let mut y = x.clone();
        isa.dispatch(Map { function: "exp2", x: &mut y });
        for (x, y) in x.iter().zip(&y) {
            let want = f64::from(*x).exp2();
            assert!((f64::from(*y) - want).abs() <= 1.2e-7 * want + 2f64.powi(-126), "{isa:?} 2^{x} = {y}");
        }
        let mut y: Vec<f32> = x.iter().map(|x| x * x * x * 1e-5).collect();
        let x = y.clone();
        isa.dispatch(Map { function: "tanh", x: &mut y });
        for (x, y) in x.iter().zip(&y) {
            let want = f64::from(*x).tanh();
            assert!((f64::from(*y) - want).abs() <= 2.5e-7 * want.abs(), "{isa:?} tanh({x}) = {y}");
        }
        let mut y = [0.0, -0.0, -127.0, -1e30, f32::NEG_INFINITY, f32::NAN, 1.0];
        isa.dispatch(Map { function: "exp2", x: &mut y });
        assert_eq!(y[..5], [1.0, 1.0, 0.0, 0.0, 0.0]);
        assert!(y[5].is_nan() && y[6] == 2.0);
        let mut y = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
        isa.dispatch(Map { function: "tanh", x: &mut y });
        assert!(y[0].is_nan() && y[1..] == [1.0, -1.0]);
    }
}

#[test]
fn every_instruction_set() {
    let numbers = |seed: u32, n: usize| -> Vec<f32> {
        (0..n as u32)
            .map(|i| ((i * 2 + seed).wrapping_mul(2_654_435_769) >> 8) as f32 / 8_388_608.0 - 1.0)
            .collect()
    };
    for isa in isas() {
        for (seq_q, seq_kv, dim) in [(1, 700, 64), (2, 300, 80), (7, 33, 5), (50, 130, 64), (101, 257, 130)] {
            let plain =
                AttentionProblem { lse: true, ..AttentionProblem::new(1, 2, 1, seq_q, seq_kv, dim, dim) };
            let options = AttentionProblem {
                causal: Some(Align::BottomRight),
                softcap: Some(2.0),
                alibi: true,
                mask: Some(Layout::broadcast([1, 1, 1, seq_kv])),
                weights: true,
                ..plain.clone()
            };
            let bilinear = AttentionProblem {
                similarity: Similarity::Bilinear { query_dim: dim, per_head: true },
                ..plain.clone()
            };
            let cosine =
                AttentionProblem { similarity: Similarity::Cosine, scale: Some(9.0), ..plain.clone() };
            let hidden = 7;
            let additive = AttentionProblem {
                similarity: Similarity::Additive { query_dim: dim, hidden, per_head: false },
                ..plain.clone()
            };
            let (q, k, w) =
                (numbers(1, 2 * seq_q * dim), numbers(5, seq_kv * dim), numbers(9, 2 * dim * dim));
            let mut v = numbers(7, seq_kv * dim);
            let mask: Vec<u8> = (0..seq_kv).map(|j| u8::from(j % 5 != 2)).collect();
            // Key 2 is masked where there is a mask, and read by every row where there is none.
            for value in [0.5, f32::NAN] {
                v[2 * dim] = value;
                let inputs = Inputs::new(&q[..], &k[..], &v[..]);
                let masked = Inputs { mask: Some(&mask), alibi_slopes: Some(&[0.5, 0.25]), ..inputs };
                let with_w = Inputs { w: Some(&w), ..inputs };
                let by = &w[..hidden * dim];
                let matrices = Inputs { wq: Some(by), wk: Some(by), score_v: Some(&w[..hidden]), ..inputs };
                for (problem, inputs) in [
                    (&plain, inputs),
                    (&options, masked),
                    (&bilinear, with_w),
                    (&cosine, inputs),
                    (&additive, matrices),
                ] {
                    let want = reference::oracle(problem, &inputs).unwrap();
                    let mut got = Outputs::zeros(problem);
                    compute(problem, &inputs, &mut got, isa);
                    let allowed = reference::tolerance(problem, &want, 0.0);
                    let error = |got: &[f32], want: &[f64]| {
                        reference::max_error(got.iter().map(|&x| f64::from(x)), want)
                    };
                    let o = error(&got.o.to_f32(), &want.o);
                    assert!(o <= allowed, "{isa:?}: {o:e}, {allowed:e} allowed: {problem:?}");
                    assert!(
                        error(&got.lse.unwrap(), &want.lse) <= 1e-6 * want.max_score.max(1.0),
                        "{isa:?}: {problem:?}"
                    );
                    if let (Some(got), Some(want)) = (&got.weights, &want.weights) {
                        assert!(error(got, want) <= 1e-5, "{isa:?}: {problem:?}");
                    }
                }
            }
        }
    }
}
