//! Weights of a model on a text.

use std::path::Path;

use wgpu_attention::{AttentionProblem, Inputs};

use super::{HeatmapArgs, MAX_WEIGHTS, Picture, Which, of_heads};
use crate::bert::{self, Bert, Checkpoint};
use crate::failure::{Failure, Result};
use crate::options::describe;
use crate::{backend, memory};

/// Those of the layers asked for.
pub(super) fn picture(args: &HeatmapArgs, folder: &Path, as_page: bool) -> Result<Picture> {
    let contract = args.contract.apply(AttentionProblem::new(1, 1, 1, 1, 1, 1, 1));
    if args.contract.similarity.is_some() || describe(&contract) != "plain" {
        return Err(Failure::input("--model: its attention has no option, only inputs in a file have"));
    }
    let bytes = std::fs::metadata(folder.join("model.safetensors")).map_or(0, |meta| meta.len());
    // As read, as f32, and on an adapter that may share this memory.
    memory::allows("the model", 3 * u128::from(bytes))?;
    let checkpoint = Checkpoint::read(folder).map_err(Failure::input)?;
    let tokens = checkpoint.tokens(args.text.as_deref().unwrap_or_default()).map_err(Failure::input)?;
    let config = checkpoint.config.clone();
    let (heads, dim, n) = (config.num_attention_heads, config.head_dim(), tokens.ids.len());
    let all = config.num_hidden_layers;
    let layers = match args.layer {
        Some(Which::All) if !as_page && all > 1 => {
            return Err(Failure::input("--layer all: a picture has room for one, a page (OUT.html) for all"));
        }
        None if !as_page => vec![0],
        which => which.unwrap_or(Which::All).of("layer", all)?,
    };
    let shown = args.head.of("head", heads)?;
    let weights = (layers.len() * heads) as u128 * (n * n) as u128;
    if weights > MAX_WEIGHTS {
        let why = format!("{weights} weights, a picture is made of {MAX_WEIGHTS} at most");
        return Err(Failure::input(why));
    }

    let model = Bert::new(checkpoint, backend::open(&args.adapter)?).map_err(Failure::input)?;
    // What enters the last layer shown.
    let last = layers.iter().copied().max().unwrap_or(0);
    let hidden = model.hidden(std::slice::from_ref(&tokens), last).map_err(Failure::input)?;
    let rows = bert::rows_of_heads(n, heads, dim);
    let problem = AttentionProblem {
        q: rows,
        k: rows,
        v: rows,
        o: rows,
        weights: true,
        ..AttentionProblem::new(1, heads, heads, n, n, dim, dim)
    };
    let mut by = String::new();
    let mut of_layers = Vec::new();
    for &layer in &layers {
        let [q, k] = model.queries_and_keys(layer, &hidden[layer]).map_err(Failure::input)?;
        // The weights do not depend on v.
        let inputs = Inputs::new(&q[..], &k[..], &k[..]);
        let computed = backend::compute(args.path, &args.adapter, &problem, &inputs)?;
        of_layers.push(of_heads(&computed.outputs.weights.unwrap_or_default(), &shown, n * n));
        by = format!("{}, queries and keys by {}", computed.by, model.adapter());
    }
    let counts = Picture::counts(&shown, n, n);
    Ok(Picture {
        subtitle: match layers[..] {
            [layer] => format!("layer {layer}, {counts}"),
            _ => format!("{} layers, {counts}", layers.len()),
        },
        weights: of_layers,
        layers,
        heads: shown,
        queries: n,
        keys: n,
        title: args.title.clone(),
        query_labels: Some(tokens.words.clone()),
        key_labels: Some(tokens.words),
        by,
    })
}
