//! A model's folder: `config.json`, `tokenizer.json`, `model.safetensors`. Nothing in it is believed before it
//! is checked.

use std::path::{Path, PathBuf};

use safetensors::{Dtype as Stored, SafeTensors};
use serde::Deserialize;
use tokenizers::Tokenizer;
use wgpu_attention::{Dtype, HostWeights, Naming, Tensor};

use super::host::{Embeddings, Norm};
use super::{Result, attention_layer};

/// What `config.json` says of a BERT.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Config {
    pub(crate) vocab_size: usize,
    pub(crate) hidden_size: usize,
    pub(crate) num_hidden_layers: usize,
    pub(crate) num_attention_heads: usize,
    pub(crate) intermediate_size: usize,
    pub(crate) max_position_embeddings: usize,
    pub(crate) type_vocab_size: usize,
    pub(crate) layer_norm_eps: f64,
    hidden_act: String,
    #[serde(default)]
    position_embedding_type: Option<String>,
    #[serde(default)]
    is_decoder: bool,
}

impl Config {
    /// Width of a head.
    pub(crate) fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    fn parse(text: &[u8]) -> Result<Self> {
        let json: serde_json::Value = serde_json::from_slice(text).map_err(|e| e.to_string())?;
        // Another architecture lacks these fields or means something else by them.
        match json.get("model_type").and_then(|kind| kind.as_str()) {
            Some("bert") => {}
            Some(other) => return Err(format!("model_type is '{other}', only 'bert' is known")),
            None => return Err("no model_type, only 'bert' is known".into()),
        }
        let config: Self = serde_json::from_value(json).map_err(|e| e.to_string())?;
        for (what, got, need) in [
            ("hidden_act", Some(config.hidden_act.as_str()), "gelu"),
            ("position_embedding_type", config.position_embedding_type.as_deref(), "absolute"),
        ] {
            if got.is_some_and(|got| got != need) {
                return Err(format!("{what} is '{}', only '{need}' is known", got.unwrap_or_default()));
            }
        }
        if config.is_decoder {
            return Err("is_decoder is true, only encoders are known".into());
        }
        for (what, size) in [
            ("hidden_size", config.hidden_size),
            ("num_hidden_layers", config.num_hidden_layers),
            ("num_attention_heads", config.num_attention_heads),
            ("intermediate_size", config.intermediate_size),
        ] {
            if size == 0 {
                return Err(format!("{what} is 0"));
            }
        }
        let (hidden, heads) = (config.hidden_size, config.num_attention_heads);
        if !hidden.is_multiple_of(heads) {
            return Err(format!("hidden_size {hidden} is no multiple of num_attention_heads {heads}"));
        }
        if !(config.layer_norm_eps >= 0.0 && config.layer_norm_eps.is_finite()) {
            return Err(format!("layer_norm_eps is {}", config.layer_norm_eps));
        }
        Ok(config)
    }
}

/// A text as the model takes it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tokens {
    pub(crate) ids: Vec<u32>,
    /// Which of two texts a token belongs to; there is only one.
    pub(crate) kinds: Vec<u32>,
    pub(crate) words: Vec<String>,
}

/// A matrix and its bias.
pub(crate) type Map = (Vec<f32>, Vec<f32>);

/// A layer's weights.
pub(crate) struct LayerWeights {
    pub(crate) attention: HostWeights,
    pub(crate) norm_attention: Norm,
    pub(crate) up: Map,
    pub(crate) down: Map,
    pub(crate) norm_output: Norm,
}

/// A model on the host.
pub(crate) struct Checkpoint {
    pub(crate) config: Config,
    pub(crate) embeddings: Embeddings,
    pub(crate) layers: Vec<LayerWeights>,
    tokenizer: Tokenizer,
    folder: PathBuf,
}

impl Checkpoint {
    /// Reads a folder.
    pub(crate) fn read(folder: &Path) -> Result<Self> {
        if !folder.is_dir() {
            return Err(format!("{}: is not a folder", folder.display()));
        }
        let at = |name: &str| folder.join(name);
        let about = |name: &str, why: String| format!("{}: {why}", at(name).display());
        let read = |name: &str| {
            let path = at(name);
            // Before it is opened: opening a pipe that nobody writes to would wait for ever.
            match std::fs::metadata(&path) {
                Ok(meta) if !meta.is_file() => Err("is not a file".to_string()),
                _ => std::fs::read(&path).map_err(|error| error.to_string()),
            }
            .map_err(|why| about(name, why))
        };
        const CONFIG: &str = "config.json";
        const TOKENIZER: &str = "tokenizer.json";
        const WEIGHTS: &str = "model.safetensors";

        let config = Config::parse(&read(CONFIG)?).map_err(|why| about(CONFIG, why))?;
        let mut tokenizer =
            Tokenizer::from_bytes(read(TOKENIZER)?).map_err(|error| about(TOKENIZER, error.to_string()))?;
        // A text is taken whole or refused: neither cut nor filled up.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|error| about(TOKENIZER, error.to_string()))?;
        let bytes = read(WEIGHTS)?;
        let (embeddings, layers) = weights(&config, &bytes).map_err(|why| about(WEIGHTS, why))?;
        Ok(Self { config, embeddings, layers, tokenizer, folder: folder.to_path_buf() })
    }

    /// A text as tokens, with the special ones around it.
    pub(crate) fn tokens(&self, text: &str) -> Result<Tokens> {
        let encoded = self.tokenizer.encode(text, true).map_err(|error| format!("tokenizer: {error}"))?;
        let tokens = Tokens {
            ids: encoded.get_ids().to_vec(),
            kinds: encoded.get_type_ids().to_vec(),
            words: encoded.get_tokens().to_vec(),
        };
        let shown: String = text.chars().take(40).collect();
        if encoded.get_special_tokens_mask().iter().all(|&special| special == 1) {
            return Err(format!("the text {shown:?} is empty: it has no token of its own"));
        }
        let (got, most) = (tokens.ids.len(), self.config.max_position_embeddings);
        if got > most {
            return Err(format!(
                "the text {shown:?} ... has {got} tokens, the model takes {most} (max_position_embeddings)"
            ));
        }
        for (what, ids, size) in [
            ("vocab_size", &tokens.ids, self.config.vocab_size),
            ("type_vocab_size", &tokens.kinds, self.config.type_vocab_size),
        ] {
            if let Some(id) = ids.iter().find(|&&id| id as usize >= size) {
                let folder = self.folder.display();
                return Err(format!("{folder}: the tokenizer gives {id} where {what} is {size}"));
            }
        }
        Ok(tokens)
    }

    /// Fails where the folder says that sentences are anything but the mean of their tokens.
    pub(crate) fn pools_by_mean(&self) -> Result<()> {
        let path = self.folder.join("1_Pooling").join("config.json");
        let Ok(text) = std::fs::read(&path) else { return Ok(()) };
        let json: serde_json::Value =
            serde_json::from_slice(&text).map_err(|error| format!("{}: {error}", path.display()))?;
        match json.get("pooling_mode_mean_tokens") {
            Some(serde_json::Value::Bool(true)) => Ok(()),
            _ => Err(format!("{}: only pooling_mode_mean_tokens is known", path.display())),
        }
    }
}

fn weights(config: &Config, bytes: &[u8]) -> Result<(Embeddings, Vec<LayerWeights>)> {
    let tensors =
        SafeTensors::deserialize(bytes).map_err(|error| format!("not a safetensors file: {error}"))?;
    let (hidden, between) = (config.hidden_size, config.intermediate_size);
    let naming = Naming::of(&tensors).map_err(|error| error.to_string())?;
    if naming != Naming::Bert {
        return Err("its tensors are not named as BERT's are".into());
    }
    let norm = |name: String| -> Result<Norm> {
        // Files that began as TensorFlow's have its words for the two.
        let old = find(&tensors, &format!("{name}.LayerNorm.gamma")).is_some();
        let [gain, bias] = if old { ["gamma", "beta"] } else { ["weight", "bias"] };
        let part = |part: &str| read(&tensors, &format!("{name}.LayerNorm.{part}"), &[hidden]);
        Ok(Norm { gain: part(gain)?, bias: part(bias)?, eps: config.layer_norm_eps })
    };
    let map = |name: String, outputs: usize, inputs: usize| -> Result<Map> {
        let w = read(&tensors, &format!("{name}.weight"), &[outputs, inputs])?;
        Ok((w, read(&tensors, &format!("{name}.bias"), &[outputs])?))
    };
    let table =
        |name: &str, rows: usize| read(&tensors, &format!("embeddings.{name}.weight"), &[rows, hidden]);
    let embeddings = Embeddings {
        words: table("word_embeddings", config.vocab_size)?,
        positions: table("position_embeddings", config.max_position_embeddings)?,
        kinds: table("token_type_embeddings", config.type_vocab_size)?,
        norm: norm("embeddings".into())?,
    };
    let shape = attention_layer(config, 1, 1, 1);
    let layer = |number: usize| {
        let name = format!("encoder.layer.{number}");
        Ok(LayerWeights {
            attention: HostWeights::from_safetensors(&tensors, naming, number, &shape)
                .map_err(|error| error.to_string())?,
            norm_attention: norm(format!("{name}.attention.output"))?,
            up: map(format!("{name}.intermediate.dense"), between, hidden)?,
            down: map(format!("{name}.output.dense"), hidden, between)?,
            norm_output: norm(format!("{name}.output"))?,
        })
    };
    let layers = (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?;
    Ok((embeddings, layers))
}

/// A tensor, with or without the model's own name before it.
fn find<'a>(tensors: &SafeTensors<'a>, name: &str) -> Option<safetensors::tensor::TensorView<'a>> {
    ["", "bert."].iter().find_map(|prefix| tensors.tensor(&format!("{prefix}{name}")).ok())
}

/// The same as f32.
fn read(tensors: &SafeTensors<'_>, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
    let Some(view) = find(tensors, name) else { return Err(format!("{name}: it is not there")) };
    if view.shape() != shape {
        return Err(format!("{name}: its shape is {:?}, config.json asks for {shape:?}", view.shape()));
    }
    let dtype = match view.dtype() {
        Stored::F32 => Dtype::F32,
        Stored::F16 => Dtype::F16,
        Stored::BF16 => Dtype::Bf16,
        other => return Err(format!("{name}: its element type is {other:?}, not F32, F16 or BF16")),
    };
    Ok(match Tensor::from_bytes(dtype, view.data()) {
        Tensor::F32(x) => x,
        narrow => narrow.to_f32(),
    })
}
