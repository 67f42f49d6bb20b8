//! The attention layer against its parts in f64: every way in which weights lie, every option, real layers.

mod common;

use std::path::Path as FilePath;

use common::gpu::{self, Gpu, Kind, USAGE, download, upload};
use common::npy::Npy;
use common::pool::Pieces;
use common::rng::Rng;
use wgpu_attention::reference::{layer as oracle, layer_naive, max_error};
use wgpu_attention::{
    Align, Attention, AttentionProblem, Bias, Cache, Dtype, Error, HostWeights, Layer, LayerInputs,
    LayerOperands, LayerOptions, Layout, Pairing, Path, PlanOptions, QkNorm, Rope, Similarity, Tensor,
    Window,
};

fn gpus() -> Vec<&'static Gpu> {
    [(Kind::Full, false), (Kind::Minimal, true)]
        .iter()
        .filter_map(|&(kind, checks)| gpu::get(kind, checks))
        .collect()
}

/// A layer with all that it reads.
#[derive(Clone)]
struct Case {
    name: String,
    layer: Layer,
    x: Tensor,
    context: Option<Tensor>,
    weights: HostWeights,
    table: Option<Vec<f32>>,
    mask: Option<Vec<u8>>,
    slopes: Option<Vec<f32>>,
    sinks: Option<Vec<f32>>,
    lens: Option<Vec<u32>>,
    list_q: Option<Vec<u32>>,
    list_k: Option<Vec<u32>>,
    w: Option<Vec<f32>>,
    wq: Option<Vec<f32>>,
    wk: Option<Vec<f32>>,
    score_v: Option<Vec<f32>>,
    positions: Option<Vec<u32>>,
    bias: Option<Tensor>,
}

impl Case {
    fn inputs(&self) -> LayerInputs<'_> {
        LayerInputs {
            context: self.context.as_ref().map(Tensor::as_ref),
            rope: self.table.as_deref(),
            mask: self.mask.as_deref(),
            alibi_slopes: self.slopes.as_deref(),
            sinks: self.sinks.as_deref(),
            kv_lens: self.lens.as_deref(),
            cu_seqlens_q: self.list_q.as_deref(),
            cu_seqlens_k: self.list_k.as_deref(),
            w: self.w.as_deref(),
            wq: self.wq.as_deref(),
            wk: self.wk.as_deref(),
            score_v: self.score_v.as_deref(),
            positions: self.positions.as_deref(),
            bias: self.bias.as_ref().map(Tensor::as_ref),
            ..LayerInputs::new(self.x.as_ref(), &self.weights)
        }
    }

    /// Random weights and data for a layer. Lists of ragged entries are given.
    fn new(name: &str, layer: Layer, lists: Lists, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let p = &layer.attention;
        let normals =
            |rng: &mut Rng, n: usize, by: f32| (0..n).map(|_| by * rng.normal()).collect::<Vec<f32>>();
        let matrix = |rng: &mut Rng, outputs: usize, inputs: usize| {
            Tensor::from_f32(
                layer.weight_dtype,
                &normals(rng, outputs * inputs, 1.2 / (inputs as f32).sqrt()),
            )
        };
        let bias = |rng: &mut Rng, there: bool, n: usize| {
            there.then(|| Tensor::from_f32(layer.weight_dtype, &normals(rng, n, 0.3)))
        };
        let (q, k, v) = (p.heads_q * p.query_dim(), p.heads_kv * p.head_dim, p.heads_kv * p.head_dim_v);
        let width_kv = layer.context_width.unwrap_or(layer.width);
        let o = matrix(&mut rng, layer.out_width, p.heads_q * p.head_dim_v);
        let mut weights = if layer.packed {
            HostWeights::new(matrix(&mut rng, q + k + v, layer.width), o)
        } else {
            HostWeights {
                w_k: Some(matrix(&mut rng, k, width_kv)),
                w_v: Some(matrix(&mut rng, v, width_kv)),
                ..HostWeights::new(matrix(&mut rng, q, layer.width), o)
            }
        };
        weights.b_q = bias(&mut rng, layer.bias, if layer.packed { q + k + v } else { q });
        weights.b_k = bias(&mut rng, layer.bias && !layer.packed, k);
        weights.b_v = bias(&mut rng, layer.bias && !layer.packed, v);
        weights.b_o = bias(&mut rng, layer.bias_o, layer.out_width);
        if matches!(layer.norm, Some(QkNorm::Rms { .. })) {
            weights.q_gain = Some(normals(&mut rng, p.query_dim(), 1.0));
            weights.k_gain = Some(normals(&mut rng, p.head_dim, 1.0));
        }
        let rows = |rng: &mut Rng, tokens: usize, width: usize| {
            Tensor::from_f32(p.dtype, &normals(rng, tokens * width, 1.0))
        };
        let x = rows(&mut rng, layer.tokens(), layer.width);
        let context = layer.context_width.map(|width| rows(&mut rng, layer.tokens_kv(), width));
        let [mut w, mut wq, mut wk, mut score_v] = [None, None, None, None];
        match p.similarity {
            Similarity::Bilinear { query_dim, per_head } => {
                let heads = if per_head { p.heads_q } else { 1 };
                w = Some(normals(&mut rng, heads * query_dim * p.head_dim, 0.2));
            }
            Similarity::Additive { query_dim, hidden, per_head } => {
                let heads = if per_head { p.heads_q } else { 1 };
                wq = Some(normals(&mut rng, heads * hidden * query_dim, 0.2));
                wk = Some(normals(&mut rng, heads * hidden * p.head_dim, 0.2));
                score_v = Some(normals(&mut rng, heads * hidden, 1.0));
            }
            _ => {}
        }
        let bias = p.bias.map(|bias| {
            Tensor::from_f32(bias.dtype, &normals(&mut rng, p.heads_q * p.seq_q * p.seq_kv, 1.0))
        });
        let [list_q, list_k] = lists.map_or([None, None], |[q, k]| [Some(q), Some(k)]);
        Self {
            name: name.into(),
            x,
            context,
            weights,
            table: layer.rope.map(|rope| rope.table(10_000.0)),
            mask: p.mask.map(|_| (0..p.seq_q * p.seq_kv).map(|_| u8::from(rng.chance(0.8))).collect()),
            slopes: p.alibi.then(|| (0..p.heads_q).map(|h| 0.5_f32.powi(h as i32 + 1)).collect()),
            sinks: p.sinks.then(|| normals(&mut rng, p.heads_q, 1.0)),
            lens: p.kv_lens.then(|| (0..p.batch).map(|b| (p.seq_kv - b * 3) as u32).collect()),
            list_q: list_q.filter(|_| p.total_q.is_some()),
            list_k: list_k.filter(|_| matches!(p.cache, Cache::Ragged { .. })),
            w,
            wq,
            wk,
            score_v,
            // As of entries that are padded on the left by three.
            positions: layer.positions.then(|| {
                (0..layer.tokens()).map(|t| (t % p.seq_q.max(1)).saturating_sub(3) as u32).collect()
            }),
            bias,
            layer,
        }
    }

    /// The same with a matrix and a bias for each of q, k and v in the place of packed ones.
    fn apart(&self) -> Self {
        let (layer, p) = (&self.layer, &self.layer.attention);
        let widths = [p.heads_q * p.head_dim, p.heads_kv * p.head_dim, p.heads_kv * p.head_dim_v];
        let (total, inputs) = (widths.iter().sum::<usize>(), layer.width);
        let firsts = [0, widths[0], widths[0] + widths[1]];
        let numbers = |from: &Tensor, at: &[usize]| {
            let picked: Vec<f32> = at.iter().map(|&at| from.as_ref().get(at)).collect();
            Tensor::from_f32(layer.weight_dtype, &picked)
        };
        let [w_q, w_k, w_v] = [0, 1, 2].map(|part| {
            let outputs = firsts[part]..firsts[part] + widths[part];
            let at: Vec<usize> = if layer.transposed {
                (0..inputs).flat_map(|i| outputs.clone().map(move |n| i * total + n)).collect()
            } else {
                outputs.flat_map(|n| (0..inputs).map(move |i| n * inputs + i)).collect()
            };
            numbers(&self.weights.w_q, &at)
        });
        let [b_q, b_k, b_v] = [0, 1, 2].map(|part| {
            let at: Vec<usize> = (firsts[part]..firsts[part] + widths[part]).collect();
            self.weights.b_q.as_ref().map(|bias| numbers(bias, &at))
        });
        let weights =
            HostWeights { w_q, w_k: Some(w_k), w_v: Some(w_v), b_q, b_k, b_v, ..self.weights.clone() };
        Self { layer: Layer { packed: false, ..layer.clone() }, weights, ..self.clone() }
    }

    /// The layer on a device, from buffers to y.
    fn run(&self, gpu: &Gpu) -> Result<Tensor, Error> {
        self.run_with(gpu, &PlanOptions::default())
    }

    /// With run-time checks all buffers are pieces of one.
    fn run_with(&self, gpu: &Gpu, options: &PlanOptions) -> Result<Tensor, Error> {
        let (device, queue) = (gpu.attention.device(), gpu.attention.queue());
        let own = std::cell::RefCell::new(Vec::new());
        let up = |bytes: &[u8]| {
            own.borrow_mut().push(upload(device, "a buffer", bytes, USAGE));
            own.borrow().len() - 1
        };
        let tensor = |x: &Tensor| up(x.as_ref().bytes());
        let maybe = |x: &Option<Tensor>| x.as_ref().map(tensor);
        let floats = |x: &Option<Vec<f32>>| x.as_ref().map(|x| up(bytemuck::cast_slice(x)));
        let words = |x: &Option<Vec<u32>>| x.as_ref().map(|x| up(bytemuck::cast_slice(x)));
        let w = &self.weights;
        let (x, context, rope) = (tensor(&self.x), maybe(&self.context), floats(&self.table));
        let (w_q, w_k, w_v, w_o) = (tensor(&w.w_q), maybe(&w.w_k), maybe(&w.w_v), tensor(&w.w_o));
        let (b_q, b_k, b_v, b_o) = (maybe(&w.b_q), maybe(&w.b_k), maybe(&w.b_v), maybe(&w.b_o));
        let (q_gain, k_gain) = (floats(&w.q_gain), floats(&w.k_gain));
        let (alibi_slopes, sinks, kv_lens) = (floats(&self.slopes), floats(&self.sinks), words(&self.lens));
        let (cu_seqlens_q, cu_seqlens_k) = (words(&self.list_q), words(&self.list_k));
        let mask = self.mask.as_ref().map(|mask| up(mask));
        let (bilinear, wq, wk, score_v) =
            (floats(&self.w), floats(&self.wq), floats(&self.wk), floats(&self.score_v));
        let (bias, positions) = (maybe(&self.bias), words(&self.positions));
        let dtype = self.layer.attention.out_dtype;
        let elements = self.layer.tokens() * self.layer.out_width;
        let y = tensor(&Tensor::from_f32(dtype, &vec![f32::NAN; elements.next_multiple_of(2)]));
        let own = own.take();
        let pieces = Pieces::new(gpu, own.iter().collect(), gpu.checks);
        let slice = |at: usize| pieces.slice(at);
        let operands = LayerOperands {
            context: context.map(slice),
            w_k: w_k.map(slice),
            w_v: w_v.map(slice),
            b_q: b_q.map(slice),
            b_k: b_k.map(slice),
            b_v: b_v.map(slice),
            b_o: b_o.map(slice),
            q_gain: q_gain.map(slice),
            k_gain: k_gain.map(slice),
            rope: rope.map(slice),
            options: LayerOptions {
                w: bilinear.map(slice),
                wq: wq.map(slice),
                wk: wk.map(slice),
                score_v: score_v.map(slice),
                positions: positions.map(slice),
                bias: bias.map(slice),
                mask: mask.map(slice),
                alibi_slopes: alibi_slopes.map(slice),
                sinks: sinks.map(slice),
                kv_lens: kv_lens.map(slice),
                cu_seqlens_q: cu_seqlens_q.map(slice),
                cu_seqlens_k: cu_seqlens_k.map(slice),
                ..LayerOptions::default()
            },
            ..LayerOperands::new(slice(x), slice(w_q), slice(w_o), slice(y))
        };
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        gpu.attention.prepare_layer_with(&self.layer, &operands, options)?.encode(&mut encoder);
        queue.submit([encoder.finish()]);
        pieces.give_back(&[y]);
        Ok(Tensor::from_bytes(dtype, &download(device, queue, &own[y])[..elements * dtype.bytes()]))
    }

    /// Holds y to the oracle: by the f32 rule scaled by the layer's own magnitude, or by twice what plain code in
    /// the storage precision is wrong by.
    fn check(&self, what: &str, y: &Tensor) {
        let want = oracle(&self.layer, &self.inputs()).unwrap_or_else(|e| panic!("{}: {e}", self.name));
        let got: Vec<f64> = y.to_f32().into_iter().map(f64::from).collect();
        assert_eq!(got.len(), want.y.len(), "{}", self.name);
        let p = &self.layer.attention;
        if (p.dtype, p.out_dtype) == (Dtype::F32, Dtype::F32) {
            let by = 8.0 * 2f64.powi(-24) * want.max_score.max(1.0);
            for (i, (got, y)) in got.iter().zip(&want.y).enumerate() {
                let budget = by * want.scale[i];
                assert!(
                    (got - y).abs() <= budget,
                    "{what}: y[{i}] is {got}, {y} +- {budget:e} in {}",
                    self.name
                );
            }
        } else {
            let naive = layer_naive(&self.layer, &self.inputs()).expect("the oracle took it");
            let budget = 2.0 * max_error(naive.y.iter().copied(), &want.y) + 1e-5;
            let error = max_error(got, &want.y);
            assert!(error <= budget, "{what}: {error:e} of {budget:e} in {}", self.name);
        }
    }
}

/// Offsets of ragged queries and of ragged keys.
type Lists = Option<[Vec<u32>; 2]>;

fn layers() -> Vec<(String, Layer, Lists)> {
    let causal = |problem| AttentionProblem { causal: Some(Align::TopLeft), ..problem };
    let plain = AttentionProblem::new(2, 4, 2, 19, 19, 16, 16);
    let uneven = AttentionProblem::new(1, 3, 1, 33, 33, 10, 7);
    let rope = |width, pairing| Some(Rope { pairing, width, positions: 40 });
    let mut all = vec![
        ("plain".to_string(), Layer::new(&plain, 24), None),
        (
            "packed, biased".into(),
            Layer { packed: true, bias: true, bias_o: true, ..Layer::new(&plain, 24) },
            None,
        ),
        (
            "packed, [in, out], causal, RoPE".into(),
            Layer {
                packed: true,
                transposed: true,
                bias: true,
                rope: rope(16, Pairing::HalfSplit),
                ..Layer::new(&causal(plain.clone()), 20)
            },
            None,
        ),
        (
            "uneven widths, QK-norm and interleaved RoPE".into(),
            Layer {
                bias_o: true,
                norm: Some(QkNorm::Rms { epsilon: 1e-6 }),
                rope: rope(6, Pairing::Interleaved),
                out_width: 9,
                y: Layout::rows(9),
                ..Layer::new(&causal(uneven.clone()), 13)
            },
            None,
        ),
        (
            "l2 norm, window, ALiBi, sinks, mask, lengths".into(),
            Layer {
                norm: Some(QkNorm::L2 { epsilon: 1e-6 }),
                ..Layer::new(
                    &AttentionProblem {
                        scale: Some(6.0),
                        window: Some(Window { left: Some(8), right: Some(3) }),
                        align: Align::TopLeft,
                        alibi: true,
                        sinks: true,
                        kv_lens: true,
                        mask: Some(Layout::broadcast([1, 1, 19, 19])),
                        ..plain.clone()
                    },
                    24,
                )
            },
            None,
        ),
        (
            "cross-attention".into(),
            Layer {
                bias: true,
                ..Layer::new(&AttentionProblem::new(2, 4, 4, 5, 21, 8, 12), 18).with_context(30)
            },
            None,
        ),
        (
            "packed cross-attention, [in, out], soft cap".into(),
            Layer {
                packed: true,
                transposed: true,
                bias: true,
                ..Layer::new(
                    &AttentionProblem { softcap: Some(4.0), ..AttentionProblem::new(3, 2, 1, 7, 11, 9, 9) },
                    15,
                )
                .with_context(15)
            },
            None,
        ),
    ];
    let similar = |similarity| AttentionProblem { similarity, ..plain.clone() };
    let cosine = AttentionProblem { scale: Some(7.0), ..similar(Similarity::Cosine) };
    let bias = Bias { layout: Layout::broadcast([1, 4, 19, 19]), dtype: Dtype::F32 };
    let bilinear = similar(Similarity::Bilinear { query_dim: 12, per_head: true });
    let additive = similar(Similarity::Additive { query_dim: 12, hidden: 9, per_head: false });
    let norm = Some(QkNorm::Rms { epsilon: 1e-6 });
    let all_of = |problem: &AttentionProblem| Layer {
        norm,
        rope: rope(8, Pairing::HalfSplit),
        ..Layer::new(problem, 24)
    };
    all.push(("cosine and a bias".into(), all_of(&AttentionProblem { bias: Some(bias), ..cosine }), None));
    all.push(("bilinear of other widths".into(), all_of(&bilinear), None));
    all.push(("additive".into(), all_of(&additive), None));
    // Rows of q are narrower than the quad that k begins at.
    let narrow = Layer { norm, ..Layer::new(&AttentionProblem::new(1, 1, 1, 3, 3, 2, 2), 4) };
    all.push(("narrow".into(), narrow, None));
    let given = Layer { positions: true, packed: true, ..all_of(&causal(plain.clone())) };
    all.push(("given positions".into(), given.clone(), None));
    let cross = AttentionProblem::new(2, 4, 2, 5, 21, 16, 16);
    all.push(("cross-attention at the end".into(), all_of(&cross).with_context(20), None));
    let given = Layer { positions: true, ..all_of(&cross) }.with_context(20);
    all.push(("cross-attention, given positions".into(), given, None));
    // No key to turn.
    let nothing = AttentionProblem { align: Align::TopLeft, ..AttentionProblem::new(1, 2, 2, 5, 0, 8, 8) };
    let cross = |p| {
        Layer { bias_o: true, norm, rope: rope(8, Pairing::HalfSplit), ..Layer::new(&p, 16) }.with_context(16)
    };
    all.push(("an empty context".into(), cross(nothing.clone()), None));
    let none = AttentionProblem { seq_kv: 4, cache: Cache::Ragged { total: 0 }, ..nothing };
    all.push(("an empty ragged context".into(), cross(none), Some([vec![0, 5], vec![0, 0]])));
    // Three entries of 5, 0 and 12 tokens, and as many keys.
    let list = vec![0_u32, 5, 5, 17];
    let ragged = AttentionProblem {
        cache: Cache::Ragged { total: 17 },
        ..causal(AttentionProblem::new(3, 4, 2, 12, 12, 16, 16)).with_ragged_queries(17)
    };
    let layer = Layer { rope: rope(16, Pairing::HalfSplit), packed: true, ..Layer::new(&ragged, 24) };
    all.push(("ragged".into(), layer.clone(), Some([list.clone(), list.clone()])));
    let given = Layer { positions: true, ..layer };
    all.push(("ragged, given positions".into(), given, Some([list.clone(), list])));
    let half = |dtype, weight_dtype| {
        let attention = causal(plain.clone()).with_dtype(dtype);
        let layer = Layer { weight_dtype, packed: true, bias: true, ..Layer::new(&attention, 24) };
        Layer { norm: Some(QkNorm::Rms { epsilon: 1e-6 }), rope: rope(16, Pairing::HalfSplit), ..layer }
    };
    all.push(("f16".into(), half(Dtype::F16, Dtype::F16), None));
    all.push(("bf16".into(), half(Dtype::Bf16, Dtype::Bf16), None));
    all.push(("f32 over f16 weights".into(), half(Dtype::F32, Dtype::F16), None));
    all
}

#[test]
fn layers_of_every_kind() {
    for (i, (name, layer, lists)) in layers().into_iter().enumerate() {
        let case = Case::new(&name, layer, lists, i as u64);
        if case.layer.packed {
            // The oracle asks the layer where a packed matrix's parts begin, as all else does.
            let [packed, apart] = [&case, &case.apart()].map(|case| oracle(&case.layer, &case.inputs()));
            assert_eq!(packed, apart, "{name}");
        }
        #[cfg(feature = "cpu")]
        case.check("CPU", &wgpu_attention::cpu::layer(&case.layer, &case.inputs()).expect("served"));
        for gpu in gpus() {
            let y = case.run(gpu).unwrap_or_else(|e| panic!("{name}: {e}"));
            case.check(&format!("{:?}", gpu.kind), &y);
        }
    }
}

/// The plan of its attention follows options, and what it holds is what it says.
#[test]
fn a_layer_is_planned_as_it_is_told() {
    let attention = AttentionProblem::new(1, 3, 3, 37, 37, 16, 12);
    let rope = Some(Rope { positions: 37, ..Rope::new(16) });
    let case = Case::new("told", Layer { rope, packed: true, ..Layer::new(&attention, 24) }, None, 7);
    for gpu in gpus() {
        for &path in Path::ALL {
            let own = Gpu { kind: gpu.kind, checks: false, attention: gpu.fresh() };
            let options = PlanOptions { path: Some(path), ..PlanOptions::default() };
            case.check(&format!("{path}"), &case.run_with(&own, &options).expect("served"));
            let plan = own.attention.plan_with(&attention, &options).expect("served");
            assert_eq!(plan.path(), path);
            let between = case.layer.scratch_bytes(own.attention.caps()).expect("a layer");
            assert!(between >= 4 * 37 * (2 * (3 * 16) + 3 * 12 + 3 * 12), "{between}");
            assert_eq!(own.attention.scratch_bytes(), between + plan.scratch_bytes(), "{path}");
        }
        let options =
            PlanOptions { path: Some(Path::Staged), scratch_budget: Some(1 << 11), ..PlanOptions::default() };
        case.check("on a budget", &case.run_with(gpu, &options).expect("served"));
    }
}

/// The last tokens of a sequence see all of it: as part of the whole, as queries of cross-attention to it, and as
/// those with positions that are given. All three are one, and so is any place in a longer sequence.
#[test]
fn queries_stand_where_their_keys_do() {
    let (tokens, last, width) = (23, 6, 20);
    let problem = |seq_q| AttentionProblem {
        causal: Some(Align::BottomRight),
        ..AttentionProblem::new(2, 4, 2, seq_q, tokens, 16, 16)
    };
    let rope = Rope { positions: tokens + 30, ..Rope::new(12) };
    let layer = |seq_q| Layer { rope: Some(rope), ..Layer::new(&problem(seq_q), width) };
    let whole = Case::new("a sequence", layer(tokens), None, 5);
    let x = whole.x.to_f32();
    let rows = |b: usize| &x[(b * tokens + tokens - last) * width..][..last * width];
    let tail = Case {
        name: "its end".into(),
        layer: layer(last).with_context(width),
        x: Tensor::F32([rows(0), rows(1)].concat()),
        context: Some(whole.x.clone()),
        ..whole.clone()
    };
    let with_positions = |case: &Case, positions: Vec<u32>| {
        let layer = Layer { positions: true, ..case.layer.clone() };
        Case { name: "given".into(), layer, positions: Some(positions), ..case.clone() }
    };
    let ends = (0..2 * last).map(|t| (tokens - last + t % last) as u32).collect();
    let later = (0..2 * tokens).map(|t| (t % tokens + 30) as u32).collect();
    let cases = [tail.clone(), with_positions(&tail, ends), with_positions(&whole, later)];
    let widen = |y: &Tensor| y.to_f32().into_iter().map(f64::from).collect::<Vec<_>>();
    let reference = |case: &Case| oracle(&case.layer, &case.inputs()).expect("served").y;
    let want = reference(&whole);
    let ends: Vec<f64> =
        want.chunks(tokens * width).flat_map(|entry| &entry[(tokens - last) * width..]).copied().collect();
    for case in &cases {
        let same = |got: Vec<f64>| {
            let want = if got.len() == want.len() { &want } else { &ends };
            let error = max_error(got, want);
            assert!(error <= 2e-5, "{}: {error:e}", case.name);
        };
        same(reference(case));
        #[cfg(feature = "cpu")]
        same(widen(&wgpu_attention::cpu::layer(&case.layer, &case.inputs()).expect("served")));
        for gpu in gpus() {
            same(widen(&case.run(gpu).expect("served")));
        }
    }
    // Standing elsewhere is another result: the cases above can fail.
    let elsewhere = with_positions(&tail, vec![0; 2 * last]);
    let error = max_error(reference(&elsewhere), &reference(&tail));
    assert!(error > 1e-2, "{error:e}");
}

/// Where q, k and v of all tokens are more than one binding holds, or packed weights are, each has its own.
#[test]
fn what_no_binding_holds_is_taken_apart() {
    let Some(full) = gpu::get(Kind::Full, false) else { return };
    let adapter = gpu::adapter_of(&full.attention).expect("it is there");
    let limits = wgpu::Limits::default().or_worse_values_from(&adapter.limits());
    // Room for each of three parts.
    let limits = wgpu::Limits { max_storage_buffer_binding_size: 20 << 10, ..limits };
    let descriptor = wgpu::DeviceDescriptor { required_limits: limits, ..Default::default() };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor)).expect("a device");
    let gpu = Gpu { kind: Kind::Minimal, checks: false, attention: Attention::new(&device, &queue) };
    let causal = |seq_q| AttentionProblem {
        causal: Some(Align::BottomRight),
        ..AttentionProblem::new(1, 4, 4, seq_q, 61, 16, 15)
    };
    let layer = |packed, seq_q, norm, transposed| Layer {
        packed,
        transposed,
        bias: true,
        norm,
        rope: norm.map(|_| Rope { positions: 61, ..Rope::new(10) }),
        ..Layer::new(&causal(seq_q), 60)
    };
    let norm = Some(QkNorm::Rms { epsilon: 1e-6 });
    for (i, layer) in [
        layer(false, 61, None, false),
        layer(true, 61, None, false),
        layer(true, 61, norm, false),
        layer(false, 61, norm, true),
        layer(true, 33, norm, false).with_context(60),
    ]
    .into_iter()
    .enumerate()
    {
        let case = Case::new(&format!("in parts, {i}"), layer, None, i as u64);
        case.check("in parts", &case.run(&gpu).unwrap_or_else(|e| panic!("{i}: {e}")));
    }
    // Where not even a part fits, the operand is named.
    let wide = Case::new("too wide", Layer::new(&causal(61), 100), None, 0);
    let error = wide.run(&gpu).map(drop).expect_err("refused");
    assert!(error.to_string().contains("projection of q: x"), "{error}");
}

fn fixture(dir: &str, key: &str) -> Vec<f64> {
    let path = FilePath::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(dir);
    Npy::read(&path.join(format!("layer0_{key}.npy"))).expected()
}

/// SmolLM2-135M's first layer from before RoPE: its x is q, k and v themselves, and the projections are ones that
/// take them apart.
#[test]
fn smollm2_from_before_rope() {
    let (tokens, dim, width) = (19, 64, 15 * 64);
    let parts = [fixture("smollm2", "qpre"), fixture("smollm2", "kpre"), fixture("smollm2", "v")];
    let mut x = Vec::new();
    for t in 0..tokens {
        for part in &parts {
            for head in part.chunks(tokens * dim) {
                x.extend(head[t * dim..][..dim].iter().map(|&x| x as f32));
            }
        }
    }
    let identity = |n: usize| {
        let mut w = vec![0.0; n * n];
        (0..n).for_each(|i| w[i * n + i] = 1.0);
        Tensor::F32(w)
    };
    let attention = AttentionProblem {
        causal: Some(Align::TopLeft),
        ..AttentionProblem::new(1, 9, 3, tokens, tokens, dim, dim)
    };
    let rope = Rope { positions: tokens, ..Rope::new(dim) };
    let layer = Layer {
        packed: true,
        rope: Some(rope),
        out_width: 9 * dim,
        y: Layout::rows(9 * dim),
        ..Layer::new(&attention, width)
    };
    let case = Case {
        x: Tensor::F32(x),
        weights: HostWeights::new(identity(width), identity(9 * dim)),
        table: Some(rope.table(1e5)),
        ..Case::new("SmolLM2", layer, None, 0)
    };
    let o = fixture("smollm2", "o");
    let want: Vec<f64> = (0..tokens)
        .flat_map(|t| (0..9).map(move |h| (h * tokens + t) * dim))
        .flat_map(|at| o[at..][..dim].to_vec())
        .collect();
    let largest = parts[2].iter().fold(0.0_f64, |m, x| m.max(x.abs()));
    // Scores reach 69.
    let budget = 8.0 * 2f64.powi(-24) * 69.0 * largest;
    for gpu in gpus() {
        let y = case.run(gpu).expect("served").to_f32();
        let error = max_error(y.into_iter().map(f64::from), &want);
        assert!(error <= budget, "{error:e} of {budget:e} on {:?}", gpu.kind);
    }
}

/// The first layer of all-MiniLM-L6-v2 from the hidden states that it reads, its weights read from a checkpoint's
/// file: y is the projection of the o that an f64 forward pass has found.
#[cfg(feature = "safetensors")]
#[test]
fn minilm_from_a_checkpoint() {
    use wgpu_attention::Naming;

    let (tokens, heads, dim, width) = (21, 12, 32, 384);
    let attention = AttentionProblem::new(1, heads, heads, tokens, tokens, dim, dim);
    let layer = Layer { bias: true, bias_o: true, ..Layer::new(&attention, width) };
    let dir = FilePath::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/minilm");
    let bytes = std::fs::read(dir.join("layer0_attention.safetensors")).expect("the fixture is there");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    let naming = Naming::of(&file).expect("a naming");
    assert_eq!(naming, Naming::Bert);
    let weights = HostWeights::from_safetensors(&file, naming, 0, &layer).expect("all of it is there");
    let x = fixture("minilm", "hidden").into_iter().map(|x| x as f32).collect();
    let mut case = Case::new("MiniLM, layer 0", layer.clone(), None, 0);
    (case.x, case.weights) = (Tensor::F32(x), weights.clone());

    let o = fixture("minilm", "o");
    let w_o: Vec<f64> = weights.w_o.to_f32().into_iter().map(f64::from).collect();
    let b_o = weights.b_o.expect("it has one").to_f32();
    let at = |t: usize, i: usize| o[((i / dim) * tokens + t) * dim + i % dim];
    let want: Vec<f64> = (0..tokens)
        .flat_map(|t| (0..width).map(move |n| (t, n)))
        .map(|(t, n)| f64::from(b_o[n]) + (0..width).map(|i| w_o[n * width + i] * at(t, i)).sum::<f64>())
        .collect();
    let largest = want.iter().fold(0.0_f64, |m, x| m.max(x.abs()));
    let reference = oracle(&layer, &case.inputs()).expect("served").y;
    let error = max_error(reference, &want);
    assert!(error <= 2e-6 * largest, "the oracle is off by {error:e} of {largest}");
    #[cfg(feature = "cpu")]
    case.check("CPU", &wgpu_attention::cpu::layer(&layer, &case.inputs()).expect("served"));
    for gpu in gpus() {
        let y = case.run(gpu).expect("served");
        case.check(&format!("{:?}", gpu.kind), &y);
    }

    // What a checkpoint may lack.
    let wrong = |layer: &Layer, number| {
        HostWeights::from_safetensors(&file, naming, number, layer).expect_err("refused").to_string()
    };
    assert!(wrong(&layer, 1).contains("encoder.layer.1.attention.self.query.weight: it is not there"));
    let wide = Layer::new(&attention, 400);
    assert!(wrong(&wide, 0).contains("[384, 384], the layer needs [384, 400]"), "{}", wrong(&wide, 0));
    assert!(wrong(&Layer { packed: true, ..layer }, 0).contains("[out, in]"));
}

/// A checkpoint by the names of Llama's kin: grouped heads, norms of queries and keys, stored in bf16 with f32 norms.
/// The names are written out here, as those models' files have them.
#[cfg(feature = "safetensors")]
#[test]
fn weights_by_the_names_of_llama() {
    use safetensors::tensor::{Dtype as Stored, TensorView};
    use wgpu_attention::Naming;

    let p = AttentionProblem {
        causal: Some(Align::TopLeft),
        ..AttentionProblem::new(1, 4, 2, 9, 9, 8, 8).with_dtype(Dtype::Bf16)
    };
    let layer = Layer {
        weight_dtype: Dtype::Bf16,
        norm: Some(QkNorm::Rms { epsilon: 1e-6 }),
        rope: Some(Rope { positions: 9, ..Rope::new(8) }),
        ..Layer::new(&p, 24)
    };
    let case = Case::new("Llama", layer.clone(), None, 3);
    let w = &case.weights;
    let gain = |gain: &Option<Vec<f32>>| Tensor::F32(gain.clone().expect("it has one"));
    let (w_k, w_v) = (w.w_k.clone().expect("apart"), w.w_v.clone().expect("apart"));
    let (q_gain, k_gain) = (gain(&w.q_gain), gain(&w.k_gain));
    let tensors: Vec<(&str, &Tensor, Vec<usize>, Stored)> = vec![
        ("q_proj", &w.w_q, vec![32, 24], Stored::BF16),
        ("k_proj", &w_k, vec![16, 24], Stored::BF16),
        ("v_proj", &w_v, vec![16, 24], Stored::BF16),
        ("o_proj", &w.w_o, vec![24, 32], Stored::BF16),
        ("q_norm", &q_gain, vec![8], Stored::F32),
        ("k_norm", &k_gain, vec![8], Stored::F32),
    ];
    let file = |prefix: &str, left_out: &str| {
        let views = tensors.iter().filter(|(name, ..)| *name != left_out).flat_map(
            |(name, tensor, shape, stored)| {
                // The first layer's are there as well, and are not meant.
                [0, 5].map(|layer| {
                    let bytes = tensor.as_ref().bytes();
                    let bytes = if layer == 5 { bytes } else { &[0; 4096][..bytes.len()] };
                    let view = TensorView::new(*stored, shape.clone(), bytes).expect("it fits");
                    (format!("{prefix}layers.{layer}.self_attn.{name}.weight"), view)
                })
            },
        );
        safetensors::serialize(views, None).expect("a file")
    };
    for prefix in ["model.", ""] {
        let bytes = file(prefix, "");
        let file = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
        assert_eq!(Naming::of(&file), Ok(Naming::Llama));
        let read =
            HostWeights::from_safetensors(&file, Naming::Llama, 5, &layer).expect("all of it is there");
        assert_eq!(read, case.weights);
    }
    for (left_out, name) in [("v_proj", "v_proj"), ("k_norm", "k_norm")] {
        let bytes = file("model.", left_out);
        let file = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
        let error = HostWeights::from_safetensors(&file, Naming::Llama, 5, &layer).expect_err("refused");
        assert_eq!(
            error.to_string(),
            format!("checkpoint: model.layers.5.self_attn.{name}.weight: it is not there")
        );
    }
    // What the layer would leave out makes other numbers, too.
    let bytes = file("model.", "");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    let other = Layer { norm: None, ..layer };
    let error = HostWeights::from_safetensors(&file, Naming::Llama, 5, &other).expect_err("refused");
    let why = "it is there, and the layer has no such part";
    assert_eq!(error.to_string(), format!("checkpoint: model.layers.5.self_attn.q_norm.weight: {why}"));
}

#[test]
fn wrong_layers_are_errors() {
    let attention = AttentionProblem::new(1, 2, 2, 5, 5, 8, 8);
    let layer = Layer::new(&attention, 16);
    assert_eq!(layer.validate(), Ok(()));
    let said = |layer: Layer| layer.validate().expect_err("refused").to_string();
    assert!(said(Layer::new(&AttentionProblem { seq_kv: 6, ..attention.clone() }, 16)).contains("context"));
    assert!(said(Layer::new(&AttentionProblem { lse: true, ..attention.clone() }, 16)).contains("lse"));
    for norm in
        [QkNorm::L2 { epsilon: 1e-40 }, QkNorm::Rms { epsilon: 0.0 }, QkNorm::Rms { epsilon: f32::NAN }]
    {
        assert!(said(Layer { norm: Some(norm), ..layer.clone() }).contains("epsilon"), "{norm:?}");
    }
    let rope = Some(Rope { positions: 4, ..Rope::new(8) });
    assert!(said(Layer { rope, ..layer.clone() }).contains("4 positions"));
    // Queries of cross-attention: no place, or one that the table does not have.
    let turned = |p: AttentionProblem| Layer { rope, ..Layer::new(&p, 16) }.with_context(16);
    let lengths = AttentionProblem { kv_lens: true, seq_q: 2, seq_kv: 3, ..attention.clone() };
    assert!(said(turned(lengths.clone())).contains("positions"));
    assert!(
        said(turned(AttentionProblem { kv_lens: false, seq_kv: 1, ..lengths.clone() })).contains("positions")
    );
    assert_eq!(turned(AttentionProblem { align: Align::TopLeft, ..lengths.clone() }).validate(), Ok(()));
    assert_eq!(Layer { positions: true, ..turned(lengths) }.validate(), Ok(()));
    assert!(said(Layer { positions: true, ..layer.clone() }).contains("nothing is turned"));
    let norm = Some(QkNorm::L2 { epsilon: 0.0 });
    assert!(said(Layer { norm, ..layer.clone() }).contains("epsilon = 0"));
    let norm = Some(QkNorm::L2 { epsilon: 1e-6 });
    assert!(said(Layer { norm, ..layer.clone() }).contains("1/sqrt(head_dim)"));
    for free in [
        AttentionProblem { scale: Some(9.0), ..attention.clone() },
        AttentionProblem { similarity: Similarity::Dot, ..attention.clone() },
    ] {
        assert_eq!(Layer { norm, ..Layer::new(&free, 16) }.validate(), Ok(()));
    }
    let ring = attention.clone().with_cache(Cache::Ring { capacity: 5 }, Dtype::F32);
    assert!(said(Layer::new(&ring, 16)).contains("contiguous"));
    // Where a packed matrix's second part begins is only known where both have rows of one width.
    let cross = Layer { packed: true, ..layer.clone() }.with_context(8);
    assert!(said(cross).contains("packed"));
    // Sizes of which some product would overflow.
    for sizes in [
        AttentionProblem { heads_q: 1 << 40, head_dim: 1 << 40, ..attention.clone() },
        AttentionProblem { head_dim: usize::MAX, ..attention.clone() },
        AttentionProblem { cache: Cache::Ragged { total: usize::MAX }, ..attention.clone() }
            .with_ragged_queries(usize::MAX),
    ] {
        assert!(matches!(Layer::new(&sizes, 16).validate(), Err(Error::TooLarge { .. })), "{sizes:?}");
    }
    for layer in [
        Layer { width: usize::MAX, ..layer.clone() },
        Layer { out_width: usize::MAX, ..layer.clone() },
        Layer { rope: Some(Rope { positions: 1 << 58, width: 64, ..Rope::new(64) }), ..layer.clone() },
    ] {
        assert!(layer.validate().is_err(), "{layer:?}");
    }
    assert!(said(Layer { width: 0, x: Layout::rows(0), ..layer.clone() }).contains("projection of q"));

    let case = Case::new("a layer", layer.clone(), None, 0);
    let broken = |change: &dyn Fn(&mut Case)| {
        let mut case = Case::new("a layer", layer.clone(), None, 0);
        change(&mut case);
        oracle(&case.layer, &case.inputs()).expect_err("refused").to_string()
    };
    assert!(oracle(&case.layer, &case.inputs()).is_ok());
    assert!(broken(&|case| case.weights.w_v = None).contains("projection of v"));
    assert!(broken(&|case| case.x = Tensor::F32(vec![0.0; 79])).contains("79"));
    assert!(broken(&|case| case.weights.q_gain = Some(vec![1.0; 8])).contains("q_gain"));
    let mut given = Case::new(
        "positions",
        Layer { rope: Some(Rope { positions: 4, ..Rope::new(8) }), positions: true, ..layer.clone() },
        None,
        0,
    );
    given.positions = Some(vec![0, 1, 4, 0, 0]);
    let error = oracle(&given.layer, &given.inputs()).map(drop);
    assert_eq!(error, Err(Error::Position { index: 2, got: 4, positions: 4 }));
    given.positions = Some(vec![0; 4]);
    assert!(matches!(oracle(&given.layer, &given.inputs()), Err(Error::OutOfBounds { .. })));
    given.positions = None;
    assert!(matches!(oracle(&given.layer, &given.inputs()), Err(Error::MissingOperand { .. })));
    // Norm and rotation read the lists of ragged sequences before attention does.
    let list = |list: &[u32], total: Option<usize>| {
        let mut p =
            AttentionProblem { causal: Some(Align::TopLeft), ..AttentionProblem::new(2, 2, 2, 4, 4, 8, 8) };
        if let Some(total) = total {
            p = AttentionProblem { cache: Cache::Ragged { total }, ..p }.with_ragged_queries(total);
        }
        let layer = Layer { rope: Some(Rope { positions: 4, ..Rope::new(8) }), ..Layer::new(&p, 16) };
        let mut case = Case::new("ragged", layer, None, 0);
        case.list_q = Some(list.to_vec());
        case.list_k = total.map(|_| list.to_vec());
        let said = oracle(&case.layer, &case.inputs()).map(drop);
        #[cfg(feature = "cpu")]
        assert_eq!(said, wgpu_attention::cpu::layer(&case.layer, &case.inputs()).map(drop));
        said.expect_err("refused").to_string()
    };
    assert!(list(&[], Some(6)).contains("cu_seqlens_q"));
    assert!(list(&[1, 3, 6], Some(6)).contains("cu_seqlens_q[0]"));
    assert!(list(&[0, 2, 10], Some(10)).contains("cu_seqlens_q[2]"));
    assert!(list(&[], None).contains("cu_seqlens_q"));
    let Some(gpu) = gpu::get(Kind::Full, true) else { return };
    let fails = |change: &dyn Fn(&mut Case)| {
        let mut case = Case::new("a layer", layer.clone(), None, 0);
        change(&mut case);
        case.run(gpu).expect_err("refused").to_string()
    };
    assert!(case.run(gpu).is_ok());
    assert!(fails(&|case| case.weights.w_k = None).contains("projection of k"));
    assert!(fails(&|case| case.weights.w_o = Tensor::F32(vec![0.0; 8])).contains("projection of the output"));
    assert!(fails(&|case| case.weights.b_q = Some(Tensor::F32(vec![0.0; 16]))).contains("projection of q"));
    assert!(fails(&|case| case.table = Some(vec![0.0; 64])).contains("rope"));
}

/// y may lie over x, which has been read when it is written, and over nothing else of what any dispatch reads; the word
/// that reports over nothing at all.
#[test]
fn outputs_over_what_other_dispatches_read() {
    let Some(gpu) = gpu::get(Kind::Full, false) else { return };
    let (device, queue) = (gpu.attention.device(), gpu.attention.queue());
    let attention = AttentionProblem { kv_lens: true, ..AttentionProblem::new(1, 2, 2, 4, 4, 8, 8) };
    let layer = Layer { rope: Some(Rope { positions: 4, ..Rope::new(8) }), ..Layer::new(&attention, 16) };
    let attention = AttentionProblem { status: true, ..layer.attention };
    let layer = Layer { attention, packed: true, ..layer };
    let numbers: Vec<f32> = (0..1024).map(|i| (i as f32 * 0.7).sin()).collect();
    let up = |bytes: &[u8]| upload(device, "a buffer", bytes, USAGE);
    let [x, w_q, w_o, rope, y, status] = [(); 6].map(|()| up(bytemuck::cast_slice(&numbers)));
    let lens = up(&4u32.to_le_bytes());
    let on = |y: &wgpu::Buffer, status: &wgpu::Buffer| {
        let operands = LayerOperands {
            rope: Some(rope.slice(..)),
            options: LayerOptions {
                kv_lens: Some(lens.slice(..)),
                status: Some(status.slice(..4)),
                ..LayerOptions::default()
            },
            ..LayerOperands::new(x.slice(..), w_q.slice(..), w_o.slice(..), y.slice(..))
        };
        let prepared = gpu.attention.prepare_layer(&layer, &operands)?;
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        prepared.encode(&mut encoder);
        queue.submit([encoder.finish()]);
        Ok(download(device, queue, y)[..4 * 64].to_vec())
    };
    let said = |y: &wgpu::Buffer, status: &wgpu::Buffer| -> String {
        let error: Error = on(y, status).expect_err("refused");
        error.to_string()
    };
    for (over, name) in [(&w_q, "w"), (&w_o, "w"), (&rope, "rope"), (&status, "status")] {
        let error = said(over, &status);
        assert!(error.contains(name), "{name}: {error}");
    }
    for (over, name) in [(&x, "x"), (&w_q, "w"), (&w_o, "w"), (&rope, "rope"), (&lens, "kv_lens"), (&y, "y")]
    {
        let error = said(&y, over);
        assert!(error.contains("status") && error.contains(name), "{name}: {error}");
    }
    let apart = on(&y, &status).unwrap();
    assert_eq!(on(&x, &status).unwrap(), apart);
}
