//! `run` on what other people's software computed: ONNX, PyTorch, ONNX Runtime and two real models
//! (`tests/fixtures` of the library, see its PROVENANCE.md), on every path.

mod common;

use std::path::{Path, PathBuf};

use common::*;
use safetensors::Dtype;
use serde_json::Value;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

fn manifest(path: &str) -> Vec<Value> {
    serde_json::from_slice(&std::fs::read(folder(path)).unwrap()).unwrap()
}

/// One call of the program and what it must give.
struct Case {
    name: String,
    input: Tensors,
    flags: Vec<String>,
    o: Vec<f64>,
    lse: Option<Vec<f64>>,
    weights: Option<Vec<f64>>,
    /// How far the expected numbers may themselves be off.
    slack: f64,
}

impl Case {
    fn new(name: &str, q: Stored, k: Stored, v: Stored, o: &Stored) -> Self {
        let input = tensors([("q", q), ("k", k), ("v", v)]);
        let (name, o) = (name.to_string(), o.values());
        Self { name, input, flags: vec![], o, lse: None, weights: None, slack: 0.0 }
    }

    fn flag(&mut self, name: &str, value: impl ToString) {
        self.flags.extend([name.to_string(), value.to_string()]);
    }

    /// A boolean mask or an additive one.
    fn mask(&mut self, mask: Stored) {
        let name = if mask.dtype == Dtype::BOOL { "mask" } else { "bias" };
        self.input.insert(name.into(), mask);
    }

    /// The contract's rule, with a score that no score exceeds.
    fn tolerance(&self) -> f64 {
        let largest = |name: &str| self.input[name].values().iter().fold(0.0, |m: f64, x| m.max(x.abs()));
        let width = *self.input["q"].shape.last().unwrap() as f64;
        let bound = largest("q") * largest("k") * width.sqrt();
        (8.0 * 2f64.powi(-24) * bound.max(1.0)).min(1e-4) * largest("v") + self.slack
    }

    fn check(&self, paths: &[&str]) {
        let folder = Folder::new();
        let from = folder.write("in.safetensors", file(&self.input));
        for path in paths {
            let to = folder.text(&format!("{path}.safetensors"));
            let mut args = vec!["run", &from, "-o", &to, "--path", path, "--quiet"];
            args.extend(self.flags.iter().map(String::as_str));
            if self.weights.is_some() {
                args.extend(weights_flag(path));
            }
            succeed(&args);
            let got = read(Path::new(&to));
            let tolerance = self.tolerance();
            let near = |what: &str, want: &[f64], tolerance: f64| {
                let error = distance(&got[what].values(), want);
                assert!(
                    error <= tolerance,
                    "{} {path}: {what} is off by {error:e}, allowed {tolerance:e}",
                    self.name
                );
            };
            near("o", &self.o, tolerance);
            // lse and weights are f32 whatever the rest is.
            if let Some(lse) = &self.lse {
                near("lse", lse, 1e-4);
            }
            if let (Some(weights), false) = (&self.weights, weights_flag(path).is_empty()) {
                near("weights", weights, 1e-5);
            }
        }
    }
}

/// `[B,S,H*D]` with the heads told apart; the bytes stay.
fn split_heads(x: &Stored, heads: usize) -> Stored {
    let &[b, s, width] = x.shape.as_slice() else { panic!("rank 3") };
    Stored { shape: vec![b, s, heads, width / heads], ..x.clone() }
}

/// f32 `[B,S,H,D]` as `[B,H,S,D]`, or back.
fn exchange(x: &Stored) -> Stored {
    let &[b, m, n, d] = x.shape.as_slice() else { panic!("rank 4") };
    let values = x.values();
    let mut out = Vec::with_capacity(values.len());
    for at in 0..b * n * m {
        let (entry, i, j) = (at / m / n, at / m % n, at % m);
        out.extend((0..d).map(|c| values[((entry * m + j) * n + i) * d + c] as f32));
    }
    Stored::f32(&[b, n, m, d], &out)
}

/// `[B,H,P,D]` and `[B,H,S,D]` as `[B,H,P+S,D]`.
fn append(past: &Stored, new: &Stored) -> Stored {
    let (&[b, h, p, d], &[_, _, s, _]) = (past.shape.as_slice(), new.shape.as_slice()) else {
        panic!("rank 4")
    };
    let (old, new) = (past.values(), new.values());
    let mut out = Vec::new();
    for head in 0..b * h {
        out.extend(
            old[head * p * d..][..p * d].iter().chain(&new[head * s * d..][..s * d]).map(|&x| x as f32),
        );
    }
    Stored::f32(&[b, h, p + s, d], &out)
}

#[test]
fn onnx() {
    let paths = paths();
    let entries = manifest("onnx/manifest.json");
    assert_eq!(entries.len(), 43);
    for entry in &entries {
        let name = entry["name"].as_str().unwrap();
        let file = |part: &str, key: &str| {
            let file = entry[part].get(key)?["file"].as_str()?;
            Some(npy::read(&folder("onnx").join(name).join(file), false))
        };
        let input = |key: &str| file("inputs", key);
        let attribute = |key: &str| entry["attributes"].get(key).and_then(Value::as_f64);
        let (mut q, mut k, mut v) = (input("Q").unwrap(), input("K").unwrap(), input("V").unwrap());
        let mut y = file("outputs", "Y").unwrap();
        let mut by_token = false;
        if let (Some(hq), Some(hkv)) = (attribute("q_num_heads"), attribute("kv_num_heads")) {
            (q, y) = (split_heads(&q, hq as usize), split_heads(&y, hq as usize));
            (k, v) = (split_heads(&k, hkv as usize), split_heads(&v, hkv as usize));
            by_token = true;
        }
        let mut past = 0;
        if let (Some(past_k), Some(past_v)) = (input("past_key"), input("past_value")) {
            if by_token {
                [q, k, v, y] = [&q, &k, &v, &y].map(exchange);
                by_token = false;
            }
            past = past_k.shape[2];
            (k, v) = (append(&past_k, &k), append(&past_v, &v));
        }
        let mut case = Case::new(name, q, k, v, &y);
        // Their goldens are f32 of numpy.
        case.slack = 1e-6;
        if by_token {
            case.flag("--layout", "bshd");
        }
        if let Some(scale) = attribute("scale") {
            case.flag("--scale", scale);
        }
        if let Some(cap) = attribute("softcap").filter(|&cap| cap > 0.0) {
            case.flag("--softcap", cap);
        }
        if attribute("is_causal") == Some(1.0) {
            // ONNX counts query positions from the end of the past.
            case.flag("--window", format!("-,{past}"));
            case.flag("--align", "top-left");
        }
        if let Some(mask) = input("attn_mask") {
            case.mask(mask);
        }
        if attribute("qk_matmul_output_mode") == Some(3.0) {
            case.weights = file("outputs", "qk_matmul_output").map(|weights| weights.values());
        }
        case.check(&paths);
    }
}

/// All but `sim_additive`, which is not a similarity of this crate.
#[test]
fn torch() {
    let paths = paths();
    let mut count = 0;
    for entry in manifest("torch/manifest.json") {
        let name = entry["name"].as_str().unwrap();
        if name == "sim_additive" {
            continue;
        }
        count += 1;
        let bf16 = entry["inputs"]["q"][1] == "bfloat16";
        let file = |key: &str| npy::read(&folder("torch").join(name).join(format!("{key}.npy")), bf16);
        let mut case = Case::new(name, file("q"), file("k"), file("v"), &file("o"));
        if let Some(scale) = entry["attributes"]["scale"].as_f64() {
            case.flag("--scale", scale);
        }
        match entry["attributes"]["causal"].as_str() {
            Some("top_left") => case.flag("--causal", "top-left"),
            Some("bottom_right") => case.flag("--causal", "bottom-right"),
            _ => {}
        }
        match name {
            "flex_softcap2" => case.flag("--softcap", 2),
            "sim_dot" => case.flag("--similarity", "dot"),
            "sim_bilinear" => {
                case.flag("--similarity", "bilinear");
                case.input.insert("w".into(), file("w"));
                // The bound on scores knows nothing of W.
                case.slack = 1e-5;
            }
            _ => {}
        }
        if entry["inputs"].get("mask").is_some() {
            case.mask(file("mask"));
        }
        if entry["outputs"].get("lse").is_some() {
            case.lse = Some(file("lse").values());
        }
        // A few roundings of the output and of the weights, in the type of q.
        let rounding = match case.input["q"].dtype {
            Dtype::F16 => 2f64.powi(-11),
            Dtype::BF16 => 2f64.powi(-8),
            _ => 0.0,
        };
        case.slack += 2.0 * rounding * case.o.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
        case.check(&paths);
    }
    assert_eq!(count, 25);
}

#[test]
fn onnx_runtime() {
    let paths = paths();
    for i in 0..6 {
        let dir = folder(&format!("ort_web/gqa_jsonc_{i}"));
        let manifest: Value =
            serde_json::from_slice(&std::fs::read(dir.join("manifest.json")).unwrap()).unwrap();
        let heads = |key: &str| manifest[key].as_u64().unwrap() as usize;
        let file = |name: &str| npy::read(&dir.join(format!("{name}.npy")), false);
        let bhsd = |name: &str, heads: usize| match file(name) {
            x if x.shape.len() == 3 => exchange(&split_heads(&x, heads)),
            x => x,
        };
        let (hq, hkv) = (heads("num_heads"), heads("kv_num_heads"));
        let (mut k, mut v) = (bhsd("k", hkv), bhsd("v", hkv));
        if dir.join("pk.npy").exists() {
            (k, v) = (append(&file("pk"), &k), append(&file("pv"), &v));
        }
        let mut case = Case::new(&format!("gqa_jsonc_{i}"), bhsd("q", hq), k, v, &bhsd("y", hq));
        case.flag("--causal", "bottom-right");
        case.slack = 2e-6 * case.o.iter().fold(1.0, |m: f64, x| m.max(x.abs()));
        case.check(&paths);
    }
}

#[test]
fn models_on_real_text() {
    let paths = paths();
    let layers = (0..6).map(|layer| ("minilm", layer)).chain([("smollm2", 0)]);
    for (model, layer) in layers {
        let file = |key: &str| npy::read(&folder(model).join(format!("layer{layer}_{key}.npy")), false);
        let mut case =
            Case::new(&format!("{model}, layer {layer}"), file("q"), file("k"), file("v"), &file("o"));
        case.lse = Some(file("lse").values());
        if model == "smollm2" {
            case.flag("--causal", "bottom-right");
        }
        case.check(&paths);
    }
}
