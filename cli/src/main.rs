//! `wgpu-attention`: benchmark, run, verify and picture attention on any wgpu adapter.
// The docs of arguments are the terminal's help, where brackets hold shapes.
#![allow(rustdoc::broken_intra_doc_links)]

mod adapters;
mod archive;
mod backend;
mod bench;
// The example and the tests use the rest.
#[allow(dead_code)]
mod bert;
mod cache;
mod check;
mod data;
mod explain;
mod failure;
mod heatmap;
mod load;
mod memory;
mod options;
mod output;
mod png;
mod prng;
mod run;
mod shapes;
mod svg;
mod tune;
mod verify;

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};

use failure::{Failure, Result};

/// Attention as WGSL compute shaders, held to an f64 oracle.
///
/// Exit code 0: done; 1: a result is outside its error budget; 2: bad input, or a machine that
/// cannot do what was asked.
#[derive(Parser, Debug)]
#[command(name = "wgpu-attention", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Bench(bench::BenchArgs),
    Run(run::RunArgs),
    Verify(verify::VerifyArgs),
    Adapters(adapters::AdaptersArgs),
    Explain(explain::ExplainArgs),
    Heatmap(heatmap::HeatmapArgs),
    Tune(tune::TuneArgs),
}

fn main() -> ExitCode {
    // Drivers and wgpu log much that is no failure; RUST_LOG brings it back.
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("off")).init();
    let result = match Cli::try_parse() {
        Ok(cli) => dispatch(cli.command),
        Err(error) => usage(&error),
    };
    match result.and_then(|()| output::printed()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output::note(&format!("error: {}", failure.line()));
            ExitCode::from(failure.code)
        }
    }
}

fn dispatch(command: Command) -> Result<()> {
    match command {
        Command::Bench(args) => bench::run(&args),
        Command::Run(args) => run::run(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Adapters(args) => adapters::run(&args),
        Command::Explain(args) => explain::run(&args),
        Command::Heatmap(args) => heatmap::run(&args),
        Command::Tune(args) => tune::run(&args),
    }
}

/// Help and version are answers; a wrong flag is one line.
fn usage(error: &clap::Error) -> Result<()> {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            output::print(&error.render().to_string());
            return Ok(());
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            output::print(&error.render().to_string());
            return Err(Failure::input("which command?"));
        }
        _ => {}
    }
    let text = error.render().to_string();
    // What is wrong stands above the usage and the pointer to --help.
    let about = text.split("\n\nUsage:").next().unwrap_or(&text);
    let about = about.split("\n\nFor more information").next().unwrap_or(about);
    Err(Failure::input(about.trim_start_matches("error: ")))
}
