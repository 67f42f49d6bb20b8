//! `tune`: which kernel and tile are fastest on this adapter.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::ProgressBar;
use wgpu_attention::{Attention, AttentionProblem, Dtype, Family, PlanOptions, Tile, Tuning};

use crate::backend::{self, AdapterArgs, Backend};
use crate::bench::measure::Runner;
use crate::check::Judge;
use crate::data::Data;
use crate::failure::{Failure, Result};
use crate::options::DtypeArg;
use crate::output::{self, OutputFile};
use crate::prng::Prng;
use crate::shapes::Shape;

const SHAPES: [&str; 4] = ["1x8x512x64", "1x8x2048x64", "1x8x512x128", "1x8x2048x128"];
/// Candidates that are timed again, in turns, after each was timed once.
const FINALISTS: usize = 4;
const ROUNDS: usize = 9;
/// Samples of each finalist below which they are not compared.
const LEAST_SAMPLES: usize = 3;
/// Times of the fastest beyond which other sizes of a family are not looked at.
const HOPELESS: f64 = 3.0;
/// What a candidate has to gain before it takes the place of the planner's own choice: less is noise.
const LEAST_GAIN: f64 = 1.03;

/// Find the fastest kernel and tile for some shapes on this adapter, and note them in a table.
///
/// Every candidate that fits is run once, and the best few again in turns with the planner's own choice.
/// One that is at least 3 % faster goes into the table, which `--tuning FILE` reads (in code:
/// `Options::tuning`); it serves problems of the same type and widths, and of similar lengths. Wrong
/// results never do. What FILE holds for other adapters and shapes stays, and all of it where time was too short.
#[derive(Args, Debug)]
pub(crate) struct TuneArgs {
    /// The table, read first if it is there
    #[arg(short, long, value_name = "FILE", default_value = "wgpu-attention-tuning.tsv")]
    output: PathBuf,
    /// Shapes, BxHq[/Hkv]xSq[/Sk]xD[/Dv], separated by commas [default: 1x8 heads, 512 and 2048 tokens,
    /// widths 64 and 128]
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    shapes: Vec<Shape>,
    /// Element types, separated by commas
    #[arg(long, value_enum, value_delimiter = ',', value_name = "LIST", default_value = "f32,f16")]
    dtype: Vec<DtypeArg>,
    /// Most seconds that all of it takes, about
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// A part of the adapter's name
    #[arg(long, value_name = "TEXT")]
    adapter: Option<String>,
    /// No progress bar
    #[arg(long)]
    quiet: bool,
}

/// One candidate and its times in milliseconds.
struct Entrant<'a> {
    tile: Tile,
    runner: Runner<'a>,
    ms: Vec<f64>,
}

impl Entrant<'_> {
    fn time(&mut self, problem: &AttentionProblem, data: &Data) -> Result<()> {
        let sample = self.runner.iterate(problem, &data.inputs())?;
        self.ms.push(sample.gpu_ms.unwrap_or(sample.ms));
        Ok(())
    }

    fn median(&self) -> f64 {
        let mut ms = self.ms.clone();
        ms.sort_unstable_by(f64::total_cmp);
        ms.get(ms.len() / 2).copied().unwrap_or(f64::INFINITY)
    }
}

/// Times, prints and writes.
pub(crate) fn run(args: &TuneArgs) -> Result<()> {
    let file = OutputFile::new(&args.output)?;
    let mut tuning =
        if args.output.exists() { backend::read_tuning(&args.output)? } else { Tuning::default() };
    let shapes = match args.shapes.is_empty() {
        true => SHAPES.iter().map(|text| text.parse().map_err(Failure::input)).collect::<Result<_>>()?,
        false => args.shapes.clone(),
    };
    let problem = |shape: &Shape, dtype: &DtypeArg| shape.problem().with_dtype(Dtype::from(*dtype));
    let problems: Vec<_> =
        args.dtype.iter().flat_map(|dtype| shapes.iter().map(move |shape| problem(shape, dtype))).collect();
    if let Some(none) = problems.iter().find(|problem| problem.rows() == 0) {
        return Err(Failure::input(format!("{}: nothing to measure, it has no query", Shape::of(none))));
    }
    let engine = backend::open(&AdapterArgs { adapter: args.adapter.clone(), tuning: None })?;
    output::print(&format!("{} ({})\n", engine.caps().adapter, engine.caps().driver));

    let started = Instant::now();
    let all = Duration::from_secs(args.seconds.into());
    let bar = if args.quiet { ProgressBar::hidden() } else { ProgressBar::new_spinner() };
    // One that the device cannot serve is found before others take their time.
    for problem in &problems {
        let what = || Shape::of(problem);
        engine.plan_with(problem, &PlanOptions::default()).map_err(|e| Failure::from(e).about(what()))?;
    }
    for (number, problem) in problems.iter().enumerate() {
        // What one leaves of its time is for the rest.
        let left = all.saturating_sub(started.elapsed()) / (problems.len() - number) as u32;
        tune_one(&engine, problem, left, &bar, &mut tuning)?;
        // What was found stays, whatever comes of the next.
        file.write(tuning.to_string().as_bytes())?;
    }
    bar.finish_and_clear();
    output::print(&format!("{} entries in {}\n", tuning.len(), args.output.display()));
    Ok(())
}

fn tune_one(
    engine: &Attention,
    problem: &AttentionProblem,
    time: Duration,
    bar: &ProgressBar,
    tuning: &mut Tuning,
) -> Result<()> {
    let started = Instant::now();
    let what = format!("{} {}", Shape::of(problem), problem.dtype);
    let bytes = problem.operands().map(|of| problem.extent(of) * problem.element_bytes(of) as u128).sum();
    crate::memory::allows(&what, bytes)?;
    let data = Data::random(problem, &mut Prng::new(1));
    let judge = Judge::new(problem, &data.inputs())?;

    let own = engine.plan_with(problem, &PlanOptions::default())?.tile();
    // The planner's own first: it is what all others are measured by.
    let others = Tile::candidates(problem, engine.caps());
    let others = others.into_iter().filter(|&tile| {
        let plan = engine.plan_with(problem, &PlanOptions { tile: Some(tile), ..PlanOptions::default() });
        plan.is_ok_and(|plan| plan.tile() != own)
    });
    // Then each family as the planner sizes it, and then the sizes of the families that did best.
    let (whole, sized): (Vec<_>, Vec<_>) = others.partition(|&tile| tile == Tile::of(tile.family));
    let mut left: Vec<Tile> = std::iter::once(own).chain(whole).collect();
    let (count, mut sized) = (left.len() + sized.len(), Some(sized));
    left.reverse();
    let (mut timed, mut cut) = (0, false);
    let mut families: Vec<(Family, f64)> = Vec::new();
    let mut entrants: Vec<Entrant<'_>> = Vec::new();
    loop {
        if left.is_empty()
            && let Some(mut sized) = sized.take()
        {
            let time = |tile: &Tile| {
                families.iter().find(|(of, _)| *of == tile.family).map_or(f64::INFINITY, |(_, ms)| *ms)
            };
            let best = families.iter().map(|(_, ms)| *ms).fold(f64::INFINITY, f64::min);
            sized.retain(|tile| time(tile) < HOPELESS * best);
            sized.sort_by(|a, b| time(b).total_cmp(&time(a)));
            left = sized;
        }
        let Some(tile) = left.pop() else { break };
        // Half of the time for a first look; the planner's own is always looked at.
        if !entrants.is_empty() && started.elapsed() > time / 2 {
            cut = true;
            break;
        }
        bar.set_message(format!("{what}: {tile}"));
        bar.tick();
        let runner = Runner::new(Backend::Gpu(tile.family.path(), Some(tile)), Some(engine), problem, &data);
        let mut entrant = Entrant { tile, runner: runner.map_err(|f| f.about(tile))?, ms: Vec::new() };
        // The first run compiles.
        entrant.time(problem, &data)?;
        entrant.ms.clear();
        timed += 1;
        entrant.time(problem, &data)?;
        let error = judge.error(problem, entrant.runner.output(problem)?.as_ref());
        if error > judge.budget || error.is_nan() {
            output::print(&format!(
                "{what}: {tile} is wrong by {error:.1e}, the budget is {:.1e}\n",
                judge.budget
            ));
            if tile == own {
                return Err(Failure::budget(format!("{what}: the planner's own choice is wrong")));
            }
            continue;
        }
        families.push((tile.family, entrant.median()));
        entrants.push(entrant);
        // Buffers of those that cannot win are given back.
        let (first, rest) = entrants.split_at_mut(1);
        rest.sort_by(|a, b| a.median().total_cmp(&b.median()));
        debug_assert_eq!(first[0].tile, own);
        entrants.truncate(FINALISTS + 1);
    }
    for _ in 0..ROUNDS {
        if started.elapsed() > time {
            break;
        }
        for entrant in &mut entrants {
            bar.set_message(format!("{what}: {} again", entrant.tile));
            bar.tick();
            entrant.time(problem, &data)?;
        }
    }
    report(
        &what,
        &entrants,
        &format!("{timed} of {count} candidates timed{}", if cut { ", then the time was up" } else { "" }),
    );
    // A sample or two of each decide nothing, and no other candidate for want of time: what the table holds stays.
    if cut && entrants.len() < 2 || entrants.iter().any(|entrant| entrant.ms.len() < LEAST_SAMPLES) {
        output::print(
            "  too few samples for an entry: the table stays as it is (--seconds gives more time)\n",
        );
        return Ok(());
    }
    let base = entrants[0].median();
    let best = entrants.iter().min_by(|a, b| a.median().total_cmp(&b.median()));
    tuning.remove(problem, engine.caps());
    if let Some(best) = best.filter(|best| best.median() * LEAST_GAIN <= base) {
        tuning.set(problem, engine.caps(), best.tile);
    }
    Ok(())
}

fn report(what: &str, entrants: &[Entrant<'_>], how_many: &str) {
    let base = entrants[0].median();
    let mut text = format!("\n{what}: {how_many}\n");
    for (at, entrant) in entrants.iter().enumerate() {
        let ms = entrant.median();
        let note = if at == 0 { ", the planner's own choice" } else { "" };
        text += &format!(
            "  {ms:9.3} ms  {:5.2} x  {}{note} ({} times)\n",
            base / ms,
            entrant.tile,
            entrant.ms.len()
        );
    }
    output::print(&text);
}
