//! Sentence embeddings of all-MiniLM-L6-v2, or another BERT of its kind, with attention and matrices on the GPU:
//! `cargo run --release --example sentence_embedding -- DIR "text" ["text" ...]`, where DIR holds `config.json`,
//! `tokenizer.json` and `model.safetensors`. The README says where to get one.
//!
//! Several texts are one ragged batch: no padding, no mask. For the sentence of the fixture the result is held
//! to what was computed in f64.

#[path = "../cli/src/bert/mod.rs"]
#[allow(dead_code, reason = "the program uses the rest")]
mod bert;

use std::path::Path;
use std::process::ExitCode;

use bert::{Bert, Checkpoint};
use wgpu_attention::{Attention, DeviceRequest};

/// The sentence whose embedding `tests/fixtures` has: 384 numbers in f64, behind the header of numpy's format.
const SENTENCE: &str = "The quick brown fox jumps over the lazy dog while attention weights are computed on a \
                        graphics card.";
const EXPECTED: &[u8] = include_bytes!("../tests/fixtures/minilm/embedding.npy");
const ALLOWED: f64 = 1e-5;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let result = match args.split_first() {
        Some((folder, texts)) if !texts.is_empty() => run(Path::new(folder), texts),
        _ => Err("want DIR \"text\" [\"text\" ...]".into()),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("error: {why}");
            ExitCode::from(2)
        }
    }
}

/// Whether what could be compared was right.
fn run(folder: &Path, texts: &[String]) -> bert::Result<bool> {
    let checkpoint = Checkpoint::read(folder)?;
    checkpoint.pools_by_mean()?;
    let tokens = texts.iter().map(|text| checkpoint.tokens(text)).collect::<Result<Vec<_>, _>>()?;
    let width = checkpoint.config.hidden_size;

    let request = DeviceRequest::default();
    let attention = pollster::block_on(Attention::request(&request)).map_err(|error| error.to_string())?;
    let model = Bert::new(checkpoint, attention)?;
    println!("on {}", model.adapter());
    let all = model.hidden(&tokens, model.layers())?;
    let last = &all[all.len() - 1];
    let embeddings: Vec<Vec<f32>> = bert::ranges(&tokens)
        .into_iter()
        .map(|of| bert::host::mean_of_rows(&last[of.start * width..of.end * width], width))
        .collect();

    let mut right = true;
    for ((text, tokens), embedding) in texts.iter().zip(&tokens).zip(&embeddings) {
        println!("\n{text}\n  {} tokens: {}", tokens.words.len(), tokens.words.join(" "));
        let first: Vec<String> = embedding.iter().take(6).map(|x| format!("{x:.5}")).collect();
        println!("  {width} numbers: {} ...", first.join(" "));
        if text == SENTENCE && width == 384 {
            let error = error(embedding);
            println!(
                "  largest error against all-MiniLM-L6-v2 in f64: {error:.1e}, of {ALLOWED:.0e} allowed"
            );
            // A NaN is no small error.
            right &= error <= ALLOWED;
        }
    }
    if embeddings.len() > 1 {
        println!("\ncosine similarities");
        for (i, a) in embeddings.iter().enumerate() {
            let row = embeddings.iter().map(|b| format!("{:6.3}", dot(a, b)));
            println!("  {}  {}", row.collect::<Vec<_>>().join(" "), texts[i]);
        }
    }
    Ok(right)
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

fn error(embedding: &[f32]) -> f64 {
    let data = &EXPECTED[EXPECTED.len() - 8 * embedding.len()..];
    let want = data.as_chunks::<8>().0.iter().map(|&bytes| f64::from_le_bytes(bytes));
    wgpu_attention::reference::max_error(embedding.iter().map(|&x| f64::from(x)), &want.collect::<Vec<_>>())
}
