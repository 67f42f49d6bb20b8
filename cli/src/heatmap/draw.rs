//! The picture: small multiples that share their axes, labels at the outer edges.

use std::fmt::Write;

use super::Picture;
use super::colour::{self, LEVELS, NO_NUMBER, NOTHING};
use crate::svg::{Anchor, Svg, Text, short, text_width};

const GREY: &str = "#57606a";
const MARGIN: f64 = 24.0;
const GAP: f64 = 16.0;
const HEAD_LINE: f64 = 20.0;
const HEADER: f64 = 56.0;
/// Cells along one side of a panel, at most; longer sequences are gathered in blocks.
const MAX_CELLS: usize = 128;
/// The least room that a label needs along its axis.
const LABEL_STEP: f64 = 8.6;
const BAR_WIDTH: f64 = 190.0;

/// One axis: how many cells, how large, what each stands for.
struct Axis {
    cells: usize,
    /// Queries or keys in one cell.
    block: usize,
    cell: f64,
    labels: Vec<(usize, String)>,
}

impl Axis {
    /// `number_room` is what a number needs along the axis; names stand close.
    fn new(n: usize, cell: f64, names: Option<&[String]>, number_room: f64) -> Self {
        let block = n.div_ceil(MAX_CELLS);
        let cells = n.div_ceil(block);
        let room = if names.is_some() { LABEL_STEP } else { number_room };
        let every = (room / cell).ceil() as usize;
        let labels = match names {
            Some(names) => (0..cells).step_by(every.max(1)).map(|i| (i, names[i * block].clone())).collect(),
            None => numbers(n, block, every.max(1)),
        };
        Self { cells, block, cell, labels }
    }

    fn length(&self) -> f64 {
        self.cells as f64 * self.cell
    }

    /// Whether labels side by side leave space between them.
    fn is_roomy(&self, size: f64) -> bool {
        let apart = self.labels.windows(2).map(|pair| pair[1].0 - pair[0].0).min().unwrap_or(self.cells);
        self.label_room(size) + 2.0 <= apart as f64 * self.cell
    }

    fn label_room(&self, size: f64) -> f64 {
        self.labels.iter().map(|(_, text)| text_width(text) * size).fold(0.0, f64::max) + 6.0
    }
}

/// Indices at round numbers, at least `every` cells apart.
fn numbers(n: usize, block: usize, every: usize) -> Vec<(usize, String)> {
    let steps = (0..).flat_map(|power| [1, 2, 5].map(|m| m * 10usize.pow(power)));
    // Twice the room: a row of close numbers is harder to read than a few.
    let least = if n > 24 { 2 * every * block } else { every * block };
    let step = steps.take(40).find(|&step| step >= least).unwrap_or(n);
    (0..n).step_by(step).map(|i| (i / block, i.to_string())).collect()
}

/// Draws the panels, their labels and the colour scale.
pub(crate) fn draw(picture: &Picture) -> String {
    let heads = picture.heads.len();
    let columns = columns(heads);
    let rows = heads.div_ceil(columns);
    let side: f64 = match heads {
        1 => 520.0,
        2..=4 => 320.0,
        _ => 205.0,
    };
    let shown = |n: usize| n.div_ceil(n.div_ceil(MAX_CELLS)) as f64;
    let (across, down) = (shown(picture.keys), shown(picture.queries));
    let cell = (side / across.max(down)).min(26.0);
    // One query against many keys is a stripe that can still be seen.
    let size = cell.clamp(8.5, 11.0);
    let number = text_width(&picture.keys.to_string()) * size + 8.0;
    let x = Axis::new(picture.keys, cell.max(16.0 / across), picture.key_labels.as_deref(), number);
    let y = Axis::new(picture.queries, cell.max(16.0 / down), picture.query_labels.as_deref(), LABEL_STEP);

    let upright = x.is_roomy(size);
    let (left, bottom) = (y.label_room(size), if upright { size + 8.0 } else { x.label_room(size) });
    let (panel_width, panel_height) = (x.length() + GAP, y.length() + HEAD_LINE + GAP);
    let grid_width = columns as f64 * panel_width - GAP;
    let subtitle = match (x.block, y.block) {
        (1, 1) => picture.subtitle.clone(),
        (k, q) => format!("{}; each cell the largest of {q} x {k}", picture.subtitle),
    };
    let weights = picture.weights.first().map_or(&[][..], |of| of);
    let has_nothing = weights.contains(&0.0);
    let words = (text_width(&picture.title) * 18.0).max(text_width(&subtitle) * 12.0);
    let beside = BAR_WIDTH + if has_nothing { 130.0 } else { 50.0 };
    let inner = (left + grid_width).max(words + beside);
    let width = MARGIN + inner + MARGIN;
    // Room for the labels stays free under the last row, and where that row is shorter.
    let height = MARGIN + HEADER + rows as f64 * panel_height - GAP + bottom + MARGIN * 0.5;

    let mut svg = Svg::new(width, height, &format!("{}: {}", picture.title, picture.subtitle));
    svg.text(MARGIN, MARGIN + 14.0, Text { bold: true, ..Text::new(18.0) }, &picture.title);
    svg.text(MARGIN, MARGIN + 34.0, Text { fill: GREY, ..Text::new(12.0) }, &subtitle);
    let largest = weights.iter().copied().filter(|w| w.is_finite()).fold(0.0, f32::max);
    scale(&mut svg, width - MARGIN - BAR_WIDTH, MARGIN + 4.0, largest, has_nothing);

    let (origin_x, origin_y) = (MARGIN + left, MARGIN + HEADER);
    for (head, number) in picture.heads.iter().enumerate() {
        let (column, row) = (head % columns, head / columns);
        let at_x = origin_x + column as f64 * panel_width;
        let at_y = origin_y + row as f64 * panel_height;
        svg.text(at_x, at_y + 12.0, Text { bold: true, ..Text::new(11.0) }, &format!("head {number}"));
        let at_y = at_y + HEAD_LINE;
        let pairs = picture.queries * picture.keys;
        let of_head = &weights[head * pairs..][..pairs];
        panel(&mut svg, of_head, [picture.queries, picture.keys], [at_x, at_y], (&x, &y), largest);
        if column == 0 {
            for (i, text) in &y.labels {
                let middle = at_y + (*i as f64 + 0.5) * y.cell;
                let style = Text { anchor: Anchor::End, ..Text::new(size) };
                svg.text(at_x - 5.0, middle + 0.35 * size, style, text);
            }
        }
        // The last panel of its column.
        if head + columns >= heads {
            let base = at_y + y.length() + 5.0;
            for (i, text) in &x.labels {
                let middle = at_x + (*i as f64 + 0.5) * x.cell;
                if upright {
                    let style = Text { anchor: Anchor::Middle, ..Text::new(size) };
                    svg.text(middle, base + 0.75 * size, style, text);
                } else {
                    let style = Text { anchor: Anchor::End, turn: -90.0, ..Text::new(size) };
                    svg.text(middle + 0.35 * size, base, style, text);
                }
            }
        }
    }
    svg.finish()
}

/// As many columns as make a picture somewhat wider than high, with few empty places.
fn columns(heads: usize) -> usize {
    let cost = |columns: usize| {
        let rows = heads.div_ceil(columns);
        let empty = (rows * columns - heads) as f64 / heads as f64;
        (columns as f64 / rows as f64 / 1.3).ln().abs() + 4.0 * empty
    };
    (1..=heads).min_by(|&a, &b| cost(a).total_cmp(&cost(b))).unwrap_or(1)
}

/// One head: a path for each colour, so that the file stays small.
fn panel(
    svg: &mut Svg,
    weights: &[f32],
    [queries, keys]: [usize; 2],
    [left, top]: [f64; 2],
    (x, y): (&Axis, &Axis),
    largest: f32,
) {
    // The last is for blocks with a NaN: the maximum of others would hide it.
    let mut paths = vec![String::new(); LEVELS + 1];
    for row in 0..y.cells {
        let mut column = 0;
        while column < x.cells {
            let level_at = |column: usize| {
                let rows = row * y.block..((row + 1) * y.block).min(queries);
                let columns = column * x.block..((column + 1) * x.block).min(keys);
                let block = rows.flat_map(|i| &weights[i * keys..][columns.clone()]).copied();
                let weight = block.fold(0.0, |most: f32, w| if w <= most { most } else { w });
                if weight.is_nan() {
                    return Some(LEVELS);
                }
                (weight > 0.0).then(|| colour::level(colour::position(weight, largest)))
            };
            let level = level_at(column);
            let start = column;
            while column < x.cells && level_at(column) == level {
                column += 1;
            }
            if let Some(level) = level {
                let n = column - start;
                let _ = write!(paths[level], "M{start} {row}h{n}v1h-{n}z");
            }
        }
    }
    let mut markup = format!(
        "<g transform=\"translate({} {}) scale({:.4} {:.4})\" shape-rendering=\"crispEdges\">\n\
         <rect width=\"{}\" height=\"{}\" fill=\"{NOTHING}\"/>\n",
        short(left),
        short(top),
        x.cell,
        y.cell,
        x.cells,
        y.cells,
    );
    for (level, path) in paths.iter().enumerate().filter(|(_, path)| !path.is_empty()) {
        let fill = if level == LEVELS { NO_NUMBER.into() } else { colour::colour(level) };
        let _ = writeln!(markup, "<path fill=\"{fill}\" d=\"{path}\"/>");
    }
    svg.raw(&(markup + "</g>\n"));
}

/// The colour scale with its numbers, and what the colour of nothing means.
fn scale(svg: &mut Svg, left: f64, top: f64, largest: f32, has_nothing: bool) {
    svg.raw("<linearGradient id=\"scale\">");
    for (offset, colour) in colour::stops() {
        svg.raw(&format!("<stop offset=\"{}\" stop-color=\"{colour}\"/>", short(offset)));
    }
    svg.raw("</linearGradient>\n");
    svg.rect([left, top, BAR_WIDTH, 10.0], "url(#scale)");
    for part in [0.0, 0.05, 0.25, 0.5, 1.0] {
        let x = left + colour::position(part, 1.0) * BAR_WIDTH;
        svg.line([x, top + 10.0, x, top + 14.0], GREY, 1.0);
        let text = of_scale(part, largest);
        let style = Text { fill: GREY, anchor: Anchor::Middle, ..Text::new(10.0) };
        svg.text(x, top + 25.0, style, &text);
    }
    if has_nothing {
        let style = Text { fill: GREY, anchor: Anchor::End, ..Text::new(10.0) };
        svg.text(left - 14.0, top + 9.0, style, "weight 0");
        svg.rect([left - 16.0 - text_width("weight 0") * 10.0 - 14.0, top, 10.0, 10.0], NOTHING);
    }
}

/// A part of the largest weight in digits: two decimals, and more where the largest has so few.
fn of_scale(part: f32, largest: f32) -> String {
    let finer = (-(2.0 * f64::from(largest)).log10()).ceil().clamp(0.0, 40.0) as usize;
    let text = format!("{:.*}", 2 + finer, part * largest);
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_fill_a_rectangle() {
        assert_eq!([1, 4, 6, 8, 9, 12, 16, 32].map(columns), [1, 2, 3, 4, 3, 4, 4, 8]);
    }

    #[test]
    fn the_scale_has_digits_for_any_weight() {
        for (largest, labels) in [
            (1.0, ["0", "0.05", "0.25", "1"]),
            (0.25, ["0", "0.013", "0.062", "0.25"]),
            (1.0 / 300.0, ["0", "0.00017", "0.00083", "0.00333"]),
            (0.0, ["0", "0", "0", "0"]),
        ] {
            assert_eq!([0.0, 0.05, 0.25, 1.0].map(|part| of_scale(part, largest)), labels);
        }
    }

    #[test]
    fn numbers_stand_at_round_places() {
        let at = |n, block, every| numbers(n, block, every).into_iter().map(|n| n.0).collect::<Vec<_>>();
        assert_eq!(at(4, 1, 1), [0, 1, 2, 3]);
        assert_eq!(at(1000, 10, 5), [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]);
    }
}
