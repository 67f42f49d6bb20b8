//! Cases that other people's software computed (`fixtures/PROVENANCE.md`): ONNX, PyTorch, ONNX
//! Runtime, and two real models. Each on the oracle, the CPU path and the GPU.

mod common;

use std::path::{Path, PathBuf};

use common::backward::Pass;
use common::case::{Case, Data};
use common::check::Expected;
use common::gpu::{self, Kind};
use common::json::Json;
use common::npy::{Elements, Npy};
use common::subject::{Outcome, Subject};
use wgpu_attention::reference::max_error;
use wgpu_attention::{
    Align, AttentionProblem, BackwardProblem, Bias, Dtype, Layout, Operand, Similarity, Tensor, Window,
};

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn json(path: PathBuf) -> Json {
    Json::parse(&std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
}

/// What a fixture expects of our outputs.
struct Golden {
    o: Vec<f64>,
    lse: Option<Vec<f64>>,
    weights: Option<Vec<f64>>,
    /// How far the expected numbers may themselves be off: 0 where they are f64.
    error: f64,
}

/// Holds every subject against the fixture's numbers, and against the oracle.
fn check(case: &Case, golden: Golden) {
    let own = Expected::of(case);
    let mut expected = Expected::of(case);
    expected.o += golden.error;
    expected.lse += golden.error;
    expected.weights += golden.error;
    expected.oracle.o = golden.o;
    if let Some(lse) = golden.lse {
        assert!(case.problem.lse);
        expected.oracle.lse = lse;
    }
    if let Some(weights) = golden.weights {
        assert!(case.problem.weights);
        expected.oracle.weights = Some(weights);
    }
    let mut subjects = vec![Subject::Oracle];
    // The fixtures are f32 to the last digit, which f16 tensors would not have.
    let serves = |subject: &Subject| subject.takes(case.problem.dtype) && subject.compares(case);
    subjects.extend(Subject::few().into_iter().filter(serves));
    for subject in subjects {
        let case = &subject.asked(case);
        match subject.run(case) {
            Ok(Outcome::Done(out, gap)) => {
                for (against, expected) in [("the fixture", &expected), ("the oracle", &own)] {
                    if let Err(what) = expected.check(case, &out, gap) {
                        panic!("{subject:?} against {against}: {what}\n  {}", case.name);
                    }
                }
            }
            Ok(Outcome::Unsupported(why)) => panic!("{subject:?} does not serve {}: {why}", case.name),
            Err(e) => panic!("{subject:?}: {e}\n  {}", case.name),
        }
    }
}

/// `[batch, heads, seq, dim]` or `[batch, seq, heads * dim]`, as ONNX has both.
struct Activation {
    tensor: Tensor,
    layout: Layout,
    shape: [usize; 4],
}

impl Activation {
    fn new(npy: &Npy, heads: Option<usize>) -> Self {
        let (layout, shape) = match (npy.shape.as_slice(), heads) {
            (&[b, h, s, d], _) => (Layout::bhsd(h, s, d), [b, h, s, d]),
            (&[b, s, width], Some(h)) => (Layout::bshd(h, s, width / h), [b, h, s, width / h]),
            (shape, _) => panic!("no activation: {shape:?}"),
        };
        Self { tensor: npy.tensor(), layout, shape }
    }

    /// `[batch, heads, past + seq, dim]`: what a cache of that past holds afterwards.
    fn after(self, past: &Npy) -> Self {
        let &[b, h, p, d] = past.shape.as_slice() else { panic!("a past of rank 4") };
        let s = self.shape[2];
        let (past, new) = (past.tensor(), self.tensor.as_ref());
        let shape = [b, h, p + s, d];
        let layout = Layout::bhsd(h, p + s, d);
        let old = Layout::bhsd(h, p, d);
        let tensor = common::case::fill(new.dtype(), layout, shape, 0, |[b, h, i, c]| {
            Some(if i < p {
                past.as_ref().get(old.index([b, h, i, c]))
            } else {
                new.get(self.layout.index([b, h, i - p, c]))
            })
        });
        Self { tensor, layout, shape }
    }
}

/// The problem of three activations: shapes, layouts and element type.
fn problem_of(q: &Activation, k: &Activation, v: &Activation) -> AttentionProblem {
    let [batch, heads_q, seq_q, head_dim] = q.shape;
    let [_, heads_kv, seq_kv, _] = k.shape;
    let p = AttentionProblem::new(batch, heads_q, heads_kv, seq_q, seq_kv, head_dim, v.shape[3]);
    let o = if q.layout == Layout::bhsd(heads_q, seq_q, head_dim) {
        Layout::bhsd(heads_q, seq_q, v.shape[3])
    } else {
        Layout::bshd(heads_q, seq_q, v.shape[3])
    };
    AttentionProblem {
        q: q.layout,
        k: k.layout,
        v: v.layout,
        o,
        lse: true,
        ..p.with_dtype(q.tensor.as_ref().dtype())
    }
}

/// A bias or mask of rank 2 to 4, broadcast.
fn attach_mask(problem: &mut AttentionProblem, data: &mut Data, mask: &Npy) {
    let mut dims = [1; 4];
    dims[4 - mask.shape.len()..].copy_from_slice(&mask.shape);
    let layout = Layout::broadcast(dims);
    if let Elements::Bool(bytes) = &mask.elements {
        problem.mask = Some(layout);
        data.mask = Some(bytes.clone());
    } else {
        problem.bias = Some(Bias { dtype: mask.dtype(), layout });
        data.bias = Some(mask.tensor());
    }
}

/// Expected o in logical order.
fn logical(y: &Npy, problem: &AttentionProblem) -> Vec<f64> {
    let y = y.expected();
    common::case::indices(problem.shape(Operand::O)).map(|at| y[problem.o.index(at)]).collect()
}

/// All 43. Their `present` outputs are compared with the concatenation that is fed in, and every
/// mode of `qk_matmul_output`: 3 is our weights; for the others, which stop before the softmax,
/// `exp(what is missing + score - lse)` is.
#[test]
fn onnx() {
    let manifest = json(folder("onnx/manifest.json"));
    assert_eq!(manifest.array().len(), 43);
    let mut modes = [0; 4];
    for entry in manifest.array() {
        let name = entry.get("name").expect("a name").text();
        let file = |part: &str, key: &str| {
            let file = entry.get(part)?.get(key)?.get("file")?.text();
            Some(Npy::read(&folder("onnx").join(name).join(file)))
        };
        let (input, output) = (|key: &str| file("inputs", key), |key: &str| file("outputs", key));
        let attributes = entry.get("attributes").expect("attributes");
        let number = |key: &str| attributes.get(key).map(Json::number);
        let heads_kv = attributes.size("kv_num_heads");

        let q = Activation::new(&input("Q").expect("Q"), attributes.size("q_num_heads"));
        let mut k = Activation::new(&input("K").expect("K"), heads_kv);
        let mut v = Activation::new(&input("V").expect("V"), heads_kv);
        let mut past = 0;
        if let (Some(past_k), Some(past_v)) = (input("past_key"), input("past_value")) {
            past = past_k.shape[2];
            (k, v) = (k.after(&past_k), v.after(&past_v));
            assert_eq!(Some(k.tensor.to_f32()), output("present_key").map(|x| x.f32s()), "{name}");
            assert_eq!(Some(v.tensor.to_f32()), output("present_value").map(|x| x.f32s()), "{name}");
        }
        let mut p = problem_of(&q, &k, &v);
        p.scale = number("scale").map(|x| x as f32);
        p.softcap = number("softcap").map(|x| x as f32).filter(|&cap| cap > 0.0);
        if number("is_causal") == Some(1.0) {
            // ONNX counts query positions from the end of the past.
            p.align = Align::TopLeft;
            p.window = Some(Window { left: None, right: Some(past) });
        }
        let mut data = Data::new(q.tensor, k.tensor, v.tensor);
        if let Some(mask) = input("attn_mask") {
            attach_mask(&mut p, &mut data, &mask);
        }

        let o = logical(&output("Y").expect("Y"), &p);
        let mut weights = None;
        if let Some(matrix) = output("qk_matmul_output") {
            p.weights = true;
            let mode = attributes.size("qk_matmul_output_mode").unwrap_or(0);
            modes[mode] += 1;
            weights = Some(weights_of(&matrix.expected(), mode, &p, &data));
        }
        // Their goldens are f32 of numpy.
        let golden = Golden { o, lse: None, weights, error: 1e-6 };
        check(&Case::new(name, p, data), golden);
    }
    assert!(modes[0] > 0 && modes[2] > 0 && modes[3] > 0, "modes compared: {modes:?}");
}

/// The softmax weights that belong to a `qk_matmul_output`.
fn weights_of(matrix: &[f64], mode: usize, p: &AttentionProblem, data: &Data) -> Vec<f64> {
    if mode == 3 {
        return matrix.to_vec();
    }
    assert!(p.softcap.is_none() && p.mask.is_none(), "no such case was given");
    let (rows, keys) = (p.rows(), p.seq_kv);
    let mut weights = Vec::with_capacity(rows * keys);
    for row in 0..rows {
        let (b, h, i) = (row / p.seq_q / p.heads_q, row / p.seq_q % p.heads_q, row % p.seq_q);
        let kept = p.kv_range(i, keys);
        let scores: Vec<f64> = (0..keys)
            .map(|j| {
                let mut s = matrix[row * keys + j];
                // Mode 2 has the bias in it, mode 0 has not.
                if let (0, Some(bias), Some(values)) = (mode, p.bias, &data.bias) {
                    s += f64::from(values.as_ref().get(bias.layout.index([b, h, i, j])));
                }
                if kept.contains(&j) { s } else { f64::NEG_INFINITY }
            })
            .collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        weights.extend(scores.iter().map(|s| (s - max).exp() / sum));
    }
    weights
}

/// A case of PyTorch's, by its entry in the manifest, and the folder of its arrays.
fn torch_case(entry: &Json) -> (Case, PathBuf) {
    let name = entry.get("name").expect("a name").text();
    let dir = folder("torch").join(name);
    let file = |key: &str| Npy::read(&dir.join(format!("{key}.npy")));
    let (q, k, v) = (
        Activation::new(&file("q"), None),
        Activation::new(&file("k"), None),
        Activation::new(&file("v"), None),
    );
    let mut p = problem_of(&q, &k, &v);
    let attributes = entry.get("attributes").expect("attributes");
    p.scale = attributes.get("scale").map(|x| x.number() as f32);
    p.causal = match attributes.get("causal").map_or("none", Json::text) {
        "top_left" => Some(Align::TopLeft),
        "bottom_right" => Some(Align::BottomRight),
        _ => None,
    };
    p.softcap = (name == "flex_softcap2").then_some(2.0);
    let mut data = Data::new(q.tensor, k.tensor, v.tensor);
    if has(entry, "inputs", "mask") {
        attach_mask(&mut p, &mut data, &file("mask"));
    }
    match name {
        "sim_dot" => p.similarity = Similarity::Dot,
        "sim_bilinear" => {
            p.similarity = Similarity::Bilinear { query_dim: p.head_dim, per_head: true };
            data.w = Some(file("w").f32s());
        }
        "sim_additive" => {
            let hidden = file("va").shape[0];
            p.similarity = Similarity::Additive { query_dim: p.head_dim, hidden, per_head: false };
            // They are [width, hidden] there.
            let transposed = |key: &str| {
                let (file, x) = (file(key), file(key).f32s());
                let width = file.shape[0];
                Some((0..hidden * width).map(|at| x[at % width * hidden + at / width]).collect())
            };
            (data.wq, data.wk) = (transposed("wq"), transposed("wk"));
            data.score_v = Some(file("va").f32s());
        }
        _ => {}
    }
    (Case::new(name, p, data), dir)
}

fn has(entry: &Json, part: &str, key: &str) -> bool {
    entry.get(part).is_some_and(|part| part.get(key).is_some())
}

/// 26 of PyTorch's: `scaled_dot_product_attention` and `flex_attention` in f64, similarities from
/// primitives.
#[test]
fn torch() {
    let manifest = json(folder("torch/manifest.json"));
    assert_eq!(manifest.array().len(), 26);
    for entry in manifest.array() {
        let (case, dir) = torch_case(entry);
        let file = |key: &str| Npy::read(&dir.join(format!("{key}.npy")));
        let lse = has(entry, "outputs", "lse").then(|| file("lse").expected());
        let o = logical(&file("o"), &case.problem);
        check(&case, Golden { o, lse, weights: None, error: 0.0 });
    }
}

/// 23 of those again, with the gradients of PyTorch's autograd: the oracle's, and the GPU's.
#[test]
fn torch_gradients() {
    let (mut count, mut narrow, mut biased) = (0, 0, 0);
    for entry in json(folder("torch/manifest.json")).array() {
        let (case, dir) = torch_case(entry);
        let file = |key: &str| Npy::read(&dir.join(format!("{key}.npy")));
        if !dir.join("dout.npy").exists() {
            continue;
        }
        count += 1;
        let problem = BackwardProblem::of(&case.problem);
        let dout = Tensor::from_f32(case.problem.out_dtype, &file("dout").f32s());
        let pass = Pass { case, problem, dout };
        let own = pass.expected();
        let there = Operand::GRADIENTS.into_iter().filter(|&of| pass.problem.layout(of).is_some());
        let golden: Vec<_> = there.map(|operand| (operand, file(&operand.to_string()).expected())).collect();
        biased += usize::from(pass.problem.dbias.is_some());
        let scale = golden.iter().flat_map(|(_, x)| x).fold(1.0, |max: f64, x| max.max(x.abs()));
        for (operand, golden) in golden {
            let entries = pass.problem.shape(operand).iter().product::<usize>() / golden.len();
            // One gradient for all entries.
            let golden = golden.repeat(entries);
            let error = max_error(own.oracle.get(operand).iter().copied(), &golden);
            // Rounded to f32, as is a scale of ours.
            assert!(error <= 1e-7 * scale, "{operand} of the oracle: {error:e}\n  {}", pass.case.name);
        }
        narrow += usize::from(pass.is_narrow());
        for gpu in [Kind::Full, Kind::Minimal].into_iter().filter_map(|kind| gpu::get(kind, false)) {
            let got = pass.run_from_slices(gpu);
            pass.check(&got, &own).unwrap_or_else(|what| panic!("{:?}: {what}", gpu.kind));
        }
    }
    assert_eq!((count, narrow, biased), (23, 2, 1));
}

/// `[1, seq, heads * dim]` out of a literal.
fn literal(numbers: &[f64], heads: usize) -> impl Fn([usize; 3]) -> Npy {
    let x: Vec<f32> = numbers.iter().map(|&x| x as f32).collect();
    move |shape| {
        assert_eq!(shape[2] % heads, 0);
        Npy { shape: shape.to_vec(), elements: Elements::F32(x.clone()) }
    }
}

/// The literals in ONNX Runtime's WebGPU tests: multi-head and grouped, with a past, a sink, a
/// window, a cap.
#[test]
fn onnx_runtime_literals() {
    let literals = json(folder("ort_web/literals.json"));
    assert_eq!(literals.array().len(), 12);
    for entry in literals.array() {
        let name = entry.get("name").expect("a name").text();
        let numbers = |key: &str| entry.get(key).map(Json::numbers);
        let dims = |key: &str| -> [usize; 3] {
            let dims: Vec<usize> =
                entry.get(key).expect("dims").numbers().iter().map(|&x| x as usize).collect();
            dims.try_into().expect("rank 3")
        };
        let (heads_q, heads_kv) =
            (entry.size("num_heads").expect("heads"), entry.size("kv_num_heads").expect("heads"));
        let (mut xq, mut xk, mut xv) =
            (numbers("q").expect("q"), numbers("k").expect("k"), numbers("v").expect("v"));
        let width = dims("q_dims")[2];
        if let Some(bias) = numbers("bias") {
            // The projection's bias, for q, k and v one after the other.
            for (x, bias) in [&mut xq, &mut xk, &mut xv].into_iter().zip(bias.chunks(width)) {
                x.iter_mut().enumerate().for_each(|(i, x)| *x += bias[i % width]);
            }
        }
        let q = Activation::new(&literal(&xq, heads_q)(dims("q_dims")), Some(heads_q));
        let mut k = Activation::new(&literal(&xk, heads_kv)(dims("kv_dims")), Some(heads_kv));
        let mut v = Activation::new(&literal(&xv, heads_kv)(dims("kv_dims")), Some(heads_kv));
        if let (Some(past_k), Some(past_v)) = (numbers("past_k"), numbers("past_v")) {
            let past = |x: &[f64], d: usize| Npy {
                shape: vec![1, heads_kv, x.len() / heads_kv / d, d],
                elements: Elements::F32(x.iter().map(|&x| x as f32).collect()),
            };
            (k, v) = (k.after(&past(&past_k, q.shape[3])), v.after(&past(&past_v, q.shape[3])));
        }
        let mut p = problem_of(&q, &k, &v);
        if entry.size("causal") == Some(1) {
            p.causal = Some(Align::BottomRight);
        }
        p.softcap = entry.get("softcap").map(|x| x.number() as f32);
        // A window of W keys: the query's own and W - 1 before it.
        p.window = entry.size("window").map(|w| Window { left: Some(w - 1), right: None });
        let mut data = Data::new(q.tensor, k.tensor, v.tensor);
        if let Some(sinks) = numbers("sink") {
            p.sinks = true;
            data.sinks = Some(sinks.into_iter().map(|x| x as f32).collect());
        }
        let y = literal(&numbers("y").expect("y"), heads_q)(dims("q_dims"));
        let error = entry.get("tol").map_or(0.0, Json::number);
        let o = logical(&y, &p);
        // The tolerance of their tests is relative as well.
        let error = error * o.iter().fold(1.0, |max: f64, x| max.max(x.abs()));
        check(&Case::new(name, p, data), Golden { o, lse: None, weights: None, error });
    }
}

/// The same project's JSON tests of GroupQueryAttention.
#[test]
fn onnx_runtime_grouped() {
    for i in 0..6 {
        let dir = folder("ort_web").join(format!("gqa_jsonc_{i}"));
        let manifest = json(dir.join("manifest.json"));
        let file = |key: &str| Npy::read(&dir.join(format!("{key}.npy")));
        let (heads_q, heads_kv) = (manifest.size("num_heads"), manifest.size("kv_num_heads"));
        let q = Activation::new(&file("q"), heads_q);
        let mut k = Activation::new(&file("k"), heads_kv);
        let mut v = Activation::new(&file("v"), heads_kv);
        if dir.join("pk.npy").exists() {
            (k, v) = (k.after(&file("pk")), v.after(&file("pv")));
        }
        let mut p = problem_of(&q, &k, &v);
        p.causal = Some(Align::BottomRight);
        let y = file("y");
        let o = logical(&y, &p);
        let error = 2e-6 * o.iter().fold(1.0, |max: f64, x| max.max(x.abs()));
        let data = Data::new(q.tensor, k.tensor, v.tensor);
        check(&Case::new(format!("gqa_jsonc_{i}"), p, data), Golden { o, lse: None, weights: None, error });
    }
}

/// q, k and v of a real layer, and the f64 forward's o and lse.
fn layer(dir: &str, layer: usize, causal: Option<Align>) -> (Case, Golden) {
    let file = |key: &str| Npy::read(&folder(dir).join(format!("layer{layer}_{key}.npy")));
    let (q, k, v) = (
        Activation::new(&file("q"), None),
        Activation::new(&file("k"), None),
        Activation::new(&file("v"), None),
    );
    let mut p = problem_of(&q, &k, &v);
    p.causal = causal;
    let golden =
        Golden { o: file("o").expected(), lse: Some(file("lse").expected()), weights: None, error: 0.0 };
    (Case::new(format!("{dir}, layer {layer}"), p, Data::new(q.tensor, k.tensor, v.tensor)), golden)
}

/// The same real activations, rounded to the half precisions, against the oracle on those.
fn check_halves(case: &Case) {
    for dtype in [Dtype::F16, Dtype::Bf16] {
        let round = |x: &Tensor| Tensor::from_f32(dtype, &x.to_f32());
        let data = Data::new(round(&case.data.q), round(&case.data.k), round(&case.data.v));
        let case =
            Case::new(format!("{} in {dtype}", case.name), case.problem.clone().with_dtype(dtype), data);
        let expected = Expected::of(&case);
        for subject in Subject::few() {
            if let Err(what) = subject.check(&case, &expected) {
                panic!("{what}");
            }
        }
    }
}

/// all-MiniLM-L6-v2 on one sentence: six layers, twelve heads, scores up to 33.
#[test]
fn minilm() {
    for number in 0..6 {
        let (case, golden) = layer("minilm", number, None);
        check(&case, golden);
        if number == 3 {
            check_halves(&case);
        }
    }
}

/// SmolLM2-135M's first layer on 19 tokens: causal, nine query heads on three, scores up to 69.
#[test]
fn smollm2() {
    let (case, golden) = layer("smollm2", 0, Some(Align::BottomRight));
    check(&case, golden);
    check_halves(&case);
}
