//! Draws the layouts of caches: `cargo run --example cache_layouts -- docs/caches.svg`.

use std::fmt::{Display, Write as _};

const MONO: &str = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace";
const INK: &str = "#222222";
const GREY: &str = "#5c5c5c";
const FRAME: &str = "#bbbbbb";
/// A pale and a full colour for each batch entry.
const ENTRIES: [[&str; 2]; 3] = [["#d3e3f6", "#1f5fa8"], ["#fbdcc6", "#b85413"], ["#d5ebd9", "#35753f"]];
const CELL: i32 = 26;
const WIDTH: i32 = 900;
const LEFT: i32 = 24;

fn main() -> std::io::Result<()> {
    match std::env::args().nth(1) {
        Some(path) => std::fs::write(path, svg()),
        None => {
            print!("{}", svg());
            Ok(())
        }
    }
}

/// The whole picture. It has no blank line, so that Markdown takes it as one block of HTML.
pub(crate) fn svg() -> String {
    let mut d = Drawing::default();
    d.text(LEFT, 36, 17, "start", "bold", INK, "Where a cache keeps the keys of its batch entries");
    d.legend(62);
    d.rule(88);
    d.contiguous(LEFT, 114);
    d.ring(478, 114);
    d.rule(316);
    d.paged(LEFT, 342);
    d.rule(612);
    d.ragged(LEFT, 638);
    let (height, marks) = (768, d.0);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" font-family=\"Helvetica, Arial, sans-serif\">\n\
         <title>The layouts of caches: contiguous, ring, paged, ragged</title>\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" rx=\"6\" fill=\"#ffffff\"/>\n{marks}</svg>\n"
    )
}

/// What is in a cell.
#[derive(Clone, Copy)]
enum Cell {
    /// A key of an entry that was there before.
    Old(usize, u32),
    /// A key that this step has appended.
    New(usize, u32),
    /// A key of entries 0 and 1.
    Both(u32),
    /// A key that is there, but out of the window.
    Unseen(u32),
    /// A key that has been there.
    Gone(u32),
    /// Nothing that means anything.
    Unused,
}

/// Keys `0..len` of an entry in so many cells, the last of them new.
fn keys(entry: usize, len: u32, cells: u32) -> Vec<Cell> {
    let cell = |j| match () {
        () if j + 1 < len => Cell::Old(entry, j),
        () if j + 1 == len => Cell::New(entry, j),
        () => Cell::Unused,
    };
    (0..cells).map(cell).collect()
}

#[derive(Default)]
struct Drawing(String);

impl Drawing {
    fn push(&mut self, mark: std::fmt::Arguments<'_>) {
        // Writing to a string does not fail.
        let _ = writeln!(self.0, "{mark}");
    }

    #[allow(clippy::too_many_arguments)]
    fn text(
        &mut self,
        x: i32,
        y: i32,
        size: i32,
        anchor: &str,
        weight: &str,
        fill: &str,
        what: impl Display,
    ) {
        self.push(format_args!(
            "<text x=\"{x}\" y=\"{y}\" font-size=\"{size}\" text-anchor=\"{anchor}\" \
             font-weight=\"{weight}\" fill=\"{fill}\">{what}</text>"
        ));
    }

    fn note(&mut self, x: i32, y: i32, what: impl Display) {
        self.text(x, y, 12, "start", "normal", INK, what);
    }

    /// Names and shapes, as code spells them.
    fn code(&mut self, x: i32, y: i32, anchor: &str, what: impl Display) {
        self.push(format_args!(
            "<text x=\"{x}\" y=\"{y}\" font-size=\"11\" text-anchor=\"{anchor}\" fill=\"{GREY}\" \
             font-family=\"{MONO}\">{what}</text>"
        ));
    }

    fn rect(&mut self, [x, y, width, height]: [i32; 4], fill: &str, stroke: &str, more: &str) {
        self.push(format_args!(
            "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" fill=\"{fill}\" \
             stroke=\"{stroke}\"{more}/>"
        ));
    }

    fn path(&mut self, at: impl Display, stroke: &str) {
        self.push(format_args!("<path d=\"{at}\" fill=\"none\" stroke=\"{stroke}\" stroke-width=\"1.5\"/>"));
    }

    /// A curve that leaves and arrives upright.
    fn arrow(&mut self, [x, y]: [i32; 2], [to_x, to_y]: [i32; 2], stroke: &str) {
        let way = (to_y - y).signum();
        let (bend, tip) = (40 * way, 6 * way);
        let curve = format!("M{x} {y}C{x} {} {to_x} {} {to_x} {to_y}", y + bend, to_y - bend);
        self.path(format!("{curve}m-4 {}l4 {tip}l4 {}", -tip, -tip), stroke);
    }

    fn rule(&mut self, y: i32) {
        self.path(format!("M{LEFT} {y}H{}", WIDTH - LEFT), "#e2e2e2");
    }

    fn heading(&mut self, x: i32, y: i32, name: &str, shape: &str) {
        self.text(x, y, 15, "start", "bold", INK, name);
        self.code(x + 112, y, "start", shape);
    }

    fn cell(&mut self, x: i32, y: i32, width: i32, cell: Cell) {
        let at = [x, y, width, CELL];
        let (key, ink) = match cell {
            Cell::Old(entry, key) => {
                self.rect(at, ENTRIES[entry][0], ENTRIES[entry][1], "");
                (key, INK)
            }
            Cell::New(entry, key) => {
                self.rect(at, ENTRIES[entry][1], "#ffffff", "");
                (key, "#ffffff")
            }
            Cell::Both(key) => {
                self.rect(at, ENTRIES[1][0], ENTRIES[1][1], "");
                self.rect([x, y, width, CELL / 2], ENTRIES[0][0], "none", "");
                let upper = format!("M{x} {}V{y}h{width}v{}", y + CELL / 2, CELL / 2);
                self.push(format_args!("<path d=\"{upper}\" fill=\"none\" stroke=\"{}\"/>", ENTRIES[0][1]));
                (key, INK)
            }
            Cell::Unseen(key) => {
                self.rect(at, "#ffffff", ENTRIES[0][1], "");
                (key, INK)
            }
            Cell::Gone(key) => {
                self.rect(at, "#ffffff", FRAME, " stroke-dasharray=\"3 2\"");
                (key, "#8a8a8a")
            }
            Cell::Unused => {
                self.rect(at, "#eeeeee", FRAME, "");
                return;
            }
        };
        self.text(x + width / 2, y + 18, 12, "middle", "normal", ink, key);
    }

    fn cells(&mut self, x: i32, y: i32, cells: impl IntoIterator<Item = Cell>) {
        for (i, cell) in (0..).zip(cells) {
            self.cell(x + i * CELL, y, CELL, cell);
        }
    }

    /// A tick below a boundary of cells, and what it says.
    fn tick(&mut self, x: i32, y: i32, what: impl Display) {
        self.path(format!("M{x} {y}v6"), INK);
        self.code(x, y + 18, "middle", what);
    }

    fn legend(&mut self, y: i32) {
        let swatch =
            |d: &mut Self, x: i32, fill: &str, stroke: &str| d.rect([x, y, 14, 14], fill, stroke, "");
        for (i, [pale, full]) in (0..).zip(ENTRIES) {
            swatch(self, LEFT + 17 * i, pale, full);
            swatch(self, 258 + 17 * i, full, full);
        }
        self.note(LEFT + 56, y + 12, "keys of entries 0, 1 and 2,");
        self.note(258 + 56, y + 12, "appended in this step");
        swatch(self, 478, "#eeeeee", FRAME);
        self.note(498, y + 12, "no key: may hold anything, NaN too; it reaches no output");
    }

    fn contiguous(&mut self, x: i32, y: i32) {
        self.heading(x, y, "Contiguous", "[batch, heads_kv, seq_kv, dim]");
        for (entry, len) in [(0, 11), (1, 5)] {
            let top = y + 34 + 58 * entry as i32;
            self.note(x, top + 18, format!("entry {entry}"));
            self.cells(x + 58, top, keys(entry, len, 13));
            self.tick(x + 58 + CELL * len as i32, top + CELL, format!("kv_lens[{entry}] = {len}"));
        }
        self.note(x, y + 164, "Key j of an entry is its row j.");
        self.note(x, y + 182, "seq_kv is the capacity, here 13; kv_lens may be any number up to it.");
    }

    fn ring(&mut self, x: i32, y: i32) {
        self.heading(x, y, "Ring", "[batch, heads_kv, capacity, dim]");
        let of = |j| match j {
            0..5 => Cell::Gone(j),
            5..7 => Cell::Unseen(j),
            12 => Cell::New(0, j),
            _ => Cell::Old(0, j),
        };
        let (strip, top, ring) = (x + 58, y + 34, y + 92);
        self.note(x, top + 18, "entry 0");
        self.cells(strip, top, (0..13).map(of));
        let (from, to) = (strip + 7 * CELL, strip + 13 * CELL);
        self.path(format!("M{from} {}v-5H{to}v5", top - 3), INK);
        self.code((from + to) / 2, top - 13, "middle", "window: left = 5");
        self.note(x, ring + 18, "its rows");
        self.cells(strip, ring, [8, 9, 10, 11, 12, 5, 6, 7].map(of));
        for row in 0..8 {
            self.code(strip + CELL * row + CELL / 2, ring + CELL + 15, "middle", row);
        }
        // Where the next one goes.
        let next = strip + CELL * 5 + CELL / 2;
        self.path(format!("M{next} {}v14m-4 -5l4 5l4 -5", ring - 17), INK);
        self.code(next + 10, ring - 8, "start", "key 13 comes next");
        self.note(x, y + 164, "Key j is row j % capacity; what the window has left behind is");
        self.note(x, y + 182, "written over. capacity >= left + seq_q: here 8 >= 5 + 1.");
    }

    fn paged(&mut self, x: i32, y: i32) {
        const PAGE: i32 = 4 * 23;
        const STEP: i32 = PAGE + 16;
        self.heading(x, y, "Paged", "[pages, heads_kv, page_size, dim]");
        let (pool, table) = (y + 104, x + 366);
        let left = |page: i32| x + 2 + STEP * page;
        for (entry, pages, top) in [(0, [6, 1, 4], y + 16), (1, [6, 1, 3], pool + 88)] {
            let [pale, full] = ENTRIES[entry];
            for (i, page) in (0..).zip(pages) {
                let (from, to) = (table + 40 * i + 20, left(page) + 66);
                if entry == 0 {
                    self.arrow([from, top + CELL], [to, pool - 3], full);
                } else {
                    self.arrow([from, top], [to, pool + CELL + 3], full);
                }
            }
            self.code(table - 10, top + 17, "end", format!("block_table[{entry}]"));
            for (i, page) in (0..).zip(pages) {
                self.rect([table + 40 * i, top, 40, CELL], pale, full, "");
                self.text(table + 40 * i + 20, top + 18, 12, "middle", "bold", INK, page);
            }
            self.rect([table + 120, top, 40, CELL], "#eeeeee", FRAME, "");
            self.code(table + 170, top + 17, "start", format!("kv_lens[{entry}] = {}", 11 - entry));
        }
        for page in 0..8 {
            let cells: Vec<Cell> = match page {
                6 => (0..4).map(Cell::Both).collect(),
                1 => (4..8).map(Cell::Both).collect(),
                4 => keys(0, 11, 12).split_off(8),
                3 => keys(1, 10, 12).split_off(8),
                _ => vec![Cell::Unused; 4],
            };
            for (i, cell) in (0..).zip(cells) {
                self.cell(left(page) + 23 * i, pool, 23, cell);
            }
            self.code(left(page), pool - 6, "start", format!("page {page}"));
        }
        self.note(x, y + 238, "Key j is row j % page_size of page block_table[entry][j / page_size].");
        self.note(
            x,
            y + 256,
            "Pages come in any order. Both entries begin with the same 8 keys, in pages 6 and 1: full pages, \
             where nobody writes any more.",
        );
    }

    fn ragged(&mut self, x: i32, y: i32) {
        self.heading(x, y, "Ragged", "keys [1, heads_kv, total, dim]");
        let top = y + 22;
        let keys = [(0, 5), (1, 2), (2, 6)].map(|(entry, len)| (0..len).map(move |j| Cell::Old(entry, j)));
        self.cells(x + 58, top, keys.into_iter().flatten());
        self.note(x, top + 18, "keys");
        for offset in [0, 5, 7, 13] {
            self.tick(x + 58 + CELL * offset, top + CELL, offset);
        }
        self.note(x, y + 92, "cu_seqlens_k is 0, 5, 7, 13: where each begins, and the last end.");
        self.note(x, y + 110, "Key j of an entry is row cu_seqlens_k[entry] + j.");
        let right = 478;
        self.code(right, y, "start", "queries [total_q, heads_q, dim]");
        let queries = [Cell::New(0, 0), Cell::New(0, 1), Cell::New(0, 2), Cell::New(0, 3)];
        self.cells(right + 58, top, queries.into_iter().chain([Cell::New(1, 0), Cell::New(2, 0)]));
        self.note(right, top + 18, "queries");
        for offset in [0, 4, 5, 6] {
            self.tick(right + 58 + CELL * offset, top + CELL, offset);
        }
        self.note(right, y + 92, "cu_seqlens_q is 0, 4, 5, 6: a mixed batch, over any cache. Four");
        self.note(right, y + 110, "tokens of entry 0's prompt, beside a step of entries 1 and 2.");
    }
}
