//! What the test programs share: seeded cases, the subjects that are tested, and the comparison.
// Each test program uses its part of this module, and none is a library.
#![allow(dead_code, unreachable_pub)]

pub mod backward;
pub mod case;
pub mod check;
pub mod gpu;
pub mod json;
pub mod kept;
pub mod npy;
pub mod pairs;
pub mod pool;
pub mod rng;
pub mod subject;

use std::io::Write;

/// Prints past the test harness's capture: what was tested on what belongs into every log.
pub fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
