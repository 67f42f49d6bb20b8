//! Which of the library's paths computes, and running a problem through it.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use wgpu_attention::reference::{self, Reference};
use wgpu_attention::{
    Attention, AttentionProblem, DeviceRequest, Error, Family, Inputs, Operand, Options, Outputs, Path,
    PlanOptions, Tensor, Tile, Tuning, cpu,
};

use crate::failure::{Failure, Result};
use crate::memory;

/// What to do about a machine without an adapter.
pub(crate) const SOFTWARE_ADAPTER: &str = "a software one: `scripts/adapters setup lavapipe`, then \
     `scripts/adapters run lavapipe -- cargo run --release -- ARGS`, or `apt-get install mesa-vulkan-drivers`";

/// A way to compute attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backend {
    /// The f64 oracle.
    Oracle,
    /// The fast CPU path.
    Cpu,
    /// A path on the adapter, with a kernel family (`staged:tile`) and sizes of it (`fused:row:rows=2`)
    /// if they are forced.
    Gpu(Path, Option<Tile>),
    /// The fused path with its keys in splits, however many rows there are.
    Decode(Option<Tile>),
}

/// Splits of the keys on the path `decode`.
const DECODE_SPLITS: usize = 16;

impl Backend {
    /// How the planner is told; `None` where the host computes.
    pub(crate) fn plan_options(self) -> Option<PlanOptions> {
        let (path, tile, splits) = match self {
            Self::Oracle | Self::Cpu => return None,
            Self::Gpu(path, tile) => (path, tile, None),
            Self::Decode(tile) => (Path::Fused, tile, Some(DECODE_SPLITS)),
        };
        Some(PlanOptions { path: Some(path), tile, splits, ..PlanOptions::default() })
    }
}

impl FromStr for Backend {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (path, named) = match text.split_once(':') {
            Some((path, named)) => (path, Some(named)),
            None => (text, None),
        };
        match (path, named) {
            ("oracle", None) => return Ok(Self::Oracle),
            ("cpu", None) => return Ok(Self::Cpu),
            ("decode", _) => return Ok(Self::Decode(named.map(|name| tile(Path::Fused, name)).transpose()?)),
            _ => {}
        }
        let path: Path = path
            .parse()
            .map_err(|_| format!("no path '{path}'; there are cpu, oracle, staged, fused, decode"))?;
        Ok(Self::Gpu(path, named.map(|name| tile(path, name)).transpose()?))
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Oracle => f.write_str("oracle"),
            Self::Cpu => f.write_str("cpu"),
            Self::Gpu(path, None) => write!(f, "{path}"),
            Self::Gpu(_, Some(tile)) => write!(f, "{tile}"),
            Self::Decode(None) => f.write_str("decode"),
            Self::Decode(Some(tile)) => f.write_str(&tile.to_string().replacen("fused", "decode", 1)),
        }
    }
}

/// A path, or the choice of one by what the machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// The adapter if there is one, else the CPU.
    Auto,
    /// That one.
    Only(Backend),
}

impl Choice {
    /// The same with a kernel forced; `auto` means the fused path then.
    pub(crate) fn with_kernel(self, name: &str) -> Result<Self> {
        let own = |path| tile(path, name).map(Some).map_err(Failure::input);
        let path = match self {
            Self::Auto => Path::Fused,
            Self::Only(Backend::Gpu(path, None)) => path,
            Self::Only(Backend::Decode(None)) => return Ok(Self::Only(Backend::Decode(own(Path::Fused)?))),
            Self::Only(other) => {
                return Err(Failure::input(format!(
                    "--kernel {name} forces a kernel of a GPU path, not of {other}"
                )));
            }
        };
        Ok(Self::Only(Backend::Gpu(path, own(path)?)))
    }
}

/// A kernel by its name among those of a path, and sizes: `tile:lanes=8`. Tables show it with its path before it.
pub(crate) fn tile(path: Path, text: &str) -> Result<Tile, String> {
    let text = text.strip_prefix(&format!("{path}:")).unwrap_or(text);
    let name = text.split(':').next().unwrap_or(text);
    if !Family::of(path).any(|family| family.name() == name) {
        let all: Vec<_> = Family::of(path).map(Family::name).collect();
        return Err(format!("no kernel '{name}' on the {path} path; there are {}", all.join(", ")));
    }
    format!("{path}:{text}").parse().map_err(|error: Error| error.to_string())
}

/// Reads a tuning table.
pub(crate) fn read_tuning(file: &std::path::Path) -> Result<Tuning> {
    let about = |error: String| Failure::input(error).about(file.display());
    let text = std::fs::read_to_string(file).map_err(|error| about(error.to_string()))?;
    text.parse().map_err(|error: Error| about(error.to_string()))
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" { Ok(Self::Auto) } else { text.parse().map(Self::Only) }
    }
}

/// Which adapter, and what is known of it.
#[derive(clap::Args, Clone, Debug, Default)]
pub(crate) struct AdapterArgs {
    /// A part of the adapter's name
    #[arg(long, value_name = "TEXT")]
    pub(crate) adapter: Option<String>,
    /// A table that `tune` has made: kernels and tiles that were fastest on the adapter
    #[arg(long, value_name = "FILE")]
    pub(crate) tuning: Option<std::path::PathBuf>,
}

impl AdapterArgs {
    /// The table, read.
    pub(crate) fn tuning(&self) -> Result<Option<Arc<Tuning>>> {
        Ok(self.tuning.as_deref().map(read_tuning).transpose()?.map(Arc::new))
    }
}

/// Opens an adapter by a part of its name, or the best one.
pub(crate) fn open(args: &AdapterArgs) -> Result<Attention> {
    let options = Options { tuning: args.tuning()?, ..Options::default() };
    let request = DeviceRequest { adapter: args.adapter.clone(), matrix: true, options };
    pollster::block_on(Attention::request(&request)).map_err(|error| match error {
        Error::NoAdapter { .. } => Failure::input(format!("{error}; {SOFTWARE_ADAPTER}")),
        error => error.into(),
    })
}

/// Like [`open`], where a machine without any adapter is no failure.
pub(crate) fn open_if_any(adapter: &AdapterArgs) -> Result<Option<Attention>> {
    if adapter.adapter.is_none() && pollster::block_on(wgpu_attention::adapters()).is_empty() {
        return Ok(None);
    }
    open(adapter).map(Some)
}

/// Results, and in words what computed them.
pub(crate) struct Computed {
    pub(crate) outputs: Outputs,
    pub(crate) by: String,
}

/// Computes a problem on the chosen path.
pub(crate) fn compute(
    choice: Choice,
    adapter: &AdapterArgs,
    problem: &AttentionProblem,
    inputs: &Inputs<'_>,
) -> Result<Computed> {
    inputs.check(problem)?;
    memory_allows(problem)?;
    if problem.rows() == 0 {
        // Nothing to compute, and sizes beside the zero may be astronomical.
        let outputs = Outputs {
            o: Tensor::zeros(problem.out_dtype, 0),
            lse: problem.lse.then(Vec::new),
            weights: problem.weights.then(Vec::new),
        };
        return Ok(Computed { outputs, by: "nothing to compute".into() });
    }
    match choice {
        Choice::Only(Backend::Oracle) => {
            Ok(Computed { outputs: oracle(problem, inputs)?, by: "the f64 oracle".into() })
        }
        Choice::Only(backend) => match backend.plan_options() {
            None => on_cpu(problem, inputs, ""),
            Some(options) => on_gpu(&open(adapter)?, &options, problem, inputs),
        },
        Choice::Auto => match open_if_any(adapter)? {
            None => on_cpu(problem, inputs, ", there is no adapter"),
            Some(engine) => match on_gpu(&engine, &PlanOptions::default(), problem, inputs) {
                Ok(computed) => Ok(computed),
                // A problem that is beyond the device is not beyond the machine.
                Err(failure) => on_cpu(problem, inputs, &format!(", the adapter: {}", failure.line())),
            },
        },
    }
}

fn on_cpu(problem: &AttentionProblem, inputs: &Inputs<'_>, why: &str) -> Result<Computed> {
    Ok(Computed { outputs: cpu::attention(problem, inputs)?, by: format!("the CPU{why}") })
}

fn on_gpu(
    engine: &Attention,
    options: &PlanOptions,
    problem: &AttentionProblem,
    inputs: &Inputs<'_>,
) -> Result<Computed> {
    let plan = engine.plan_with(problem, options)?;
    let outputs = engine.run_plan_blocking(&plan, inputs)?;
    let by = format!("{} ({}: {})", engine.caps().adapter, plan.path(), plan.kernels().join(", "));
    Ok(Computed { outputs, by })
}

/// The oracle's results in the problem's types and layout.
pub(crate) fn oracle(problem: &AttentionProblem, inputs: &Inputs<'_>) -> Result<Outputs> {
    let [entries, h, s, d] = problem.shape(Operand::O);
    let reference = oracle_rows(problem, inputs, std::slice::from_ref(&(0..entries * h * s)))?;
    let mut o = Tensor::zeros(problem.out_dtype, problem.extent(Operand::O) as usize);
    for (row, values) in reference.o.chunks_exact(d).enumerate() {
        let at = [row / s / h, row / s % h, row % s, 0];
        for (x, &value) in values.iter().enumerate() {
            o.set(problem.o.index([at[0], at[1], at[2], x]), value as f32);
        }
    }
    let narrow = |x: &[f64]| x.iter().map(|&x| x as f32).collect::<Vec<_>>();
    let weights = reference.weights.as_deref().map(narrow);
    Ok(Outputs {
        o,
        lse: problem.lse.then(|| narrow(&reference.lse)),
        weights: match (weights, inputs.cu_seqlens_q) {
            (Some(weights), Some(list)) => Some(padded(problem, &weights, list)),
            (weights, _) => weights,
        },
    })
}

/// Weights of ragged queries, `[heads, total, keys]`, with zeros behind those of each entry.
fn padded(p: &AttentionProblem, packed: &[f32], cu_seqlens_q: &[u32]) -> Vec<f32> {
    let mut all = vec![0.0; p.extent(Operand::Weights) as usize];
    let total = p.total_q.unwrap_or(0);
    for (b, pair) in cu_seqlens_q.windows(2).enumerate() {
        let (first, keys) = (pair[0] as usize, (pair[1] - pair[0]) as usize * p.seq_kv);
        for h in 0..p.heads_q {
            let to = (b * p.heads_q + h) * p.seq_q * p.seq_kv;
            all[to..][..keys].copy_from_slice(&packed[(h * total + first) * p.seq_kv..][..keys]);
        }
    }
    all
}

/// The oracle for several ranges of rows, one after the other in the result, on all cores.
pub(crate) fn oracle_rows(
    problem: &AttentionProblem,
    inputs: &Inputs<'_>,
    ranges: &[std::ops::Range<usize>],
) -> Result<Reference> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let rows: usize = ranges.iter().map(|range| range.len()).sum();
    // Small enough pieces that causal rows of unlike cost spread over the cores.
    let piece = rows.div_ceil(threads * 4).max(1);
    let pieces: Vec<_> = ranges
        .iter()
        .flat_map(|range| {
            let end = range.end;
            range.clone().step_by(piece).map(move |start| start..(start + piece).min(end))
        })
        .collect();
    let next = std::sync::atomic::AtomicUsize::new(0);
    let worker = || {
        let mut done = Vec::new();
        loop {
            let at = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let Some(range) = pieces.get(at) else { return Ok(done) };
            done.push((at, reference::oracle_rows(problem, inputs, range.clone())?));
        }
    };
    let results: Vec<wgpu_attention::Result<Vec<(usize, Reference)>>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.min(pieces.len())).map(|_| scope.spawn(worker)).collect();
        workers
            .into_iter()
            .map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    let mut parts = Vec::new();
    for result in results {
        parts.extend(result?);
    }
    parts.sort_unstable_by_key(|&(at, _)| at);
    let empty = || reference::oracle_rows(problem, inputs, 0..0);
    let mut all = empty()?;
    for (_, part) in parts {
        all.o.extend(part.o);
        all.lse.extend(part.lse);
        if let (Some(all), Some(part)) = (&mut all.weights, part.weights) {
            all.extend(part);
        }
        all.max_score = all.max_score.max(part.max_score);
    }
    Ok(all)
}

/// A small file can describe results that no machine holds.
fn memory_allows(problem: &AttentionProblem) -> Result<()> {
    let results: u128 = [Operand::O, Operand::Lse, Operand::Weights]
        .into_iter()
        .map(|operand| problem.extent(operand).saturating_mul(problem.element_bytes(operand) as u128))
        .sum();
    // As computed (in f64 by the oracle), as given back, and as written.
    memory::allows("the results", results.saturating_mul(4))
}

/// The processor's name, for tables.
pub(crate) fn cpu_name() -> String {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let model = std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("model name"))?;
        Some(line.split_once(':')?.1.trim().to_string())
    });
    format!("{}, {threads} threads", model.as_deref().unwrap_or("CPU"))
}
