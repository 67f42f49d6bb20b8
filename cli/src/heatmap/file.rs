//! Weights of the inputs in a file.

use std::path::Path;

use wgpu_attention::{AttentionProblem, Operand};

use super::{HeatmapArgs, MAX_WEIGHTS, Picture, of_heads};
use crate::archive::Archive;
use crate::failure::{Failure, Result};
use crate::{backend, load, memory, options};

/// A file of words for one sequence is small.
const MAX_TOKENS_FILE: u64 = 64 << 20;

/// Those of one batch entry.
pub(super) fn picture(args: &HeatmapArgs, input: &Path) -> Result<Picture> {
    let mut archive = Archive::open(input)?;
    let loaded = load::load(&mut archive, &args.contract, args.layout, None, None)?;
    let problem = AttentionProblem { weights: true, ..loaded.problem };
    let [batch, heads, longest_q, longest_k] = problem.shape(Operand::Weights);
    if args.batch >= batch {
        return Err(Failure::input(format!("--batch {}: the file has {batch} batch entries", args.batch)));
    }
    // Those of the entry alone, where entries have numbers of their own.
    let own = |list: &Option<Vec<u32>>, longest: usize| match list {
        Some(list) => (list[args.batch + 1] - list[args.batch]) as usize,
        None => longest,
    };
    let queries = own(&loaded.data.cu_seqlens_q, longest_q);
    let keys = own(&loaded.data.cu_seqlens_k, longest_k);
    if queries == 0 || keys == 0 {
        return Err(archive.fail(format!("no weights to show: {queries} queries and {keys} keys")));
    }
    let shown = args.head.of("head", heads).map_err(|failure| archive.about(failure))?;
    let weights = problem.extent(Operand::Weights);
    if weights > MAX_WEIGHTS {
        return Err(archive.fail(format!("{weights} weights, a picture is made of {MAX_WEIGHTS} at most")));
    }
    let (query_labels, key_labels) = match &args.tokens {
        Some(file) => {
            let tokens = read_tokens(file)?;
            labels(&tokens, queries, keys).map_err(|failure| failure.about(file.display()))?
        }
        None => (None, None),
    };
    memory::allows("the weights in f64", weights.saturating_mul(16))?;
    let computed = backend::compute(args.path, &args.adapter, &problem, &loaded.data.inputs())?;
    let all = computed.outputs.weights.unwrap_or_default();
    let of_entry = &all[args.batch * heads * longest_q * longest_k..];
    let rows = (0..heads).flat_map(|h| (0..queries).map(move |i| (h * longest_q + i) * longest_k));
    let weights: Vec<f32> = rows.flat_map(|row| &of_entry[row..row + keys]).copied().collect();
    let options = match options::describe(&problem).as_str() {
        "plain" => String::new(),
        options => format!(", {options}"),
    };
    Ok(Picture {
        weights: vec![of_heads(&weights, &shown, queries * keys)],
        layers: Vec::new(),
        subtitle: Picture::counts(&shown, queries, keys) + &options,
        heads: shown,
        queries,
        keys,
        title: args.title.clone(),
        query_labels,
        key_labels,
        by: computed.by + &load::unused(&archive),
    })
}

fn read_tokens(path: &Path) -> Result<Vec<String>> {
    let fail = |why: &dyn std::fmt::Display| Failure::input(why).about(path.display());
    let meta = std::fs::metadata(path).map_err(|error| fail(&error))?;
    if !meta.is_file() || meta.len() > MAX_TOKENS_FILE {
        return Err(fail(&"is not a small text file"));
    }
    let text = std::fs::read_to_string(path).map_err(|error| fail(&error))?;
    let text = text.trim_end_matches(['\r', '\n']);
    Ok(if text.contains('\n') {
        text.lines().map(|line| line.trim().to_string()).collect()
    } else {
        text.split_whitespace().map(String::from).collect()
    })
}

type Labels = (Option<Vec<String>>, Option<Vec<String>>);

/// Labels of queries and keys. With fewer queries than keys, the queries are the last tokens, as
/// in a model that decodes with a cache.
fn labels(tokens: &[String], queries: usize, keys: usize) -> Result<Labels> {
    if tokens.len() != keys {
        return Err(Failure::input(format!("need {keys} tokens, one for each key, got {}", tokens.len())));
    }
    let of_queries = (queries <= keys).then(|| tokens[keys - queries..].to_vec());
    Ok((of_queries, Some(tokens.to_vec())))
}
