//! The CPU path against the f64 oracle.
#![cfg(all(feature = "cpu", not(target_arch = "wasm32")))]

use wgpu_attention::reference::{self, Reference};
use wgpu_attention::{
    Align, AttentionProblem, Bias, Dtype, Inputs, Layout, Operand, Outputs, Similarity, Tensor, Window, cpu,
};

/// SplitMix64, and sums of its numbers that are near enough to normal.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 24) as f32
    }

    fn normal(&mut self) -> f32 {
        ((0..4).map(|_| self.uniform()).sum::<f32>() - 2.0) * 1.73
    }
}

/// Operands of one call. Places that no element occupies hold NaN.
struct Data {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Option<Vec<f32>>,
    additive: [Option<Vec<f32>>; 3],
    bias: Option<Tensor>,
    mask: Option<Vec<u8>>,
    slopes: Option<Vec<f32>>,
    sinks: Option<Vec<f32>>,
    kv_lens: Option<Vec<u32>>,
}

/// Every index of an operand, in logical order.
fn indices(problem: &AttentionProblem, operand: Operand) -> Vec<usize> {
    let [b, h, s, d] = problem.shape(operand);
    let layout = problem.layout(operand).unwrap();
    (0..b * h * s * d).map(|at| layout.index([at / d / s / h, at / d / s % h, at / d % s, at % d])).collect()
}

fn fill(
    problem: &AttentionProblem,
    operand: Operand,
    dtype: Dtype,
    mut value: impl FnMut() -> f32,
) -> Tensor {
    let mut x = vec![f32::NAN; problem.extent(operand) as usize];
    for i in indices(problem, operand) {
        x[i] = value();
    }
    Tensor::from_f32(dtype, &x)
}

impl Data {
    fn new(p: &AttentionProblem, seed: u64) -> Self {
        let mut rng = Rng(seed);
        let has = |operand| p.layout(operand).is_some();
        let floats = |x: Tensor| x.to_f32();
        let small = 1.0 / (p.query_dim() as f32).sqrt();
        Self {
            q: fill(p, Operand::Q, p.dtype, || rng.normal()),
            k: fill(p, Operand::K, p.dtype, || rng.normal()),
            v: fill(p, Operand::V, p.dtype, || rng.normal()),
            additive: [(Operand::Wq, small), (Operand::Wk, 0.2), (Operand::ScoreV, 0.1)].map(
                |(operand, size)| {
                    has(operand).then(|| floats(fill(p, operand, Dtype::F32, || size * rng.normal())))
                },
            ),
            w: has(Operand::W).then(|| floats(fill(p, Operand::W, Dtype::F32, || small * rng.normal()))),
            bias: p.bias.map(|bias| {
                fill(p, Operand::Bias, bias.dtype, || match rng.below(8) {
                    0 => f32::NEG_INFINITY,
                    _ => rng.normal(),
                })
            }),
            mask: has(Operand::Mask).then(|| {
                let mut mask = vec![0; p.extent(Operand::Mask) as usize];
                indices(p, Operand::Mask).into_iter().for_each(|i| mask[i] = [0, 1, 255][rng.below(3)]);
                mask
            }),
            slopes: p.alibi.then(|| (0..p.heads_q).map(|h| 0.5_f32.powi(h as i32 % 8 + 1)).collect()),
            sinks: p.sinks.then(|| (0..p.heads_q).map(|_| rng.normal()).collect()),
            kv_lens: p.kv_lens.then(|| (0..p.batch).map(|_| rng.below(p.seq_kv + 1) as u32).collect()),
        }
    }

    fn inputs(&self) -> Inputs<'_> {
        Inputs {
            w: self.w.as_deref(),
            wq: self.additive[0].as_deref(),
            wk: self.additive[1].as_deref(),
            score_v: self.additive[2].as_deref(),
            bias: self.bias.as_ref().map(Tensor::as_ref),
            mask: self.mask.as_deref(),
            alibi_slopes: self.slopes.as_deref(),
            sinks: self.sinks.as_deref(),
            kv_lens: self.kv_lens.as_deref(),
            ..Inputs::new(self.q.as_ref(), self.k.as_ref(), self.v.as_ref())
        }
    }
}

fn widen(x: &[f32]) -> impl Iterator<Item = f64> + '_ {
    x.iter().map(|&x| f64::from(x))
}

/// Holds every output to the oracle.
fn hold(
    problem: &AttentionProblem,
    got: &Outputs,
    oracle: &Reference,
    naive: impl Fn() -> Reference,
    name: &str,
) {
    let narrow = problem.dtype != Dtype::F32 || problem.out_dtype != Dtype::F32;
    let naive_error = if narrow {
        let wider = |x: f64| f64::from(problem.out_dtype.round(x as f32));
        reference::max_error(naive().o.into_iter().map(wider), &oracle.o)
    } else {
        0.0
    };
    let allowed = reference::tolerance(problem, oracle, naive_error);
    let error = reference::max_error(widen(&got.o_contiguous(problem)), &oracle.o);
    assert!(error <= allowed, "{name}: o is off by {error:e}, {allowed:e} allowed\n{problem:?}");
    // lse and weights are f32 computed in f32 from the stored operands.
    let allowed = 16.0 * 2f64.powi(-24) * oracle.max_score.max(1.0);
    assert_eq!(got.lse.is_some(), problem.lse, "{name}");
    if let Some(lse) = &got.lse {
        let error = reference::max_error(widen(lse), &oracle.lse);
        assert!(error <= allowed, "{name}: lse is off by {error:e}, {allowed:e} allowed\n{problem:?}");
    }
    assert_eq!(got.weights.is_some(), problem.weights, "{name}");
    if let (Some(weights), Some(want)) = (&got.weights, &oracle.weights) {
        let error = reference::max_error(widen(weights), want);
        assert!(error <= allowed, "{name}: weights are off by {error:e}, {allowed:e} allowed\n{problem:?}");
    }
}

fn check(problem: &AttentionProblem, inputs: &Inputs<'_>, name: &str) -> Outputs {
    let got = cpu::attention(problem, inputs).unwrap();
    let oracle = reference::oracle(problem, inputs).unwrap();
    hold(problem, &got, &oracle, || reference::naive(problem, inputs).unwrap(), name);
    got
}

fn check_seed(problem: &AttentionProblem, seed: u64, name: &str) {
    let data = Data::new(problem, seed);
    check(problem, &data.inputs(), name);
}

fn problem(heads: [usize; 2], seq: [usize; 2], dims: [usize; 2]) -> AttentionProblem {
    AttentionProblem {
        lse: true,
        ..AttentionProblem::new(1, heads[0], heads[1], seq[0], seq[1], dims[0], dims[1])
    }
}

const EDGES: [usize; 19] = [0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 65, 127, 128, 129, 257];

#[test]
fn sizes_at_tile_edges() {
    for seq_q in EDGES {
        for seq_kv in EDGES {
            for causal in [None, Some(Align::TopLeft), Some(Align::BottomRight)] {
                let p = AttentionProblem { causal, ..problem([1, 1], [seq_q, seq_kv], [8, 5]) };
                check_seed(&p, (seq_q * 1000 + seq_kv) as u64, "sizes");
            }
        }
    }
}

#[test]
fn head_dims() {
    let dims = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 80, 96, 127, 128, 129, 192, 255, 256];
    for (i, &d) in dims.iter().enumerate() {
        for dv in [d, dims[(i * 7 + 3) % dims.len()], dims[dims.len() - 1 - i]] {
            check_seed(&problem([2, 1], [19, 37], [d, dv]), (d * 300 + dv) as u64, "dims");
        }
    }
    check_seed(&problem([1, 1], [3, 40], [700, 300]), 5, "wide");
}

/// A name, and what the option does to a problem.
type Choice = (&'static str, fn(&mut AttentionProblem));

/// Every option by itself.
fn options() -> Vec<Choice> {
    fn bias(p: &mut AttentionProblem, dtype: Dtype, dims: [bool; 4]) {
        let full = [p.batch, p.heads_q, p.seq_q, p.seq_kv];
        let dims = std::array::from_fn(|i| if dims[i] { full[i] } else { 1 });
        p.bias = Some(Bias { dtype, layout: Layout::broadcast(dims) });
    }
    fn mask(p: &mut AttentionProblem, dims: [bool; 4]) {
        let full = [p.batch, p.heads_q, p.seq_q, p.seq_kv];
        p.mask = Some(Layout::broadcast(std::array::from_fn(|i| if dims[i] { full[i] } else { 1 })));
    }
    fn window(p: &mut AttentionProblem, left: Option<usize>, right: Option<usize>) {
        p.window = Some(Window { left, right });
    }
    vec![
        ("dot", |p| set_similarity(p, Similarity::Dot, None)),
        ("dot scaled", |p| set_similarity(p, Similarity::Dot, Some(-0.3))),
        ("scale", |p| p.scale = Some(0.7)),
        ("no scale", |p| p.scale = Some(0.0)),
        ("bilinear", |p| set_bilinear(p, 11, false)),
        ("bilinear per head", |p| set_bilinear(p, 70, true)),
        ("additive", |p| set_additive(p, 11, 40, false)),
        ("additive per head", |p| set_additive(p, 70, 5, true)),
        ("cosine", |p| set_similarity(p, Similarity::Cosine, p.scale)),
        ("cosine scaled", |p| set_similarity(p, Similarity::Cosine, Some(9.0))),
        ("softcap", |p| p.softcap = Some(1.5)),
        ("wide softcap", |p| p.softcap = Some(50.0)),
        ("softcap far away", |p| p.softcap = Some(10_000.0)),
        ("bias", |p| bias(p, Dtype::F32, [true; 4])),
        ("bias f16 of keys", |p| bias(p, Dtype::F16, [false, false, false, true])),
        ("bias bf16 of queries", |p| bias(p, Dtype::Bf16, [false, true, true, false])),
        ("bias transposed", |p| {
            let layout = Layout { offset: 3, strides: [0, 0, 1, p.seq_q + 1] };
            p.bias = Some(Bias { dtype: Dtype::F32, layout });
        }),
        ("alibi", |p| p.alibi = true),
        ("alibi from the top", |p| (p.alibi, p.align) = (true, Align::TopLeft)),
        ("mask", |p| mask(p, [true; 4])),
        ("mask of keys", |p| mask(p, [true, false, false, true])),
        ("mask of queries", |p| mask(p, [false, true, true, false])),
        ("mask transposed", |p| p.mask = Some(Layout { offset: 2, strides: [0, 0, 1, p.seq_q] })),
        ("causal top", |p| p.causal = Some(Align::TopLeft)),
        ("causal bottom", |p| p.causal = Some(Align::BottomRight)),
        ("window", |p| window(p, Some(9), Some(3))),
        ("window left", |p| window(p, Some(20), None)),
        ("window of itself", |p| {
            window(p, Some(0), Some(0));
            p.align = Align::TopLeft;
        }),
        ("window right", |p| window(p, None, Some(0))),
        ("kv_lens", |p| p.kv_lens = true),
        ("sinks", |p| p.sinks = true),
        ("weights", |p| p.weights = true),
    ]
}

fn set_similarity(p: &mut AttentionProblem, similarity: Similarity, scale: Option<f32>) {
    *p = AttentionProblem { scale, ..p.clone() }.with_similarity(similarity);
}

fn set_bilinear(p: &mut AttentionProblem, query_dim: usize, per_head: bool) {
    set_similarity(p, Similarity::Bilinear { query_dim, per_head }, p.scale);
}

fn set_additive(p: &mut AttentionProblem, query_dim: usize, hidden: usize, per_head: bool) {
    set_similarity(p, Similarity::Additive { query_dim, hidden, per_head }, p.scale);
}

/// Shapes on which options are tried: one tile, several, grouped heads, few rows with many
/// keys (whose heads share a tile, and do not).
fn shapes() -> [AttentionProblem; 5] {
    let new = |b, hq, hkv, sq, sk, d, dv| AttentionProblem {
        lse: true,
        ..AttentionProblem::new(b, hq, hkv, sq, sk, d, dv)
    };
    [
        new(2, 2, 2, 5, 7, 4, 3),
        new(2, 4, 2, 67, 150, 12, 9),
        new(1, 2, 1, 230, 140, 16, 16),
        new(2, 6, 2, 1, 1300, 16, 8),
        new(2, 2, 2, 1, 1500, 70, 40),
    ]
}

#[test]
fn each_option() {
    for (i, shape) in shapes().iter().enumerate() {
        for (name, set) in options() {
            let mut p = shape.clone();
            set(&mut p);
            check_seed(&p, i as u64 + 77, name);
        }
    }
}

#[test]
fn options_together() {
    let options = options();
    let mut rng = Rng(2024);
    for round in 0..160 {
        let mut p = shapes()[round % 5].clone();
        p.weights = round % 3 == 0;
        let names: Vec<&str> = (0..2 + rng.below(5))
            .map(|_| {
                let (name, set) = options[rng.below(options.len())];
                set(&mut p);
                name
            })
            .collect();
        check_seed(&p, rng.next(), &names.join(", "));
    }
}

#[test]
fn element_types() {
    for dtype in [Dtype::F16, Dtype::Bf16] {
        for shape in shapes() {
            let p = shape.with_dtype(dtype);
            check_seed(&p, 3, "narrow");
            check_seed(&AttentionProblem { out_dtype: Dtype::F32, ..p.clone() }, 4, "narrow to f32");
            let causal = Some(Align::BottomRight);
            let p = AttentionProblem { causal, softcap: Some(4.0), sinks: true, weights: true, ..p };
            check_seed(&p, 5, "narrow with options");
        }
    }
    for out_dtype in [Dtype::F16, Dtype::Bf16] {
        check_seed(&AttentionProblem { out_dtype, ..shapes()[1].clone() }, 6, "f32 to narrow");
    }
}

/// Layouts of `[b, h, s, d]` that the path must read and write.
fn layouts(h: usize, s: usize, d: usize) -> Vec<Layout> {
    vec![
        Layout::bshd(h, s, d).at(3),
        // [batch, seq, heads, dim] inside something wider.
        Layout { offset: 7, strides: [s * h * (d + 5) + 11, d + 5, h * (d + 5), 1] },
        // [batch, heads, dim, seq]: the innermost step is not 1.
        Layout { offset: 1, strides: [h * d * s, d * s, 1, s] },
        // [seq, batch, heads, dim] for two batches.
        Layout { offset: 0, strides: [h * d, d, 2 * h * d, 1] },
        // Every second element.
        Layout { offset: 0, strides: [h * s * d * 2, s * d * 2, d * 2, 2] },
    ]
}

#[test]
fn strides() {
    for dtype in Dtype::FLOATS {
        let base =
            AttentionProblem { lse: true, ..AttentionProblem::new(2, 4, 2, 21, 35, 10, 6) }.with_dtype(dtype);
        for i in 0..5 {
            let p = AttentionProblem {
                q: layouts(4, 21, 10)[i],
                k: layouts(2, 35, 10)[(i + 1) % 5],
                v: layouts(2, 35, 6)[(i + 2) % 5],
                o: layouts(4, 21, 6)[(i + 3) % 5],
                causal: Some(Align::BottomRight),
                ..base.clone()
            };
            check_seed(&p, 9, "strides");
        }
    }
    // One token's keys and values for all, and one head's for all.
    let mut p = problem([2, 2], [9, 20], [8, 8]);
    (p.k.strides[2], p.v.strides[1]) = (0, 0);
    check_seed(&p, 10, "broadcast");
    // Places between o's elements stay 0.
    let o = Layout { offset: 2, strides: [0, 100, 10, 1] };
    let p = AttentionProblem { o, ..problem([2, 1], [3, 4], [4, 4]) };
    let data = Data::new(&p, 1);
    let got = check(&p, &data.inputs(), "gaps").o.to_f32();
    let own = indices(&p, Operand::O);
    assert!(got.iter().enumerate().all(|(i, &x)| own.contains(&i) || x == 0.0));
    // A head_dim_v of 1 whose rows interleave.
    let o = Layout { offset: 0, strides: [0, 1, 2, 77] };
    check_seed(&AttentionProblem { o, ..problem([2, 1], [30, 4], [4, 1]) }, 1, "one column");
}

#[test]
fn dropped_keys_may_hold_anything() {
    for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for seq_q in [1, 40] {
            let p = AttentionProblem {
                kv_lens: true,
                mask: Some(Layout::broadcast([2, 1, 1, 1200])),
                bias: Some(Bias { dtype: Dtype::F32, layout: Layout::broadcast([1, 1, 1, 1200]) }),
                causal: Some(Align::BottomRight),
                weights: seq_q == 40,
                ..AttentionProblem { lse: true, ..AttentionProblem::new(2, 2, 1, seq_q, 1200, 8, 8) }
            };
            let mut data = Data::new(&p, 21);
            data.kv_lens = Some(vec![1100, 600]);
            let inputs = data.inputs();
            let want = cpu::attention(&p, &inputs).unwrap();
            assert!(want.o.to_f32().iter().all(|x| x.is_finite()));
            // A key is dropped for every query of its batch entry by its length, mask or bias.
            let (mask, bias) = (data.mask.clone().unwrap(), data.bias.clone().unwrap());
            let (mut k, mut v, mut bias_poisoned) = (data.k.clone(), data.v.clone(), bias.clone());
            for (b, len) in [(0, 1100), (1, 600)] {
                for j in 0..1200 {
                    let masked = mask[b * 1200 + j] == 0;
                    if j >= len || masked || bias.as_ref().get(j) == f32::NEG_INFINITY {
                        for d in 0..8 {
                            k.set(p.k.index([b, 0, j, d]), poison);
                            v.set(p.v.index([b, 0, j, d]), poison);
                        }
                    }
                    if masked && mask[(1 - b) * 1200 + j] == 0 {
                        bias_poisoned.set(j, poison);
                    }
                }
            }
            let poisoned =
                Inputs { k: k.as_ref(), v: v.as_ref(), bias: Some(bias_poisoned.as_ref()), ..inputs };
            let got = cpu::attention(&p, &poisoned).unwrap();
            assert_eq!(got, want, "{poison}");
        }
    }
}

#[test]
fn non_finite_numbers_stay_in_the_rows_that_read_them() {
    for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for (place, seq_kv) in [(Operand::Q, 40), (Operand::K, 40), (Operand::V, 40), (Operand::V, 3000)] {
            let p = AttentionProblem {
                causal: Some(Align::BottomRight),
                weights: seq_kv == 40,
                ..problem([2, 1], [30, seq_kv], [4, 4])
            };
            let mut data = Data::new(&p, 8);
            match place {
                Operand::Q => data.q.set(p.q.index([0, 1, 13, 2]), poison),
                Operand::K => data.k.set(p.k.index([0, 0, seq_kv - 11, 1]), poison),
                _ => data.v.set(p.v.index([0, 0, seq_kv - 11, 1]), poison),
            }
            let got = check(&p, &data.inputs(), "non-finite");
            let o = got.o.to_f32();
            assert!(o.iter().any(|x| !x.is_finite()) || place == Operand::K, "{place} {poison}");
            assert!(o[..18 * 4].iter().all(|x| x.is_finite()), "{place} {poison}");
        }
    }
    // Both infinities in one column make a NaN; each by itself stays what it is.
    let p = problem([1, 1], [2, 6], [4, 3]);
    let mut data = Data::new(&p, 8);
    data.v.set(p.v.index([0, 0, 1, 0]), f32::INFINITY);
    data.v.set(p.v.index([0, 0, 2, 0]), f32::NEG_INFINITY);
    data.v.set(p.v.index([0, 0, 4, 2]), f32::INFINITY);
    let o = check(&p, &data.inputs(), "infinities").o.to_f32();
    assert!(o[0].is_nan() && o[1].is_finite() && o[2] == f32::INFINITY);
}

#[test]
fn rows_without_keys() {
    for sinks in [false, true] {
        for weights in [false, true] {
            let base = AttentionProblem { sinks, weights, ..problem([2, 1], [20, 9], [4, 4]) };
            let none = AttentionProblem { mask: Some(Layout::broadcast([1; 4])), ..base.clone() };
            let mut data = Data::new(&none, 3);
            data.mask = Some(vec![0]);
            let got = check(&none, &data.inputs(), "masked");
            assert!(got.o.to_f32().iter().all(|&x| x == 0.0));
            let causal = AttentionProblem { causal: Some(Align::BottomRight), ..base };
            check_seed(&causal, 3, "above the diagonal");
            check_seed(&AttentionProblem { seq_kv: 0, ..causal }, 3, "no keys");
        }
    }
    let out = cpu::attention(
        &problem([1, 1], [0, 4], [2, 2]),
        &Inputs::new(&[0.0_f32; 0][..], &[0.0; 8][..], &[0.0; 8][..]),
    );
    assert!(out.unwrap().o.as_ref().is_empty());
}

#[test]
fn the_lowest_bias_is_a_number() {
    let layout = Layout::broadcast([1, 1, 1, 6]);
    for bias in [[f32::MIN; 6], [0.0, f32::MIN, f32::MIN, 1.0, f32::NEG_INFINITY, f32::MIN]] {
        let p = AttentionProblem {
            bias: Some(Bias { dtype: Dtype::F32, layout }),
            ..problem([1, 1], [3, 6], [4, 4])
        };
        let mut data = Data::new(&p, 4);
        data.bias = Some(Tensor::F32(bias.to_vec()));
        let inputs = data.inputs();
        let (got, want) = (cpu::attention(&p, &inputs).unwrap(), reference::oracle(&p, &inputs).unwrap());
        // The rule's max|s| is not one to scale an error by here.
        assert!(reference::max_error(widen(&got.o.to_f32()), &want.o) < 1e-6);
    }
}

#[test]
fn extreme_sinks() {
    for sink in [f32::NEG_INFINITY, f32::MIN, -200.0, 200.0, f32::INFINITY, f32::NAN] {
        // The second has rows without keys.
        for seq in [[3, 600], [30, 9]] {
            let causal = Some(Align::BottomRight);
            let p = AttentionProblem { sinks: true, causal, ..problem([1, 1], seq, [4, 4]) };
            let data = Data { sinks: Some(vec![sink]), ..Data::new(&p, 4) };
            check(&p, &data.inputs(), "sink");
        }
    }
}

#[test]
fn large_scores() {
    for scale in [5.0, -40.0, 300.0] {
        let p = AttentionProblem { scale: Some(scale), weights: true, ..problem([1, 1], [50, 300], [16, 8]) };
        check_seed(&p, 6, "large scores");
        check_seed(&AttentionProblem { softcap: Some(30.0), ..p }, 6, "large scores, capped");
    }
}

#[test]
fn long_rows() {
    // Weights: all equal; all but one equal; random. Values of one sign add up worst, and equal
    // summands round the same way each time.
    for (one_apart, scale) in [(false, 0.0), (true, 0.0), (false, 0.5)] {
        let seq_kv = 400_000;
        let bias = Bias { dtype: Dtype::F32, layout: Layout::broadcast([1, 1, 1, seq_kv]) };
        let p = AttentionProblem {
            scale: Some(scale),
            bias: one_apart.then_some(bias),
            ..problem([1, 1], [1, seq_kv], [2, 3])
        };
        let mut data = Data::new(&p, 12);
        let mut column = vec![-0.357; seq_kv];
        column[77] = 0.0;
        data.bias = one_apart.then_some(Tensor::F32(column));
        let mut rng = Rng(5);
        data.v = fill(&p, Operand::V, Dtype::F32, || 0.5 + 0.5 * rng.uniform());
        check(&p, &data.inputs(), "long rows");
        for value in [0.7, 0.9, 1.0] {
            data.v = fill(&p, Operand::V, Dtype::F32, || value);
            let o = check(&p, &data.inputs(), "long rows of one value").o.to_f32();
            assert!(o.iter().all(|x| (x - value).abs() <= 4.0 * f32::EPSILON * value), "{o:?}");
        }
    }
}

#[test]
fn permuting_keys_changes_nothing() {
    let p = problem([2, 1], [33, 700], [16, 8]);
    let data = Data::new(&p, 31);
    let mut order: Vec<usize> = (0..700).collect();
    let mut rng = Rng(9);
    (1..700).rev().for_each(|i| order.swap(i, rng.below(i + 1)));
    let permuted = |x: &Tensor, d: usize| {
        let x = x.to_f32();
        order.iter().flat_map(|&j| x[j * d..][..d].to_vec()).collect::<Vec<f32>>()
    };
    let (k, v) = (permuted(&data.k, 16), permuted(&data.v, 8));
    let want = reference::oracle(&p, &data.inputs()).unwrap();
    let got = cpu::attention(&p, &Inputs { k: k[..].into(), v: v[..].into(), ..data.inputs() }).unwrap();
    hold(&p, &got, &want, || unreachable!(), "permuted");
}

#[test]
fn parts_merge_to_the_whole() {
    let p = problem([2, 2], [20, 300], [8, 8]);
    let data = Data::new(&p, 41);
    let want = reference::oracle(&p, &data.inputs()).unwrap();
    let row = |x: &Tensor, from: usize, to: usize| {
        let x = x.to_f32();
        (0..2).flat_map(|h| x[(h * 300 + from) * 8..(h * 300 + to) * 8].to_vec()).collect::<Vec<f32>>()
    };
    let parts: Vec<(Vec<f64>, Vec<f64>)> = [(0, 1), (1, 130), (130, 130), (130, 300)]
        .map(|(from, to)| {
            let part = problem([2, 2], [20, to - from], [8, 8]);
            let (k, v) = (row(&data.k, from, to), row(&data.v, from, to));
            let inputs = Inputs::new(data.q.as_ref(), &k[..], &v[..]);
            let out = cpu::attention(&part, &inputs).unwrap();
            (widen(&out.o.to_f32()).collect(), widen(&out.lse.unwrap()).collect())
        })
        .into();
    let merged = (0..2 * 20 * 8).map(|at| {
        let max = parts.iter().map(|(_, lse)| lse[at / 8]).fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = parts.iter().map(|(_, lse)| (lse[at / 8] - max).exp()).collect();
        let sum: f64 = parts.iter().zip(&weights).map(|((o, _), w)| w * o[at]).sum();
        sum / weights.iter().sum::<f64>()
    });
    let error = reference::max_error(merged, &want.o);
    assert!(error <= reference::tolerance(&p, &want, 0.0), "{error:e}");
}

#[test]
fn identity_is_dot_and_token_by_token_is_prefill() {
    let p = AttentionProblem { similarity: Similarity::Dot, ..problem([2, 2], [30, 30], [8, 8]) };
    let data = Data::new(&p, 51);
    let want = reference::oracle(&p, &data.inputs()).unwrap();
    let eye: Vec<f32> = (0..64).map(|i| if i / 8 == i % 8 { 1.0 } else { 0.0 }).collect();
    let bilinear = Similarity::Bilinear { query_dim: 8, per_head: false };
    let got = cpu::attention(
        &AttentionProblem { similarity: bilinear, ..p.clone() },
        &Inputs { w: Some(&eye), ..data.inputs() },
    );
    hold(&p, &got.unwrap(), &want, || unreachable!(), "identity");

    let causal = AttentionProblem { causal: Some(Align::TopLeft), ..p };
    let want = reference::oracle(&causal, &data.inputs()).unwrap();
    for t in 0..30 {
        // The whole cache is there; the layouts show the first t + 1 tokens.
        let step = AttentionProblem {
            seq_q: 1,
            seq_kv: t + 1,
            q: Layout { offset: t * 8, strides: causal.q.strides },
            o: Layout::bhsd(2, 1, 8),
            causal: Some(Align::BottomRight),
            ..causal.clone()
        };
        let got = cpu::attention(&step, &data.inputs()).unwrap().o.to_f32();
        let want: Vec<f64> = (0..16).map(|at| want.o[(at / 8 * 30 + t) * 8 + at % 8]).collect();
        assert!(reference::max_error(widen(&got), &want) < 2e-5, "token {t}");
    }
}

#[test]
fn outputs_are_reused() {
    let p =
        AttentionProblem { weights: true, causal: Some(Align::TopLeft), ..problem([2, 1], [40, 50], [8, 8]) };
    let (first, second) = (Data::new(&p, 1), Data::new(&p, 2));
    let want = cpu::attention(&p, &second.inputs()).unwrap();
    let mut out = cpu::attention(&p, &first.inputs()).unwrap();
    let place = out.o.as_ref().bytes().as_ptr();
    cpu::attention_into(&p, &second.inputs(), &mut out).unwrap();
    assert_eq!((&out, out.o.as_ref().bytes().as_ptr()), (&want, place));
    let other = problem([1, 1], [3, 4], [5, 6]);
    let data = Data::new(&other, 3);
    cpu::attention_into(&other, &data.inputs(), &mut out).unwrap();
    assert_eq!(out, cpu::attention(&other, &data.inputs()).unwrap());
    let bad = Inputs { mask: Some(&[1]), ..data.inputs() };
    assert!(cpu::attention(&other, &bad).is_err() && cpu::attention_into(&other, &bad, &mut out).is_err());
}

/// Weights of up to 2^8 by a maximum that was left behind would overflow sums that are finite otherwise.
#[test]
fn large_values_under_a_rising_maximum() {
    let (seq_kv, value) = (256, 1e35_f32);
    let problem = AttentionProblem { scale: Some(1.0), ..AttentionProblem::new(1, 1, 1, 1, seq_kv, 1, 1) };
    // In the second block scores rise by less than is worth scaling for.
    let k: Vec<f32> = (0..seq_kv).map(|j| if j < 128 { 0.0 } else { 5.0 }).collect();
    let v = vec![value; seq_kv];
    let out = cpu::attention(&problem, &Inputs::new(&[1.0_f32][..], &k[..], &v[..])).unwrap();
    let o = out.o.to_f32()[0];
    assert!((o / value - 1.0).abs() < 1e-6, "{o:e}");
}
