//! `adapters`: what there is, and what this crate can do on it.

use clap::Args;
use wgpu_attention::{AttentionProblem, Caps, Dtype, Error, Family, Plan, PlanOptions};

use crate::backend;
use crate::failure::{Failure, Result};
use crate::output;

/// Every adapter, and what this crate can do on it.
#[derive(Args, Debug)]
pub(crate) struct AdaptersArgs {
    /// Only adapters whose name has this part
    #[arg(long, value_name = "TEXT")]
    adapter: Option<String>,
}

/// Prints; no device is opened.
pub(crate) fn run(args: &AdaptersArgs) -> Result<()> {
    let wanted = args.adapter.as_deref().unwrap_or("").to_lowercase();
    let adapters = pollster::block_on(wgpu_attention::adapters());
    let mut text = String::new();
    for adapter in &adapters {
        let caps = Caps::of_adapter(adapter);
        if caps.adapter.to_lowercase().contains(&wanted) {
            if !text.is_empty() {
                text.push('\n');
            }
            text += &describe(&caps);
        }
    }
    if text.is_empty() {
        text = match adapters.len() {
            0 => format!("no adapter; the CPU paths work. For {}\n", backend::SOFTWARE_ADAPTER),
            n => return Err(Failure::input(format!("none of {n} adapters matches '{wanted}'"))),
        };
    }
    output::print(&text);
    Ok(())
}

fn describe(caps: &Caps) -> String {
    let yes = |x: bool| if x { "yes" } else { "no" };
    let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
    let [x, y, z] = caps.max_workgroup_size;
    let mut lines = vec![
        ("backend", format!("{:?}", caps.backend)),
        ("type", format!("{:?}", caps.device_type)),
        ("driver", if caps.driver.is_empty() { "-".into() } else { caps.driver.clone() }),
        ("f16", yes(caps.shader_f16).into()),
        (
            "matrices",
            caps.matrix.as_ref().map_or("no".into(), |m| format!("{e} x {e} of f16, f32 sums", e = m.edge)),
        ),
        ("subgroups", caps.subgroup.map_or("no".into(), |(min, max)| format!("{min} to {max}"))),
        ("timestamps", yes(caps.timestamps).into()),
        (
            "storage",
            format!("{} a binding, {} a buffer", mib(caps.max_storage_binding), mib(caps.max_buffer)),
        ),
        (
            "bindings",
            format!("{} storage buffers, offsets of {}", caps.max_storage_buffers, caps.storage_alignment),
        ),
        (
            "workgroup",
            format!(
                "{} KiB, {} invocations, {x} x {y} x {z}",
                caps.max_workgroup_bytes >> 10,
                caps.max_invocations
            ),
        ),
        ("dispatch", format!("{} workgroups a dimension", caps.max_dispatch)),
    ];
    for &family in Family::ALL {
        lines.push(("kernels", format!("{family}: {}", fits(caps, family))));
    }
    let missing = caps.missing();
    let missing = if missing.is_empty() { "nothing".into() } else { missing.join("; ") };
    lines.push(("lacks", missing));
    let mut text = format!("{}\n", caps.adapter);
    for (name, value) in lines {
        text += &format!("  {name:11} {value}\n");
    }
    text
}

/// For which element types the planner accepts a middling problem.
fn fits(caps: &Caps, family: Family) -> String {
    let options = PlanOptions { family: Some(family), ..PlanOptions::default() };
    let mut serves = Vec::new();
    let mut refuses = Vec::new();
    for dtype in Dtype::FLOATS {
        let problem = AttentionProblem::new(1, 8, 8, 1024, 1024, 64, 64).with_dtype(dtype);
        match Plan::new(&problem, caps, &options) {
            Ok(_) => serves.push(dtype.to_string()),
            Err(Error::KernelUnfit { why, .. }) => refuses.push(format!("not {dtype}: {why}")),
            Err(error) => refuses.push(format!("not {dtype}: {error}")),
        }
    }
    if !serves.is_empty() {
        refuses.insert(0, serves.join(", "));
    }
    refuses.join("; ")
}
