//! The benchmark's chart: GFLOP/s in groups of bars, a group for each problem, a bar for each path.

use super::report::Row;
use crate::svg::{Anchor, Svg, Text, text_width};

/// Colours that people with any colour vision can tell apart (Okabe & Ito 2008).
const COLOURS: [&str; 6] = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"];
const GREY: &str = "#57606a";
const GRID: &str = "#e4e7eb";

const BAR: f64 = 34.0;
const BAR_GAP: f64 = 4.0;
const GROUP_GAP: f64 = 40.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 28.0;
const PLOT_HEIGHT: f64 = 280.0;

/// Bars that belong together: one problem.
struct Group<'a> {
    label: String,
    bars: Vec<&'a Row>,
}

/// Draws the rows.
pub(crate) fn draw(rows: &[Row]) -> String {
    let groups = groups(rows);
    let mut paths: Vec<&str> = Vec::new();
    for row in rows {
        if !paths.contains(&row.path.as_str()) {
            paths.push(&row.path);
        }
    }
    let colour = |path: &str| COLOURS[paths.iter().position(|p| *p == path).unwrap_or(0) % COLOURS.len()];

    let legend: Vec<(String, &str)> = paths.iter().map(|path| (legend(rows, path), colour(path))).collect();
    let title = "Attention throughput";
    let subtitle = subtitle(rows);
    let group_widths: Vec<f64> = groups.iter().map(group_width).collect();
    let bars_width = group_widths.iter().sum::<f64>() + GROUP_GAP * groups.len() as f64;
    let text_room = legend
        .iter()
        .map(|(text, _)| text_width(text) * 12.0 + 20.0)
        .chain([text_width(&subtitle) * 12.0])
        .fold(360.0, f64::max);
    let plot_width = bars_width.max(text_room);
    let top = 78.0 + 20.0 * legend.len() as f64;
    let (width, height) = (LEFT + plot_width + RIGHT, top + PLOT_HEIGHT + 52.0);
    let mut svg = Svg::new(width, height, &format!("{title}: GFLOP/s by shape and path"));

    svg.text(LEFT, 30.0, Text { bold: true, ..Text::new(18.0) }, title);
    svg.text(LEFT, 50.0, Text { fill: GREY, ..Text::new(12.0) }, &subtitle);
    for (i, (text, colour)) in legend.iter().enumerate() {
        let y = 72.0 + 20.0 * i as f64;
        svg.rect([LEFT, y - 10.0, 12.0, 12.0], colour);
        svg.text(LEFT + 20.0, y, Text::new(12.0), text);
    }

    let highest = rows.iter().map(|row| row.gflops).filter(|x| x.is_finite()).fold(0.0, f64::max);
    let step = tick_step(highest);
    let ticks = (highest * 1.02 / step).ceil().max(1.0);
    let base = top + PLOT_HEIGHT;
    let y_of = |gflops: f64| base - gflops / (ticks * step) * PLOT_HEIGHT;
    for i in 0..=ticks as usize {
        let (value, y) = (i as f64 * step, y_of(i as f64 * step));
        svg.line([LEFT, y, LEFT + plot_width, y], if i == 0 { GREY } else { GRID }, 1.0);
        let style = Text { fill: GREY, anchor: Anchor::End, ..Text::new(11.0) };
        svg.text(LEFT - 8.0, y + 4.0, style, &tick_label(value, step));
    }
    let axis = Text { fill: GREY, anchor: Anchor::Middle, turn: -90.0, ..Text::new(12.0) };
    svg.text(20.0, top + PLOT_HEIGHT / 2.0, axis, "GFLOP/s");

    // Groups spread over the width that the words above need.
    let gap = (plot_width - group_widths.iter().sum::<f64>()) / groups.len().max(1) as f64;
    let mut x = LEFT + gap / 2.0;
    for (group, group_width) in groups.iter().zip(group_widths) {
        let bars = group.bars.len() as f64 * (BAR + BAR_GAP) - BAR_GAP;
        let mut bar_x = x + (group_width - bars) / 2.0;
        for row in &group.bars {
            let y = y_of(row.gflops);
            svg.rect([bar_x, y, BAR, (base - y).max(0.5)], colour(&row.path));
            let style = Text { anchor: Anchor::Middle, ..Text::new(10.5) };
            svg.text(bar_x + BAR / 2.0, y - 5.0, style, &value_label(row.gflops));
            bar_x += BAR + BAR_GAP;
        }
        let style = Text { anchor: Anchor::Middle, ..Text::new(12.0) };
        svg.text(x + group_width / 2.0, base + 20.0, style, &group.label);
        x += group_width + gap;
    }
    let style = Text { fill: GREY, anchor: Anchor::Middle, ..Text::new(11.0) };
    svg.text(
        LEFT + plot_width / 2.0,
        base + 42.0,
        style,
        "batch x heads x sequence x width (query/key-value)",
    );
    svg.finish()
}

fn groups(rows: &[Row]) -> Vec<Group<'_>> {
    let several_dtypes = rows.iter().any(|row| row.dtype != rows[0].dtype);
    let mut groups: Vec<Group<'_>> = Vec::new();
    for row in rows {
        let label = if several_dtypes { format!("{} {}", row.shape, row.dtype) } else { row.shape.clone() };
        match groups.iter_mut().find(|group| group.label == label) {
            Some(group) => group.bars.push(row),
            None => groups.push(Group { label, bars: vec![row] }),
        }
    }
    groups
}

fn group_width(group: &Group<'_>) -> f64 {
    let bars = group.bars.len() as f64 * (BAR + BAR_GAP) - BAR_GAP;
    bars.max(text_width(&group.label) * 12.0)
}

fn legend(rows: &[Row], path: &str) -> String {
    let mut machines: Vec<&str> = Vec::new();
    for row in rows.iter().filter(|row| row.path == path) {
        if !machines.contains(&row.adapter.as_str()) {
            machines.push(&row.adapter);
        }
    }
    format!("{path}: {}", machines.join("; "))
}

fn subtitle(rows: &[Row]) -> String {
    let all = |of: fn(&Row) -> &str| {
        let mut words: Vec<&str> = Vec::new();
        for row in rows {
            if !words.contains(&of(row)) {
                words.push(of(row));
            }
        }
        words.join(", ")
    };
    match all(|row| &row.options).as_str() {
        "plain" => format!("{}, more is better", all(|row| &row.dtype)),
        options => format!("{}, {options}, more is better", all(|row| &row.dtype)),
    }
}

/// 1, 2 or 5 times a power of ten, so that there are about five steps.
fn tick_step(highest: f64) -> f64 {
    if highest <= 0.0 {
        return 1.0;
    }
    let rough = highest / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|&step| step >= rough).unwrap_or(power * 10.0)
}

fn tick_label(value: f64, step: f64) -> String {
    let digits = (-step.log10().floor()).max(0.0) as usize;
    format!("{value:.digits$}")
}

fn value_label(x: f64) -> String {
    let digits = if x < 1.0 { 2 } else { usize::from(x < 10.0) };
    format!("{x:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_round() {
        assert_eq!(
            [tick_step(137.0), tick_step(9.0), tick_step(0.4)].map(|x| (x * 100.0).round()),
            [5000.0, 200.0, 10.0]
        );
        assert_eq!([tick_label(0.5, 0.1), tick_label(50.0, 50.0)], ["0.5", "50"]);
    }
}
