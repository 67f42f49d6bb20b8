//! `bench`: every path over a table of shapes, each result held to the oracle.

pub(crate) mod measure;
mod plot;
mod report;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use wgpu_attention::{Attention, AttentionProblem, Dtype, Path};

use crate::backend::{self, AdapterArgs, Backend};
use crate::cache;
use crate::check::Judge;
use crate::failure::{Failure, Result};
use crate::options::{DtypeArg, SyntheticArgs};
use crate::output::{self, OutputFile};
use crate::shapes::Shape;
use measure::{Runner, Samples};
use report::Row;

/// A sentence encoder's batch, three squares, grouped heads, and one token against a cache.
const SHAPES: [&str; 6] =
    ["8x12x128x32", "1x8x512x64", "1x8x1024x64", "1x8x2048x64", "1x32/8x512x128", "1x32/8x1/4096x128"];
/// That of `--decode`.
const DECODE_SHAPE: &str = "1x32/8x1/4096x128";
/// Without `--repeat`: this often, unless the time is up before.
const ROUNDS: usize = 7;
const TIME_PER_SHAPE: Duration = Duration::from_secs(6);

/// Time the paths against each other and hold each to the oracle.
///
/// The paths take turns within each round, so that load on the machine meets all alike. Operands
/// are made up and stay where they are; a time is from the first encoded command to the end of the
/// work. `first` is the first run, which counts for nothing else: it compiles what no run before has
/// compiled (drivers keep that on disk: MESA_SHADER_CACHE_DISABLE=true forgets it). GFLOP/s count
/// 2 B Hq Sq Sk (D + Dv), half of it where causal. `max error` is that of o against the f64 oracle (on a
/// sample of the rows where a problem is large).
#[derive(Args, Debug)]
pub(crate) struct BenchArgs {
    /// Shapes, BxHq[/Hkv]xSq[/Sk]xD[/Dv], separated by commas
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    shapes: Vec<Shape>,
    /// A step of decoding: one query a head against a cache (--cache, --kv-dtype). Gigabytes a second of the
    /// keys and values that queries see, in the type that they are stored in, by the adapter's clock if it has
    /// one, and how that compares with a copy on the same adapter [default shape: 1x32/8x1/4096x128, default
    /// paths: cpu, fused]
    #[arg(long)]
    decode: bool,
    /// Element type of q, k and v (several: separated by commas)
    #[arg(long, value_enum, value_delimiter = ',', value_name = "LIST", default_value = "f32")]
    dtype: Vec<DtypeArg>,
    /// Paths, separated by commas: cpu, oracle, fused, decode (fused, the keys in splits), staged
    /// (fused:row, fused:tile, staged:tile, ... force a kernel) [default: cpu,fused,staged]
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    path: Vec<Backend>,
    /// Kernels of the fused path to set against each other, as --path fused:NAME,..., with sizes if they
    /// are to be forced (row:rows=2:keys=1)
    #[arg(long, value_delimiter = ',', value_name = "LIST", value_parser = parse_kernel)]
    kernel: Vec<Backend>,
    #[command(flatten)]
    adapter: AdapterArgs,
    /// Timed rounds [default: 7, or fewer when a shape takes longer than 6 seconds]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    repeat: Option<u32>,
    /// Write the rows as CSV
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Write the rows as a JSON array
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a chart
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// No progress bar
    #[arg(long)]
    quiet: bool,
    #[command(flatten)]
    synthetic: SyntheticArgs,
}

fn parse_kernel(name: &str) -> std::result::Result<Backend, String> {
    Ok(Backend::Gpu(Path::Fused, Some(backend::tile(Path::Fused, name)?)))
}

/// Measures, prints and writes.
pub(crate) fn run(args: &BenchArgs) -> Result<()> {
    if let Some(plot) = &args.plot
        && plot.extension().is_some_and(|extension| !extension.eq_ignore_ascii_case("svg"))
    {
        let plot = plot.display();
        return Err(Failure::input(format!("--plot {plot}: a chart is SVG, its name has to end in .svg")));
    }
    let file = |path: &Option<PathBuf>| path.as_deref().map(OutputFile::new).transpose();
    let (csv, json, plot) = (file(&args.csv)?, file(&args.json)?, file(&args.plot)?);
    let files: Vec<_> = [&csv, &json, &plot].into_iter().flatten().collect();
    if let Some(twice) = files.iter().enumerate().find_map(|(at, file)| file.among(&files[..at])) {
        return Err(Failure::input(format!("{twice}: two results cannot be one file")));
    }
    let problems = problems(args)?;
    let asked = !(args.path.is_empty() && args.kernel.is_empty());
    let (backends, engine) = backends(args)?;

    let bar = progress(args.quiet, problems.len() * backends.len());
    let mut rows = Vec::new();
    let mut left_out = Vec::new();
    for problem in &problems {
        measure_one(args, problem, &backends, engine.as_ref(), &bar, &mut rows, &mut left_out)?;
    }
    bar.finish_and_clear();

    output::print(&report::table(&rows, args.decode));
    for line in &left_out {
        output::print(&format!("left out: {line}\n"));
    }
    if let Some(file) = csv {
        file.write(report::csv(&rows).as_bytes())?;
    }
    if let Some(file) = json {
        file.write(report::json(&rows)?.as_bytes())?;
    }
    if let Some(file) = plot {
        file.write(plot::draw(&rows).as_bytes())?;
    }
    match rows.iter().filter(|row| !row.within_budget()).count() {
        0 if asked && !left_out.is_empty() => {
            Err(Failure::input(format!("{} of the asked measurements left out", left_out.len())))
        }
        0 => Ok(()),
        n => Err(Failure::budget(format!("{n} of {} results are outside their error budget", rows.len()))),
    }
}

fn problems(args: &BenchArgs) -> Result<Vec<AttentionProblem>> {
    let shapes = if args.shapes.is_empty() {
        let shapes: &[&str] = if args.decode { &[DECODE_SHAPE] } else { &SHAPES };
        shapes.iter().map(|text| text.parse().map_err(Failure::input)).collect::<Result<Vec<Shape>>>()?
    } else {
        args.shapes.clone()
    };
    let mut problems = Vec::new();
    for &dtype in &args.dtype {
        for shape in &shapes {
            let problem = args.synthetic.problem(shape, Dtype::from(dtype))?;
            if problem.rows() == 0 {
                return Err(Failure::input(format!("{shape}: nothing to measure, it has no query")));
            }
            if args.decode && problem.seq_q != 1 {
                return Err(Failure::input(format!("{shape}: --decode is of one query a head")));
            }
            problems.push(problem);
        }
    }
    Ok(problems)
}

/// The paths to measure, and the adapter if one of them needs it.
fn backends(args: &BenchArgs) -> Result<(Vec<Backend>, Option<Attention>)> {
    let asked: Vec<_> = args.path.iter().chain(&args.kernel).copied().collect();
    if !asked.is_empty() {
        let needs_adapter = asked.iter().any(|backend| backend.plan_options().is_some());
        let engine = if needs_adapter { Some(backend::open(&args.adapter)?) } else { None };
        return Ok((asked, engine));
    }
    let engine = backend::open_if_any(&args.adapter)?;
    let mut backends = vec![Backend::Cpu];
    if engine.is_some() {
        let paths: &[Path] = if args.decode { &[Path::Fused] } else { &[Path::Fused, Path::Staged] };
        backends.extend(paths.iter().map(|&path| Backend::Gpu(path, None)));
    } else {
        output::print(&format!("no adapter: this is the CPU alone. For {}\n\n", backend::SOFTWARE_ADAPTER));
    }
    Ok((backends, engine))
}

fn progress(quiet: bool, steps: usize) -> ProgressBar {
    if quiet {
        return ProgressBar::hidden();
    }
    // On stderr, and only where that is a terminal.
    let bar = ProgressBar::new(steps as u64 * 100);
    if let Ok(style) = ProgressStyle::with_template("{bar:32} {percent:>3}%  {elapsed:>3}  {msg}") {
        bar.set_style(style);
    }
    bar
}

/// All paths on one problem, taking turns.
fn measure_one(
    args: &BenchArgs,
    problem: &AttentionProblem,
    backends: &[Backend],
    engine: Option<&Attention>,
    bar: &ProgressBar,
    rows: &mut Vec<Row>,
    left_out: &mut Vec<String>,
) -> Result<()> {
    let shape = Shape::of(problem);
    let start_at = bar.position();
    bar.set_message(format!("{shape} oracle"));
    let bytes = problem.operands().map(|of| problem.extent(of) * problem.element_bytes(of) as u128).sum();
    crate::memory::allows(&shape.to_string(), bytes)?;
    let data = args.synthetic.data(problem);
    let inputs = data.inputs();
    let judge = Judge::new(problem, &inputs)?;

    let started = Instant::now();
    let mut runners = Vec::new();
    for &backend in backends {
        bar.set_message(format!("{shape} {backend}, first run"));
        let made = Runner::new(backend, engine, problem, &data).and_then(|mut runner| {
            let first = runner.iterate(problem, &inputs)?;
            Ok((runner, first))
        });
        match made {
            Ok((runner, first)) => runners.push((backend, runner, Samples { first, rounds: Vec::new() })),
            Err(failure) => left_out.push(format!("{shape} {backend}: {}", failure.line())),
        }
    }

    let rounds = args.repeat.map_or(ROUNDS, |n| n as usize);
    for round in 0..rounds {
        if args.repeat.is_none() && round > 0 && started.elapsed() > TIME_PER_SHAPE {
            break;
        }
        for (backend, runner, samples) in &mut runners {
            bar.set_message(format!("{shape} {backend}, round {} of {rounds}", round + 1));
            samples.rounds.push(runner.iterate(problem, &inputs)?);
        }
        bar.set_position(start_at + (100 * backends.len() * (round + 1) / rounds) as u64);
    }
    bar.set_position(start_at + 100 * backends.len() as u64);

    let first = rows.len();
    let kv_bytes = cache::bytes_seen(problem, &inputs);
    for (backend, runner, samples) in &runners {
        let output = runner.output(problem)?;
        let error = judge.error(problem, output.as_ref());
        rows.push(Row::new(
            *backend,
            runner,
            problem,
            args.synthetic.describe(problem),
            kv_bytes,
            samples,
            [error, judge.budget],
        ));
    }
    if let (true, Some(engine)) = (args.decode, engine) {
        let copy = measure::copy_gb_s(engine, kv_bytes)?;
        for (row, (_, runner, _)) in rows[first..].iter_mut().zip(&runners) {
            if matches!(runner, Runner::Device(_)) {
                row.set_copy(copy);
            }
        }
    }
    report::set_speed_ups(&mut rows[first..]);
    Ok(())
}
