//! Refusing sizes that the machine cannot hold, before anything is allocated.

use crate::failure::{Failure, Result};

/// Fails when `bytes` are more than the machine has left. Where the system does not tell (anything
/// but Linux), every size passes.
pub(crate) fn allows(what: &str, bytes: u128) -> Result<()> {
    match available() {
        Some(got) if bytes > got => {
            let gib = |bytes: u128| bytes as f64 / (1u64 << 30) as f64;
            Err(Failure::input(format!(
                "{what}: {:.1} GiB of memory needed, {:.1} GiB available",
                gib(bytes),
                gib(got)
            )))
        }
        _ => Ok(()),
    }
}

fn available() -> Option<u128> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u128>().ok()? * 1024)
}
