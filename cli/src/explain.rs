//! `explain`: what the planner would do, and why.

use clap::Args;
use wgpu_attention::{Caps, Dtype, Path, Plan, PlanOptions, Tile};

use crate::backend::{self, AdapterArgs};
use crate::failure::Result;
use crate::options::{DtypeArg, SyntheticArgs};
use crate::output;
use crate::shapes::Shape;

/// The plan for a shape: kernels, tiles, dispatches, memory, and why this and not that.
#[derive(Args, Debug)]
pub(crate) struct ExplainArgs {
    /// BxHq[/Hkv]xSq[/Sk]xD[/Dv], for instance 1x8x2048x64
    shape: Shape,
    /// Element type of q, k and v
    #[arg(long, value_enum, default_value = "f32")]
    dtype: DtypeArg,
    /// Plan for that path (staged, fused)
    #[arg(long, value_name = "PATH", value_parser = parse_path)]
    path: Option<Path>,
    /// Plan with that kernel family (staged:tile, fused:tile, ...), and sizes of it (fused:row:rows=2)
    #[arg(long, value_name = "NAME")]
    family: Option<Tile>,
    /// Bytes that scratch may take
    #[arg(long, value_name = "BYTES")]
    scratch_budget: Option<u64>,
    /// Also give lse
    #[arg(long)]
    lse: bool,
    /// Also give the weights
    #[arg(long)]
    weights: bool,
    /// Also print the composed shaders
    #[arg(long)]
    wgsl: bool,
    #[command(flatten)]
    adapter: AdapterArgs,
    /// Plan for a device with default limits and no optional feature
    #[arg(long, conflicts_with = "adapter")]
    minimal: bool,
    #[command(flatten)]
    synthetic: SyntheticArgs,
}

fn parse_path(text: &str) -> Result<Path, String> {
    text.parse().map_err(|_| "there are: staged, fused".into())
}

/// Plans and prints, for the adapter that the other commands would open: what it offers has been tried then.
pub(crate) fn run(args: &ExplainArgs) -> Result<()> {
    let mut problem = args.synthetic.problem(&args.shape, Dtype::from(args.dtype))?;
    (problem.lse, problem.weights) = (args.lse, args.weights);
    problem.validate()?;
    let caps = if args.minimal { Caps::minimal() } else { caps(&args.adapter)? };
    let tuning = args.adapter.tuning()?;
    let (path, tile, scratch_budget) = (args.path, args.family, args.scratch_budget);
    let options = PlanOptions { path, tile, scratch_budget, tuning, ..PlanOptions::default() };
    let plan = Plan::new(&problem, &caps, &options)?;
    let mut text = format!("{}\n", plan.to_string().trim_end());
    if args.wgsl {
        for shader in plan.shaders() {
            let bindings: Vec<String> = shader.bindings.iter().map(u32::to_string).collect();
            text += &format!(
                "\n// ---- {}: {} workgroup bytes, bindings {} ----\n{}\n",
                shader.name,
                shader.workgroup_bytes,
                bindings.join(" "),
                shader.wgsl.trim_end()
            );
        }
    }
    output::print(&text);
    Ok(())
}

fn caps(adapter: &AdapterArgs) -> Result<Caps> {
    // The tuning table is the plan's business.
    let adapter = AdapterArgs { adapter: adapter.adapter.clone(), tuning: None };
    Ok(match backend::open_if_any(&adapter)? {
        Some(engine) => engine.caps().clone(),
        None => {
            output::note("no adapter: the plan is for a device with default limits and no optional feature");
            Caps::minimal()
        }
    })
}
