//! The program's pictures as pixels, with a typeface of its own: a machine may have no fonts at all.

use std::collections::HashMap;
use std::fmt::Display;
use std::sync::{Arc, Mutex, PoisonError};

use resvg::tiny_skia::{IntSize, Pixmap, Transform};
use resvg::usvg::fontdb::{Database, FaceInfo, ID, Source, Stretch, Style, Weight};
use resvg::usvg::roxmltree::Document;
use resvg::usvg::{FallbackSelectionFn, Font, FontResolver, Options, Tree};

use crate::failure::{Failure, Result};

/// Pixels along each unit of the SVG: sharp on a dense display, too.
const SCALE: f32 = 2.0;
/// What most programs still open.
const MAX_SIDE: f64 = 16384.0;

/// The layout leaves room for letters of about this width, whatever typeface a browser takes.
const REGULAR: &[u8] = include_bytes!("../assets/DejaVuSansCondensed.ttf");
const BOLD: &[u8] = include_bytes!("../assets/DejaVuSansCondensed-Bold.ttf");

/// A PNG of what [`crate::svg::Svg`] made, at twice its size.
pub(crate) fn png(svg: &str) -> Result<Vec<u8>> {
    let document = Document::parse(svg).map_err(failed)?;
    // First, since laying out a text that is too long takes as long.
    let mut pixels = sheet(&document)?;
    let tree = Tree::from_xmltree(&document, &options()).map_err(failed)?;
    resvg::render(&tree, Transform::from_scale(SCALE, SCALE), &mut pixels.as_mut());
    pixels.encode_png().map_err(failed)
}

fn failed(error: impl Display) -> Failure {
    Failure::input(error).about("no PNG of the picture")
}

/// White pixels, as many as the picture needs.
fn sheet(document: &Document<'_>) -> Result<Pixmap> {
    let side = |name| {
        let units: f64 = document.root_element().attribute(name)?.parse().ok()?;
        Some((units * f64::from(SCALE)).ceil())
    };
    let (width, height) = side("width").zip(side("height")).unwrap_or_default();
    let refuse = |why: &str| Failure::input(format!("{width} x {height} pixels: {why}; take OUT.svg"));
    if width > MAX_SIDE || height > MAX_SIDE {
        return Err(refuse(&format!("a PNG has {MAX_SIDE} a side at most")));
    }
    let (width, height) = (width as u32, height as u32);
    let bytes = width as usize * height as usize * 4;
    let mut white = Vec::new();
    // Asked for first: memory that is just taken ends the program where there is none.
    white.try_reserve_exact(bytes).map_err(|_| refuse("more than memory holds"))?;
    white.resize(bytes, 255);
    let size = IntSize::from_wh(width, height);
    size.and_then(|size| Pixmap::from_vec(white, size)).ok_or_else(|| refuse("no size of a PNG"))
}

/// Text is in the program's own typeface, whatever the SVG names and the machine has.
fn options() -> Options<'static> {
    let mut fonts = Database::new();
    let [regular, bold] = [REGULAR, BOLD].map(|font| {
        let faces = fonts.load_font_source(Source::Binary(Arc::new(font)));
        faces.first().copied()
    });
    let select_font = Box::new(
        move |font: &Font, _: &mut Arc<Database>| {
            if font.weight() >= Weight::SEMIBOLD.0 { bold } else { regular }
        },
    );
    Options {
        font_resolver: FontResolver { select_font, select_fallback: others() },
        fontdb: Arc::new(fonts),
        ..Options::default()
    }
}

/// The font, if any, for a character that some fonts lack.
type Found = HashMap<(char, Vec<ID>), Option<ID>>;

/// The machine's fonts, for characters that the program's own lacks. Looked for only then, since most
/// pictures need none.
fn others() -> FallbackSelectionFn<'static> {
    let find = FontResolver::default_fallback_selector();
    // Each search opens font after font, and the same characters come again.
    let found: Mutex<Option<Found>> = Mutex::new(None);
    Box::new(move |c, used, fonts| {
        let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
        let found = found.get_or_insert_with(|| {
            add_system_fonts(Arc::make_mut(fonts));
            Found::new()
        });
        *found.entry((c, used.to_vec())).or_insert_with(|| find(c, used, fonts))
    })
}

/// Plain ones first, since the first that has a character is taken.
fn add_system_fonts(fonts: &mut Database) {
    let mut system = Database::new();
    system.load_system_fonts();
    let mut faces: Vec<FaceInfo> = system.faces().cloned().collect();
    faces.sort_by_cached_key(|face| {
        let is_plain = face.style == Style::Normal
            && face.stretch == Stretch::Normal
            && face.weight == Weight::NORMAL
            && !face.monospaced;
        (!is_plain, face.post_script_name.clone())
    });
    for face in faces {
        fonts.push_face_info(face);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::svg::{Svg, Text};

    fn svg(text: &str, bold: bool) -> String {
        let mut svg = Svg::new(300.25, 40.0, "");
        svg.text(10.0, 25.0, Text { bold, ..Text::new(18.0) }, text);
        svg.finish()
    }

    fn pixels(svg: &str) -> Pixmap {
        Pixmap::decode_png(&png(svg).unwrap()).unwrap()
    }

    #[test]
    fn text_has_shapes_and_weight() {
        let [none, regular, bold, other] =
            [("", false), ("Rows", false), ("Rows", true), ("Bows", false)].map(|(t, b)| pixels(&svg(t, b)));
        assert_eq!((regular.width(), regular.height()), (601, 80));
        assert!(none.data().iter().all(|&byte| byte == 255), "white up to the edge");
        let ink = |of: &Pixmap| of.pixels().iter().map(|pixel| 255 - u64::from(pixel.green())).sum::<u64>();
        assert!(ink(&regular) > 50_000 && ink(&bold) > ink(&regular) * 5 / 4);
        assert_ne!(regular.data(), other.data());
    }

    /// Where a machine's fonts are not asked for, they cannot make a difference.
    #[test]
    fn common_scripts_need_no_font_of_the_machine() {
        let asked = |text: &str| {
            let asked = Arc::new(Mutex::new(String::new()));
            let of_closure = asked.clone();
            let mut options = options();
            options.font_resolver.select_fallback = Box::new(move |c, _, _| {
                of_closure.lock().unwrap().push(c);
                None
            });
            for bold in [false, true] {
                Tree::from_str(&svg(text, bold), &options).unwrap();
            }
            asked.lock().unwrap().clone()
        };
        for text in [
            "[CLS] ##ization 0.05 \u{2581}the \u{120}cat \u{10a} \u{fffd} \u{201e}Größe\u{201c} \u{2026} €",
            "façade naïve œuvre señor žluťoučký kůň łódź ığdır țară",
            "Ελληνικά ά, машина ждёт, її ґанок",
            "a \u{2192} b \u{2264} c \u{2212} 1",
        ] {
            assert_eq!(asked(text), "", "{text}");
        }
        assert_eq!(asked("\u{6ce8}"), "\u{6ce8}\u{6ce8}", "the test can fail");
        // Whatever the machine has for it.
        assert_eq!(
            png(&svg("\u{6ce8}\u{610f}", false)).unwrap(),
            png(&svg("\u{6ce8}\u{610f}", false)).unwrap()
        );
    }

    #[test]
    fn pictures_beyond_a_png_are_refused() {
        let line = |width, height| png(&Svg::new(width, height, "").finish()).unwrap_err().line();
        assert!(line(8192.1, 10.0).starts_with("16385 x 20 pixels: a PNG has 16384 a side"));
        assert!(line(10.0, 1e9).contains("take OUT.svg"));
        assert!(line(0.0, 10.0).contains("no size"));
        assert!(png("<svg").unwrap_err().line().starts_with("no PNG"));
        assert!(png("<svg/>").is_err());
        assert!(png(&Svg::new(8192.0, 1.0, "").finish()).is_ok());
    }
}
