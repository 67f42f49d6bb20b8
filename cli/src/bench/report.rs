//! The rows of a benchmark as a table, CSV and JSON.

use serde::Serialize;
use wgpu_attention::AttentionProblem;

use super::measure::{Runner, Samples};
use crate::backend::Backend;
use crate::failure::{Failure, Result};
use crate::output::Table;
use crate::shapes::Shape;

/// One path on one problem. What is serialised is what `--json` and `--csv` promise.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) path: String,
    kernel: String,
    pub(crate) adapter: String,
    pub(crate) dtype: String,
    pub(crate) shape: String,
    pub(crate) options: String,
    ms_median: f64,
    ms_min: f64,
    ms_first: f64,
    gpu_ms: Option<f64>,
    pub(crate) gflops: f64,
    /// JSON has no infinity: a NaN where a number belongs is null there.
    max_error: f64,
    scratch_bytes: u64,
    /// Bytes of the keys and values that queries see read a second, each once: by the device's clock if it has
    /// one, since a step is short beside what it costs to wait for it.
    kv_gb_s: f64,
    /// That of a copy on the same adapter.
    of_copy: Option<f64>,
    #[serde(skip)]
    budget: f64,
    #[serde(skip)]
    speed_up: Option<f64>,
}

impl Row {
    /// Condenses the samples.
    pub(crate) fn new(
        backend: Backend,
        runner: &Runner<'_>,
        problem: &AttentionProblem,
        options: String,
        kv_bytes: u64,
        samples: &Samples,
        [max_error, budget]: [f64; 2],
    ) -> Self {
        let times: Vec<f64> = samples.rounds.iter().map(|sample| sample.ms).collect();
        let gpu: Option<Vec<f64>> = samples.rounds.iter().map(|sample| sample.gpu_ms).collect();
        let (ms_median, gpu_ms) = (median(times.clone()), gpu.map(median));
        Self {
            path: backend.to_string(),
            kernel: runner.kernel(),
            adapter: runner.adapter(),
            dtype: problem.dtype.to_string(),
            shape: Shape::of(problem).to_string(),
            options,
            ms_median,
            ms_min: times.into_iter().fold(f64::INFINITY, f64::min),
            ms_first: samples.first.ms,
            gpu_ms,
            gflops: problem.flops() / (ms_median * 1e6),
            max_error,
            scratch_bytes: runner.scratch_bytes(),
            kv_gb_s: kv_bytes as f64 / (gpu_ms.unwrap_or(ms_median) * 1e6),
            of_copy: None,
            budget,
            speed_up: None,
        }
    }

    /// Sets what share of a copy's traffic the keys and values are.
    pub(crate) fn set_copy(&mut self, gb_s: f64) {
        self.of_copy = Some(self.kv_gb_s / gb_s);
    }

    /// Whether the contract allows the error.
    pub(crate) fn within_budget(&self) -> bool {
        self.max_error <= self.budget
    }
}

/// Sets each row's speed-up over the fast CPU path; the rows are of one problem.
pub(crate) fn set_speed_ups(rows: &mut [Row]) {
    let cpu = rows.iter().find(|row| row.path == "cpu").map(|row| row.ms_median);
    for row in rows {
        row.speed_up = cpu.map(|cpu| cpu / row.ms_median);
    }
}

fn median(mut x: Vec<f64>) -> f64 {
    x.sort_unstable_by(f64::total_cmp);
    match x.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => x[n / 2],
        n => (x[n / 2 - 1] + x[n / 2]) / 2.0,
    }
}

/// What the rows share stands above the table once.
pub(crate) fn table(rows: &[Row], decode: bool) -> String {
    let mut text = String::new();
    let mut seen: Vec<(&str, &str)> = Vec::new();
    for row in rows {
        let machine = (row.path.as_str(), row.adapter.as_str());
        if !seen.contains(&machine) {
            seen.push(machine);
            text += &format!("{:14} {}\n", machine.0, machine.1);
        }
    }
    if !text.is_empty() {
        text.push('\n');
    }
    let problem = |row: &Row| [row.shape.clone(), row.dtype.clone(), row.options.clone()];
    let changes = rows.windows(2).filter(|pair| problem(&pair[0]) != problem(&pair[1])).count();
    let same = |of: fn(&Row) -> &String| rows.windows(2).all(|pair| of(&pair[0]) == of(&pair[1]));
    let (one_dtype, one_options) = (same(|row| &row.dtype), same(|row| &row.options));
    if let (Some(row), true, true) = (rows.first(), one_dtype, one_options) {
        text += &format!("{}, {}\n\n", row.dtype, row.options);
    }
    let mut head = vec!["<shape"];
    if !(one_dtype && one_options) {
        head.extend(["<dtype", "<options"]);
    }
    head.extend([
        "<path",
        "ms",
        "min ms",
        "first",
        "GPU ms",
        if decode { "K, V GB/s" } else { "GFLOP/s" },
        "max error",
        "budget",
        "<within",
        "vs cpu",
    ]);
    if decode {
        head.push("of a copy");
    }
    head.push("<kernels");
    let mut table = Table::new(&head);
    for (at, row) in rows.iter().enumerate() {
        // Paths of one problem stand together.
        if at > 0 && rows.len() > changes + 1 && problem(row) != problem(&rows[at - 1]) {
            table.gap();
        }
        let mut cells = vec![row.shape.clone()];
        if !(one_dtype && one_options) {
            cells.extend([row.dtype.clone(), row.options.clone()]);
        }
        cells.extend([
            row.path.clone(),
            time(row.ms_median),
            time(row.ms_min),
            time(row.ms_first),
            row.gpu_ms.map_or("-".into(), time),
            number(if decode { row.kv_gb_s } else { row.gflops }),
            format!("{:.1e}", row.max_error),
            format!("{:.1e}", row.budget),
            if row.within_budget() { "yes".into() } else { "NO".into() },
            row.speed_up.map_or("-".into(), |x| format!("{x:.2}x")),
        ]);
        if decode {
            cells.push(row.of_copy.map_or("-".into(), |x| format!("{:.0} %", 100.0 * x)));
        }
        cells.extend([row.kernel.replace('+', ", ")]);
        table.row(cells);
    }
    text + &table.render()
}

/// Three significant digits.
fn number(x: f64) -> String {
    let digits = if x < 10.0 { 2 } else { usize::from(x < 100.0) };
    format!("{x:.digits$}")
}

fn time(ms: f64) -> String {
    if ms < 1.0 { format!("{ms:.3}") } else { number(ms) }
}

const COLUMNS: [&str; 15] = [
    "path",
    "kernel",
    "adapter",
    "dtype",
    "shape",
    "options",
    "ms_median",
    "ms_min",
    "ms_first",
    "gpu_ms",
    "gflops",
    "max_error",
    "scratch_bytes",
    "kv_gb_s",
    "of_copy",
];

/// One line for each row under a line of names (RFC 4180).
pub(crate) fn csv(rows: &[Row]) -> String {
    let quoted = |text: &str| {
        if text.contains(['"', ',', '\n', '\r']) {
            format!("\"{}\"", text.replace('"', "\"\""))
        } else {
            text.to_string()
        }
    };
    let mut text = COLUMNS.join(",") + "\n";
    for row in rows {
        let words = [&row.path, &row.kernel, &row.adapter, &row.dtype, &row.shape, &row.options];
        let mut fields: Vec<String> = words.into_iter().map(|word| quoted(word)).collect();
        fields.extend([
            row.ms_median.to_string(),
            row.ms_min.to_string(),
            row.ms_first.to_string(),
            row.gpu_ms.map_or(String::new(), |ms| ms.to_string()),
            row.gflops.to_string(),
            format!("{:e}", row.max_error),
            row.scratch_bytes.to_string(),
            row.kv_gb_s.to_string(),
            row.of_copy.map_or(String::new(), |x| x.to_string()),
        ]);
        text += &(fields.join(",") + "\n");
    }
    text
}

/// An array of objects.
pub(crate) fn json(rows: &[Row]) -> Result<String> {
    serde_json::to_string_pretty(rows).map(|text| text + "\n").map_err(Failure::input)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0]), 2.5);
        assert!(median(vec![]).is_nan());
    }

    #[test]
    fn numbers_keep_three_digits() {
        assert_eq!(
            [number(1.234), number(12.34), number(123.4), time(0.01234)],
            ["1.23", "12.3", "123", "0.012"]
        );
    }
}
