//! `heatmap`: the attention weights of every head as one picture.

mod colour;
mod draw;

use std::path::{Path, PathBuf};

use clap::Args;
use wgpu_attention::{AttentionProblem, Operand};

use crate::archive::Archive;
use crate::backend::{self, AdapterArgs, Choice};
use crate::failure::{Failure, Result};
use crate::load::{self, LayoutArg};
use crate::memory;
use crate::options::{self, ContractArgs};
use crate::output::OutputFile;

/// More heads than this make no picture that anyone can read.
const MAX_HEADS: usize = 144;
/// Weights over all batch entries and heads: what the oracle computes in about a minute.
const MAX_WEIGHTS: u128 = 1 << 26;
/// A file of words for one sequence is small.
const MAX_TOKENS_FILE: u64 = 64 << 20;

/// A picture of the attention weights, one panel for each head.
///
/// Rows are queries, columns are keys, all heads share one colour scale. Sequences too long for a
/// cell each are shown by the largest weight of each block. The picture is the same on every
/// machine, since the weights come from the f64 oracle unless --path says otherwise.
#[derive(Args, Debug)]
pub(crate) struct HeatmapArgs {
    /// The inputs, as for `run`
    #[arg(value_name = "IN.safetensors")]
    input: PathBuf,
    /// Where the picture goes
    #[arg(short, long, value_name = "OUT.svg")]
    output: PathBuf,
    /// Labels of the keys: one on each line, or all on one line between spaces. The queries are the
    /// last of them
    #[arg(long, value_name = "FILE")]
    tokens: Option<PathBuf>,
    /// Which batch entry
    #[arg(long, value_name = "N", default_value_t = 0)]
    batch: usize,
    /// Words above the picture
    #[arg(long, value_name = "TEXT", default_value = "Attention weights")]
    title: String,
    /// Order of the dimensions of q, k and v
    #[arg(long, value_enum, default_value = "bhsd")]
    layout: LayoutArg,
    /// oracle, cpu, staged or auto
    #[arg(long, value_name = "PATH", default_value = "oracle")]
    path: Choice,
    #[command(flatten)]
    adapter: AdapterArgs,
    /// Say nothing when all went well
    #[arg(long)]
    quiet: bool,
    #[command(flatten)]
    contract: ContractArgs,
}

/// Weights of one batch entry, and what the picture says about them.
pub(crate) struct Picture<'a> {
    /// `[heads, queries, keys]`.
    pub(crate) weights: &'a [f32],
    pub(crate) heads: usize,
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) title: &'a str,
    pub(crate) subtitle: String,
    pub(crate) query_labels: Option<Vec<String>>,
    pub(crate) key_labels: Option<Vec<String>>,
}

/// Computes the weights and draws them.
pub(crate) fn run(args: &HeatmapArgs) -> Result<()> {
    let output = OutputFile::new(&args.output)?;
    let mut archive = Archive::open(&args.input)?;
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
    if heads > MAX_HEADS {
        return Err(archive.fail(format!("{heads} heads, a picture shows {MAX_HEADS} at most")));
    }
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
    let count = |n: usize, one: &str, many: &str| format!("{n} {}", if n == 1 { one } else { many });
    let picture = Picture {
        weights: &weights,
        heads,
        queries,
        keys,
        title: &args.title,
        subtitle: format!(
            "{}; rows: {}; columns: {}{options}",
            count(heads, "head", "heads"),
            count(queries, "query", "queries"),
            count(keys, "key", "keys"),
        ),
        query_labels,
        key_labels,
    };
    output.write(draw::draw(&picture).as_bytes())?;
    if !args.quiet {
        eprintln!("{}: weights by {}", args.output.display(), computed.by);
    }
    Ok(())
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
