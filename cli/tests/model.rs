//! Models of the BERT family: their forward pass, and pictures of what they attend to.

mod common;

#[path = "../src/bert/mod.rs"]
#[allow(dead_code, reason = "the program uses the rest")]
mod bert;

use bert::{Bert, Checkpoint};
use common::bert::{HIDDEN, LAYERS, TinyBert};
use common::*;
use wgpu_attention::{Attention, DeviceRequest};

/// Three texts of a ragged batch, one of them as long as the model takes.
const TEXTS: [&str; 3] = ["The cats sat on a mat", "cat", "a cat on the mat sat on the cats"];

fn has_adapter() -> bool {
    paths().contains(&"staged")
}

#[test]
fn hidden_states_are_those_of_f64() {
    let (folder, model) = (Folder::new(), TinyBert::new());
    let folder = std::path::PathBuf::from(model.write(&folder));
    // Without an adapter nothing is left to hold.
    if !has_adapter() {
        return;
    }
    let checkpoint = Checkpoint::read(&folder).unwrap();
    let tokens: Vec<_> = TEXTS.iter().map(|text| checkpoint.tokens(text).unwrap()).collect();
    assert_eq!(tokens[0].words, ["[CLS]", "the", "cat", "##s", "sat", "on", "a", "mat", "[SEP]"]);
    assert_eq!(tokens[2].ids.len(), 12, "neither cut nor filled up");
    let attention = pollster::block_on(Attention::request(&DeviceRequest::default())).unwrap();
    let got = Bert::new(checkpoint, attention).unwrap().hidden(&tokens).unwrap();
    assert_eq!(got.len(), LAYERS + 1);
    for (text, range) in tokens.iter().zip(bert::ranges(&tokens)) {
        let (want, _) = model.forward(&text.ids);
        for (layer, (got, want)) in got.iter().zip(&want).enumerate() {
            let got: Vec<f64> =
                got[range.start * HIDDEN..range.end * HIDDEN].iter().map(|&x| x.into()).collect();
            let error = distance(&got, want);
            assert!(error <= 1e-5, "{:?}, before layer {layer}: off by {error:e}", text.words);
        }
    }
}

#[test]
fn an_embedding_is_the_mean_of_tokens_of_length_one() {
    assert_eq!(bert::host::mean_of_rows(&[1.0, 2.0, 5.0, 6.0], 2), [0.6, 0.8]);
    assert_eq!(bert::host::mean_of_rows(&[0.0, 0.0], 2), [0.0, 0.0]);
}

/// Whatever is wrong with a folder, it is one line that names it.
#[test]
fn bad_models_are_refused_by_name() {
    let good = TinyBert::new();
    let refused = |model: &TinyBert, text: &str| {
        let folder = Folder::new();
        let path = std::path::PathBuf::from(model.write(&folder));
        match Checkpoint::read(&path) {
            Ok(checkpoint) => checkpoint.tokens(text).err().unwrap_or_default(),
            Err(why) => why,
        }
    };
    let says = |why: &str, words: &[&str]| {
        assert!(words.iter().all(|word| why.contains(word)) && !why.contains('\n'), "{words:?}: {why}");
    };
    assert_eq!(refused(&good, "cat"), "");
    says(&refused(&good, ""), &["empty"]);
    says(&refused(&good, " \n "), &["empty"]);
    says(&refused(&good, &"cat ".repeat(11)), &["13 tokens", "12", "max_position_embeddings"]);
    let config = |key: &str, value: serde_json::Value| {
        let mut model = good.clone();
        model.config[key] = value;
        model
    };
    says(&refused(&config("model_type", "llama".into()), "cat"), &["config.json", "llama", "bert"]);
    says(&refused(&config("model_type", 1.into()), "cat"), &["config.json", "model_type"]);
    says(&refused(&config("hidden_act", "relu".into()), "cat"), &["hidden_act", "relu", "gelu"]);
    says(&refused(&config("position_embedding_type", "relative_key".into()), "cat"), &["relative_key"]);
    says(&refused(&config("num_attention_heads", 5.into()), "cat"), &["24", "num_attention_heads 5"]);
    says(&refused(&config("num_attention_heads", 0.into()), "cat"), &["num_attention_heads is 0"]);
    says(&refused(&config("hidden_size", "wide".into()), "cat"), &["config.json", "wide"]);
    says(&refused(&config("num_hidden_layers", 3.into()), "cat"), &["encoder.layer.2", "not there"]);
    says(
        &refused(&config("vocab_size", 99.into()), "cat"),
        &["word_embeddings.weight", "[12, 24]", "[99, 24]"],
    );
    says(&refused(&config("intermediate_size", (1u64 << 60).into()), "cat"), &["intermediate.dense.weight"]);

    let tensor = |name: &str, tensor: Option<Stored>| {
        let mut model = good.clone();
        match tensor {
            Some(tensor) => model.tensors.insert(name.into(), tensor),
            None => model.tensors.remove(name),
        };
        model
    };
    let key = "encoder.layer.1.attention.self.key.weight";
    says(&refused(&tensor(key, None), "cat"), &[key, "not there"]);
    let short = Stored::f32(&[HIDDEN, 2], &[0.0; 2 * HIDDEN]);
    says(&refused(&tensor(key, Some(short)), "cat"), &[key, "[24, 2]", "[24, 24]"]);
    let norm = "encoder.layer.0.output.LayerNorm.bias";
    says(&refused(&tensor(norm, Some(Stored::i64(&[0; HIDDEN]))), "cat"), &[norm, "I64"]);
    says(&refused(&tensor(norm, Some(Stored::f16(&[1], &[0.0]))), "cat"), &[norm, "[1]", "[24]"]);
    let mut larger = good.clone();
    larger.tokenizer["model"]["vocab"]["dog"] = 12.into();
    says(&refused(&larger, "a dog"), &["12", "vocab_size"]);
    larger.tokenizer["model"]["type"] = "Unheard".into();
    says(&refused(&larger, "cat"), &["tokenizer.json"]);

    let folder = Folder::new();
    let path = std::path::PathBuf::from(good.write(&folder));
    folder.write("model.safetensors", b"\x05");
    says(&Checkpoint::read(&path).err().unwrap(), &["model.safetensors", "not a safetensors file"]);
    std::fs::remove_file(path.join("tokenizer.json")).unwrap();
    says(&Checkpoint::read(&path).err().unwrap(), &["tokenizer.json"]);
    says(&Checkpoint::read(&path.join("nowhere")).err().unwrap(), &["nowhere", "not a folder"]);
}

/// Checkpoints in half the bytes, and with the model's name before each tensor.
#[test]
fn checkpoints_differ_in_names_and_types() {
    let mut model = TinyBert::new();
    model.tensors = model
        .tensors
        .iter()
        .map(|(name, tensor)| {
            let values: Vec<f32> = tensor.values().into_iter().map(|x| x as f32).collect();
            (format!("bert.{name}"), Stored::bf16(&tensor.shape, &values))
        })
        .collect();
    let folder = Folder::new();
    let checkpoint = Checkpoint::read(std::path::Path::new(&model.write(&folder))).unwrap();
    assert_eq!(checkpoint.layers.len(), LAYERS);
    assert_eq!(
        f64::from(checkpoint.layers[1].up.0[7]),
        model.tensors["bert.encoder.layer.1.intermediate.dense.weight"].values()[7]
    );
}
