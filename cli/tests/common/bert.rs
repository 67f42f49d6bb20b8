//! A BERT so small that a test writes it, and its forward pass in f64, which shares no code with the program's.

use serde_json::json;

use super::{Folder, Stored, Tensors, file, noise, tensors};

pub(crate) const HIDDEN: usize = 24;
pub(crate) const HEADS: usize = 3;
pub(crate) const LAYERS: usize = 2;
pub(crate) const POSITIONS: usize = 12;
const BETWEEN: usize = 40;
/// Words of the vocabulary. One is markup: a page must not take it for that.
const WORDS: [&str; 12] =
    ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "##s", "on", "a", "mat", "</script><i>"];

/// A model's files.
#[derive(Clone)]
pub(crate) struct TinyBert {
    pub(crate) config: serde_json::Value,
    pub(crate) tokenizer: serde_json::Value,
    pub(crate) tensors: Tensors,
}

impl TinyBert {
    pub(crate) fn new() -> Self {
        let vocab: serde_json::Map<_, _> =
            WORDS.iter().enumerate().map(|(id, word)| (word.to_string(), json!(id))).collect();
        let special = |token: &str, id: usize| {
            (token.to_string(), json!({"id": token, "ids": [id], "tokens": [token]}))
        };
        let added: Vec<_> = (0..4)
            .map(|id| {
                json!({"id": id, "content": WORDS[id], "special": true, "single_word": false, "lstrip": false,
                       "rstrip": false, "normalized": false})
            })
            .collect();
        let part = |name: &str| json!({"SpecialToken": {"id": name, "type_id": 0}});
        let text = json!({"Sequence": {"id": "A", "type_id": 0}});
        let tokenizer = json!({
            "version": "1.0",
            // As checkpoints have them: neither may cut or fill a text.
            "truncation": {"max_length": 4, "strategy": "LongestFirst", "stride": 0},
            "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                        "pad_type_id": 0, "pad_token": "[PAD]"},
            "added_tokens": added,
            "normalizer": {"type": "Lowercase"},
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [part("[CLS]"), text, part("[SEP]")],
                "pair": [part("[CLS]"), text, part("[SEP]"), {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": serde_json::Map::from_iter([special("[CLS]", 2), special("[SEP]", 3)]),
            },
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
            "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                      "max_input_chars_per_word": 100, "vocab": vocab},
        });
        let config = json!({
            "model_type": "bert", "architectures": ["BertModel"], "hidden_act": "gelu", "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": BETWEEN,
            "max_position_embeddings": POSITIONS, "type_vocab_size": 2, "vocab_size": WORDS.len(),
            "layer_norm_eps": 1e-12, "position_embedding_type": "absolute",
        });
        Self { config, tokenizer, tensors: weights() }
    }

    /// Writes the model into a folder, and gives its path.
    pub(crate) fn write(&self, folder: &Folder) -> String {
        folder.write("config.json", self.config.to_string());
        folder.write("tokenizer.json", self.tokenizer.to_string());
        folder.write("model.safetensors", file(&self.tensors));
        folder.text("")
    }

    fn get(&self, name: &str) -> Vec<f64> {
        self.tensors[name].values()
    }

    /// `x W' + b`, row by row.
    fn map(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let (w, b) = (self.get(&format!("{name}.weight")), self.get(&format!("{name}.bias")));
        let inputs = w.len() / b.len();
        let dot = |row: &[f64], o: usize| row.iter().zip(&w[o * inputs..]).map(|(x, w)| x * w).sum::<f64>();
        x.chunks(inputs)
            .flat_map(|row| (0..b.len()).map(move |o| (row, o)))
            .map(|(row, o)| dot(row, o) + b[o])
            .collect()
    }

    fn norm(&self, name: &str, x: Vec<f64>) -> Vec<f64> {
        let (gain, bias) =
            (self.get(&format!("{name}.LayerNorm.weight")), self.get(&format!("{name}.LayerNorm.bias")));
        x.chunks(HIDDEN)
            .flat_map(|row| {
                let mean = row.iter().sum::<f64>() / HIDDEN as f64;
                let spread =
                    (row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / HIDDEN as f64 + 1e-12).sqrt();
                (0..HIDDEN).map(|i| (row[i] - mean) / spread * gain[i] + bias[i]).collect::<Vec<_>>()
            })
            .collect()
    }

    /// What enters each layer and leaves the last, and each layer's attention weights `[heads, n, n]`.
    pub(crate) fn forward(&self, ids: &[u32]) -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
        let n = ids.len();
        let table = |name: &str| self.get(&format!("embeddings.{name}_embeddings.weight"));
        let (words, positions, kinds) = (table("word"), table("position"), table("token_type"));
        let x: Vec<f64> = (0..n * HIDDEN)
            .map(|i| words[ids[i / HIDDEN] as usize * HIDDEN + i % HIDDEN] + positions[i] + kinds[i % HIDDEN])
            .collect();
        let mut hidden = vec![self.norm("embeddings", x)];
        let mut all_weights = Vec::new();
        let dim = HIDDEN / HEADS;
        for layer in 0..LAYERS {
            let x = hidden[layer].clone();
            let name = |part: &str| format!("encoder.layer.{layer}.{part}");
            let [q, k, v] =
                ["query", "key", "value"].map(|p| self.map(&name(&format!("attention.self.{p}")), &x));
            let (mut o, mut weights) = (vec![0.0; n * HIDDEN], Vec::new());
            for (h, i) in (0..HEADS * n).map(|row| (row / n, row % n)) {
                let of = |m: &[f64], row: usize| m[row * HIDDEN + h * dim..][..dim].to_vec();
                let score = |j: usize| of(&q, i).iter().zip(of(&k, j)).map(|(a, b)| a * b).sum::<f64>();
                let row: Vec<f64> = (0..n).map(|j| (score(j) / (dim as f64).sqrt()).exp()).collect();
                let sum: f64 = row.iter().sum();
                for (j, weight) in row.iter().enumerate() {
                    weights.push(weight / sum);
                    for (d, x) in of(&v, j).into_iter().enumerate() {
                        o[i * HIDDEN + h * dim + d] += weight / sum * x;
                    }
                }
            }
            let sum = |a: Vec<f64>, b: &[f64]| a.iter().zip(b).map(|(a, b)| a + b).collect::<Vec<_>>();
            let attended = self.map(&name("attention.output.dense"), &o);
            let x = self.norm(&name("attention.output"), sum(attended, &x));
            let between = self.map(&name("intermediate.dense"), &x);
            let between: Vec<f64> =
                between.iter().map(|x| x * 0.5 * (1.0 + libm::erf(x / 2f64.sqrt()))).collect();
            let out = self.map(&name("output.dense"), &between);
            hidden.push(self.norm(&name("output"), sum(out, &x)));
            all_weights.push(weights);
        }
        (hidden, all_weights)
    }
}

fn weights() -> Tensors {
    // Name, shape, spread, and what it spreads around.
    let mut list: Vec<(String, Vec<usize>, f32, f32)> = Vec::new();
    let norm = |name: &str| {
        [("weight", 1.0), ("bias", 0.0)]
            .map(|(part, around)| (format!("{name}.LayerNorm.{part}"), vec![HIDDEN], 0.3, around))
    };
    for (name, rows) in [("word", WORDS.len()), ("position", POSITIONS), ("token_type", 2)] {
        list.push((format!("embeddings.{name}_embeddings.weight"), vec![rows, HIDDEN], 1.0, 0.0));
    }
    list.extend(norm("embeddings"));
    for layer in 0..LAYERS {
        let name = |part: &str| format!("encoder.layer.{layer}.{part}");
        for (part, outputs, inputs) in [
            ("attention.self.query", HIDDEN, HIDDEN),
            ("attention.self.key", HIDDEN, HIDDEN),
            ("attention.self.value", HIDDEN, HIDDEN),
            ("attention.output.dense", HIDDEN, HIDDEN),
            ("intermediate.dense", BETWEEN, HIDDEN),
            ("output.dense", HIDDEN, BETWEEN),
        ] {
            list.push((name(&format!("{part}.weight")), vec![outputs, inputs], 0.6, 0.0));
            list.push((name(&format!("{part}.bias")), vec![outputs], 0.3, 0.0));
        }
        list.extend(norm(&name("attention.output")));
        list.extend(norm(&name("output")));
    }
    let mut all = tensors([]);
    for (seed, (name, shape, spread, around)) in list.into_iter().enumerate() {
        let values = noise(seed as u64, shape.iter().product());
        let values: Vec<f32> = values.into_iter().map(|x| around + spread * x).collect();
        all.insert(name, Stored::f32(&shape, &values));
    }
    all
}
