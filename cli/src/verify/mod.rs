//! `verify`: random problems on every kernel, held to the oracle. What a user runs to trust a
//! driver.

mod gradients;
mod kept;
mod random;
mod tally;

use std::time::Instant;

use clap::Args;
use indicatif::ProgressBar;
use wgpu_attention::reference::{self, Reference};
use wgpu_attention::{Attention, AttentionProblem, Dtype, Error, Family, Inputs, Outputs, TensorRef, cpu};

use crate::backend::{self, AdapterArgs, Backend};
use crate::failure::{Failure, Result};
use crate::options;
use crate::output;
use crate::prng::Prng;
use crate::shapes::Shape;
use tally::Tally;

/// Random problems over every kernel, element type and option, each held to the f64 oracle. Every second one
/// has its keys in a cache (a ring, pages) or a ragged batch. Without --path, the gradients of those that have
/// any, too.
///
/// Exit code 1 when a result is further from the oracle than the contract allows, 2 when no problem was one
/// that the paths serve. The same seed gives the same problems everywhere.
#[derive(Args, Debug)]
pub(crate) struct VerifyArgs {
    /// How many problems
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    cases: u32,
    /// Begin no problem after so many seconds
    #[arg(long, value_name = "S")]
    seconds: Option<u64>,
    /// Which problems
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    /// Only that one of the problems
    #[arg(long, value_name = "CASE")]
    only: Option<u32>,
    /// Paths, separated by commas: cpu, staged, staged:tile, staged:direct [default: cpu and every
    /// kernel family of the adapter]
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    path: Vec<Backend>,
    #[command(flatten)]
    adapter: AdapterArgs,
    /// No progress bar
    #[arg(long)]
    quiet: bool,
}

/// Runs the sweep and prints the table.
pub(crate) fn run(args: &VerifyArgs) -> Result<()> {
    let backends = if args.path.is_empty() {
        let families = Family::ALL.iter().map(|&family| Backend::Gpu(family.path(), Some(family.into())));
        [Backend::Cpu].into_iter().chain(families).collect()
    } else {
        args.path.clone()
    };
    let needs_adapter = backends.iter().any(|backend| backend.plan_options().is_some());
    let engine = match needs_adapter.then(|| backend::open(&args.adapter)).transpose() {
        Ok(engine) => engine,
        Err(failure) => {
            return Err(Failure::input(format!("{}; --path cpu checks the CPU alone", failure.line())));
        }
    };
    let on = engine.as_ref().map_or_else(backend::cpu_name, |engine| engine.caps().adapter.clone());
    output::print(&format!("{on}, seed {}\n\n", args.seed));

    let cases = match args.only {
        Some(case) => case..case.saturating_add(1),
        None => 0..args.cases,
    };
    let bar = if args.quiet { ProgressBar::hidden() } else { ProgressBar::new(cases.len() as u64) };
    let (mut tally, mut last_unfit) = (Tally::default(), None);
    let start = Instant::now();
    for case in cases {
        if args.seconds.is_some_and(|seconds| start.elapsed().as_secs() >= seconds) {
            break;
        }
        // Each case has a generator of its own: one case alone is the same case.
        let mut prng = Prng::new(args.seed ^ u64::from(case).wrapping_mul(0xd6e8_feb8_6659_fd93));
        let (problem, data) = random::case(&mut prng, Dtype::FLOATS[case as usize % 3]);
        let inputs = data.inputs();
        let truth = Truth::new(&problem, &inputs)?;
        let what = format!("{} {} {}", Shape::of(&problem), problem.dtype, options::describe(&problem));
        tally.seen(&problem);
        for &backend in &backends {
            match attempt(backend, engine.as_ref(), &problem, &inputs) {
                Ok((kernels, outputs)) => {
                    let worst = truth.judge(&problem, &kernels, &outputs);
                    tally.result(&kernels, problem.dtype, worst.ratio());
                    if worst.ratio() > 1.0 {
                        tally.fault(format!("case {case}, {backend}, {what}: {worst}"));
                    }
                }
                Err(Attempt::Unfit(why)) => {
                    tally.unfit(&backend.to_string(), problem.dtype);
                    last_unfit = Some(why);
                }
                Err(Attempt::Failed(error)) => {
                    tally.result(&[backend.to_string()], problem.dtype, f64::INFINITY);
                    tally.fault(format!("case {case}, {backend}, {what}: {error}"));
                }
            }
        }
        let backward = gradients::of(&problem).filter(|_| args.path.is_empty());
        if let Some((engine, backward)) = engine.as_ref().zip(backward) {
            let what = format!("case {case}, {what}");
            gradients::check(engine, &backward, &inputs, &mut prng, &mut tally, &what)?;
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    output::print(&tally.report());
    match tally.faults() {
        0 if tally.results() == 0 => {
            let why = last_unfit.unwrap_or_else(|| "there was no time for a problem".into());
            Err(Failure::input(format!("nothing was compared: {why}")))
        }
        0 => Ok(()),
        n => Err(Failure::budget(format!(
            "{n} results are outside their budget; one again: verify --seed {} --only CASE",
            args.seed
        ))),
    }
}

enum Attempt {
    /// The kernel family says that it does not serve this problem, and why.
    Unfit(String),
    Failed(Error),
}

impl From<Error> for Attempt {
    fn from(error: Error) -> Self {
        if matches!(error, Error::KernelUnfit { .. }) {
            Self::Unfit(error.to_string())
        } else {
            Self::Failed(error)
        }
    }
}

/// Results and the names of the kernels that made them.
fn attempt(
    backend: Backend,
    engine: Option<&Attention>,
    problem: &AttentionProblem,
    inputs: &Inputs<'_>,
) -> std::result::Result<(Vec<String>, Outputs), Attempt> {
    match (backend, backend.plan_options().zip(engine)) {
        (_, Some((options, engine))) => {
            let plan = engine.plan_with(problem, &options)?;
            let kernels = plan.kernels().iter().map(ToString::to_string).collect();
            Ok((kernels, engine.run_plan_blocking(&plan, inputs)?))
        }
        (Backend::Oracle, _) => {
            let outputs =
                backend::oracle(problem, inputs).map_err(|failure| Attempt::Unfit(failure.line()))?;
            Ok((vec!["oracle".into()], outputs))
        }
        _ => Ok((vec!["cpu".into()], cpu::attention(problem, inputs)?)),
    }
}

/// What the oracle says, and how far off a path may be.
struct Truth {
    reference: Reference,
    o_budget: f64,
}

/// The output that is worst in terms of its budget.
#[derive(Clone, Copy, Debug)]
struct Worst {
    output: &'static str,
    error: f64,
    budget: f64,
}

impl Worst {
    fn ratio(&self) -> f64 {
        match self.error {
            0.0 => 0.0,
            error => error / self.budget,
        }
    }
}

impl std::fmt::Display for Worst {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "error {:.2e} of {}, the budget is {:.2e}", self.error, self.output, self.budget)
    }
}

impl Truth {
    fn new(problem: &AttentionProblem, inputs: &Inputs<'_>) -> Result<Self> {
        let reference = reference::oracle(problem, inputs)?;
        let naive = match problem.dtype {
            Dtype::F32 => 0.0,
            _ => reference::max_error(reference::naive(problem, inputs)?.o, &reference.o),
        };
        Ok(Self { o_budget: reference::tolerance(problem, &reference, naive), reference })
    }

    fn judge(&self, problem: &AttentionProblem, kernels: &[String], outputs: &Outputs) -> Worst {
        let r = &self.reference;
        let widened = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let o = widened(&outputs.o_contiguous(problem));
        let mut all = vec![Worst {
            output: "o",
            error: reference::max_error(o, &r.o) + gaps(problem, outputs.o.as_ref()),
            budget: self.o_budget,
        }];
        // The contract speaks of o alone. lse and weights are always f32: a few roundings of the
        // largest score, and of the logarithm itself.
        let rounding = 64.0 * 2f64.powi(-24);
        // Matrix units take a key's codes as f16.
        let halves =
            !problem.stored_kv().is_float() && kernels.iter().any(|name| name == "fused_tile_matrix");
        let of_keys = if halves { 2f64.powi(-11) * r.max_score } else { 0.0 };
        let largest_lse = r.lse.iter().filter(|x| x.is_finite()).fold(1.0, |m: f64, x| m.max(x.abs()));
        if let Some(lse) = &outputs.lse {
            let budget = rounding * r.max_score.max(largest_lse) + of_keys;
            all.push(Worst { output: "lse", error: reference::max_error(widened(lse), &r.lse), budget });
        }
        if let (Some(got), Some(want)) = (&outputs.weights, &r.weights) {
            let budget = rounding * r.max_score.max(1.0) + of_keys;
            all.push(Worst { output: "weights", error: reference::max_error(widened(got), want), budget });
        }
        all.into_iter().max_by(|a, b| a.ratio().total_cmp(&b.ratio())).unwrap_or(Worst {
            output: "nothing",
            error: 0.0,
            budget: 0.0,
        })
    }
}

/// Infinite when something was written between the elements of o.
fn gaps(problem: &AttentionProblem, o: TensorRef<'_>) -> f64 {
    let mut written = vec![true; o.len()];
    random::each_index(&problem.o, problem.shape(wgpu_attention::Operand::O), |at| written[at] = false);
    let touched = written.iter().enumerate().any(|(at, &gap)| gap && o.get(at).to_bits() != 0);
    if touched { f64::INFINITY } else { 0.0 }
}
