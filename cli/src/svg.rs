//! A few lines of SVG: enough for the program's pictures, without a font on the machine.

use std::fmt::Write;

/// Typefaces that every system has one of.
const FONT: &str =
    "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,'DejaVu Sans',sans-serif";

/// A picture under construction.
pub(crate) struct Svg {
    body: String,
    width: f64,
    height: f64,
    title: String,
}

/// Where a text stands relative to its point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Anchor {
    Start,
    Middle,
    End,
}

/// How a text looks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Text {
    pub(crate) size: f64,
    pub(crate) fill: &'static str,
    pub(crate) anchor: Anchor,
    pub(crate) bold: bool,
    /// Degrees, clockwise.
    pub(crate) turn: f64,
}

impl Text {
    /// Dark text of a size, from its point on.
    pub(crate) const fn new(size: f64) -> Self {
        Self { size, fill: "#24292f", anchor: Anchor::Start, bold: false, turn: 0.0 }
    }
}

impl Svg {
    /// A white sheet. The title is what screen readers say.
    pub(crate) fn new(width: f64, height: f64, title: &str) -> Self {
        Self { body: String::new(), width, height, title: escape(title) }
    }

    /// A filled rectangle.
    pub(crate) fn rect(&mut self, [x, y, w, h]: [f64; 4], fill: &str) {
        let [x, y, w, h] = [x, y, w, h].map(short);
        let _ = writeln!(self.body, r#"<rect x="{x}" y="{y}" width="{w}" height="{h}" fill="{fill}"/>"#);
    }

    /// A straight line.
    pub(crate) fn line(&mut self, [x1, y1, x2, y2]: [f64; 4], stroke: &str, width: f64) {
        let [x1, y1, x2, y2] = [x1, y1, x2, y2].map(short);
        let width = short(width);
        let _ = writeln!(
            self.body,
            r#"<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{stroke}" stroke-width="{width}"/>"#
        );
    }

    /// Text at a point.
    pub(crate) fn text(&mut self, x: f64, y: f64, style: Text, text: &str) {
        let (x, y, size, fill) = (short(x), short(y), short(style.size), style.fill);
        let anchor = match style.anchor {
            Anchor::Start => "",
            Anchor::Middle => r#" text-anchor="middle""#,
            Anchor::End => r#" text-anchor="end""#,
        };
        let bold = if style.bold { r#" font-weight="600""# } else { "" };
        let turn = match style.turn {
            0.0 => String::new(),
            degrees => format!(r#" transform="rotate({} {x} {y})""#, short(degrees)),
        };
        let text = escape(text);
        let _ = writeln!(
            self.body,
            r#"<text x="{x}" y="{y}" font-size="{size}" fill="{fill}"{anchor}{bold}{turn}>{text}</text>"#
        );
    }

    /// Markup as it is.
    pub(crate) fn raw(&mut self, markup: &str) {
        self.body += markup;
    }

    /// The file.
    pub(crate) fn finish(self) -> String {
        let (w, h, title) = (short(self.width), short(self.height), self.title);
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{w}\" height=\"{h}\" \
             viewBox=\"0 0 {w} {h}\" role=\"img\" font-family=\"{FONT}\">\n<title>{title}</title>\n\
             <rect width=\"{w}\" height=\"{h}\" fill=\"#ffffff\"/>\n{}</svg>\n",
            self.body
        )
    }
}

/// A number with at most two decimals.
pub(crate) fn short(x: f64) -> String {
    let text = format!("{x:.2}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.into() }
}

/// Text that XML allows: markup is escaped, characters that XML forbids are replaced.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\t' | '\n' | '\r' => out.push(' '),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// About how wide a text is, in units of its size: for room, not for typesetting.
pub(crate) fn text_width(text: &str) -> f64 {
    text.chars()
        .map(|c| match c {
            'i' | 'j' | 'l' | 'f' | 't' | 'I' | '.' | ',' | ':' | ';' | '\'' | '|' | '!' | '[' | ']'
            | '(' | ')' => 0.32,
            'm' | 'w' | 'M' | 'W' | '@' => 0.88,
            'A'..='Z' => 0.66,
            ' ' => 0.3,
            c if c.is_ascii() => 0.56,
            _ => 1.0,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        assert_eq!([short(1.0), short(0.125), short(-0.001), short(10.5)], ["1", "0.12", "0", "10.5"]);
    }

    #[test]
    fn text_is_escaped() {
        assert_eq!(escape("<a & \"b\">\u{0}\n"), "&lt;a &amp; &quot;b&quot;&gt;\u{fffd} ");
    }
}
