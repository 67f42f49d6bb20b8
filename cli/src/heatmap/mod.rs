//! `heatmap`: the attention weights of every head as one picture, or as a page to point at.

mod colour;
mod draw;
mod file;
mod model;
mod page;

use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;

use crate::backend::{AdapterArgs, Choice};
use crate::failure::{Failure, Result};
use crate::load::LayoutArg;
use crate::options::ContractArgs;
use crate::output::{self, OutputFile};
use crate::png;

/// More heads than this make no picture that anyone can read.
const MAX_HEADS: usize = 144;
/// Weights over all batch entries and heads: what the oracle computes in about a minute.
const MAX_WEIGHTS: u128 = 1 << 26;

/// A picture of the attention weights, one panel for each head.
///
/// Rows are queries, columns are keys, all heads share one colour scale. Sequences too long for a
/// cell each are shown by the largest weight of each block. The picture of a file is the same on
/// every machine, since the weights come from the f64 oracle unless --path says otherwise.
///
/// With --model the weights are those of a BERT on a text of yours: DIR holds config.json,
/// tokenizer.json and model.safetensors. OUT.html is one page that shows what each token attends to,
/// layer by layer and head by head, and needs nothing else.
///
/// OUT.png is OUT.svg in pixels, at twice its size. Its letters are the program's own; scripts beyond
/// Latin, Greek and Cyrillic need a font on the machine.
#[derive(Args, Debug)]
pub(crate) struct HeatmapArgs {
    /// The inputs, as for `run`
    #[arg(value_name = "IN.safetensors", required_unless_present = "model")]
    input: Option<PathBuf>,
    /// The folder of a model, instead of inputs
    #[arg(long, value_name = "DIR", conflicts_with = "input", requires = "text")]
    model: Option<PathBuf>,
    /// What the model reads
    #[arg(long, value_name = "TEXT", requires = "model", conflicts_with = "input")]
    text: Option<String>,
    /// Which layer of the model, from 0; all of them for OUT.html [default: 0, all for OUT.html]
    #[arg(long, value_name = "N|all", requires = "model", conflicts_with = "input")]
    layer: Option<Which>,
    /// Which head, from 0
    #[arg(long, value_name = "N|all", default_value = "all")]
    head: Which,
    /// Where the picture goes; how its name ends says as what
    #[arg(short, long, value_name = "OUT.svg|OUT.png|OUT.html")]
    output: PathBuf,
    /// Labels of the keys: one on each line, or all on one line between spaces. The queries are the
    /// last of them
    #[arg(long, value_name = "FILE", conflicts_with = "model")]
    tokens: Option<PathBuf>,
    /// Which batch entry
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "model")]
    batch: usize,
    /// Words above the picture
    #[arg(long, value_name = "TEXT", default_value = "Attention weights")]
    title: String,
    /// Order of the dimensions of q, k and v
    #[arg(long, value_enum, default_value = "bhsd", conflicts_with = "model")]
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

/// One of several, or all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    All,
    Only(usize),
}

impl FromStr for Which {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "all" => Ok(Self::All),
            _ => text.parse().map(Self::Only).map_err(|_| "want a number from 0, or all".into()),
        }
    }
}

impl Which {
    /// Those that are meant, of so many.
    fn of(self, what: &str, count: usize) -> Result<Vec<usize>> {
        match self {
            Self::All if count > MAX_HEADS => {
                Err(Failure::input(format!("{count} {what}s, a picture shows {MAX_HEADS} at most")))
            }
            Self::All => Ok((0..count).collect()),
            Self::Only(number) if number < count => Ok(vec![number]),
            Self::Only(number) => {
                Err(Failure::input(format!("--{what} {number}: there are {count}, from 0")))
            }
        }
    }
}

/// Weights, and what the picture says about them.
#[derive(Debug)]
pub(crate) struct Picture {
    /// Of each layer shown, `[heads, queries, keys]`.
    pub(crate) weights: Vec<Vec<f32>>,
    /// The layers' numbers; none where nothing is known of layers.
    pub(crate) layers: Vec<usize>,
    /// The heads' numbers.
    pub(crate) heads: Vec<usize>,
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) title: String,
    pub(crate) subtitle: String,
    pub(crate) query_labels: Option<Vec<String>>,
    pub(crate) key_labels: Option<Vec<String>>,
    /// What computed the weights.
    pub(crate) by: String,
}

impl Picture {
    /// The subtitle of so many heads, queries and keys.
    fn counts(heads: &[usize], queries: usize, keys: usize) -> String {
        let count = |n: usize, one: &str, many: &str| format!("{n} {}", if n == 1 { one } else { many });
        format!(
            "{}; rows: {}; columns: {}",
            count(heads.len(), "head", "heads"),
            count(queries, "query", "queries"),
            count(keys, "key", "keys"),
        )
    }
}

/// What a file's name asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Svg,
    Png,
    Page,
}

impl Form {
    fn of(output: &Path) -> Result<Self> {
        let end = output.extension().map(|end| end.to_string_lossy().to_lowercase());
        match end.as_deref() {
            Some("svg") => Ok(Self::Svg),
            Some("png") => Ok(Self::Png),
            Some("html" | "htm") => Ok(Self::Page),
            _ => Err(Failure::input("want a name that ends in .svg, .png or .html").about(output.display())),
        }
    }
}

/// Computes the weights and draws them.
pub(crate) fn run(args: &HeatmapArgs) -> Result<()> {
    let output = OutputFile::new(&args.output)?;
    let form = Form::of(&args.output)?;
    let mut picture = match (&args.input, &args.model) {
        (Some(input), _) => file::picture(args, input)?,
        (None, Some(folder)) => model::picture(args, folder, form == Form::Page)?,
        (None, None) => return Err(Failure::input("want IN.safetensors or --model DIR")),
    };
    let no_numbers = picture.weights.iter().flatten().filter(|weight| weight.is_nan()).count();
    if no_numbers > 0 {
        picture.subtitle += &format!(", {no_numbers} weights are NaN");
    }
    let bytes = match form {
        Form::Svg => draw::draw(&picture).into_bytes(),
        Form::Png => png::png(&draw::draw(&picture))?,
        Form::Page => page::page(&picture)?.into_bytes(),
    };
    output.write(&bytes)?;
    if !args.quiet {
        output::note(&format!("{}: weights by {}", args.output.display(), picture.by));
    }
    Ok(())
}

/// The same weights, of these heads alone.
fn of_heads(weights: &[f32], heads: &[usize], pairs: usize) -> Vec<f32> {
    heads.iter().flat_map(|&head| &weights[head * pairs..][..pairs]).copied().collect()
}
