//! The page: one file with its weights inside, where pointing at a token shows what it attends to.

use serde_json::json;

use super::{Picture, colour};
use crate::failure::{Failure, Result};
use crate::svg::escape;

const PAGE: &str = include_str!("page.html");
/// A byte each, four thirds of one in the file: what a browser still opens at once.
const MAX_WEIGHTS: usize = 1 << 25;

/// The whole file.
pub(super) fn page(picture: &Picture) -> Result<String> {
    let (queries, keys) = (picture.queries, picture.keys);
    if queries > keys {
        let why =
            format!("{queries} queries over {keys} keys: a page shows a sequence over itself; take OUT.svg");
        return Err(Failure::input(why));
    }
    let count: usize = picture.weights.iter().map(Vec::len).sum();
    if count > MAX_WEIGHTS {
        let why = format!("{count} weights, a page holds {MAX_WEIGHTS} at most; --layer and --head choose");
        return Err(Failure::input(why));
    }
    let tokens = picture.key_labels.clone().unwrap_or_else(|| (0..keys).map(|i| i.to_string()).collect());
    let data = json!({
        "tokens": tokens,
        "queries": queries,
        "keys": keys,
        "layers": picture.layers,
        "heads": picture.heads,
        "colours": colour::stops().map(|(_, colour)| colour).collect::<Vec<_>>(),
        "weights": picture.weights.iter().map(|of| base64(&steps(of))).collect::<Vec<_>>(),
    });
    // No text of a token may end the element that it stands in.
    let data = data.to_string().replace('<', "\\u003c");
    // What is put in last may hold the names of the others.
    Ok(PAGE
        .replace("@SUBTITLE@", &escape(&picture.subtitle))
        .replace("@TITLE@", &escape(&picture.title).replace('@', "&#64;"))
        .replace("@DATA@", &data))
}

/// Weights as square roots in steps of 1/255, which leaves the small ones their differences. A step of 0 is a
/// weight of exactly 0: a key that a mask excludes.
fn steps(weights: &[f32]) -> Vec<u8> {
    let step = |weight: f32| match weight {
        0.0 => 0,
        // A NaN shows as if it were the smallest; the page says that there is one.
        weight => (colour::position(weight, 1.0) * 255.0).round().max(1.0) as u8,
    };
    weights.iter().map(|&weight| step(weight)).collect()
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let word = (0..3).fold(0, |word, i| word << 8 | u32::from(three.get(i).copied().unwrap_or(0)));
        for digit in 0..4 {
            let there = digit <= three.len();
            text.push(if there { DIGITS[(word >> (18 - 6 * digit)) as usize & 63] as char } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_written_in_base64() {
        let text = |bytes: &[u8]| base64(bytes);
        assert_eq!(
            [text(b""), text(b"f"), text(b"fo"), text(b"foo"), text(b"foob"), text(&[255; 3])],
            ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg==", "////"]
        );
    }

    #[test]
    fn small_weights_keep_their_differences() {
        assert_eq!(steps(&[0.0, 1e-9, 0.04, 0.25, 1.0, 1.5, f32::NAN]), [0, 1, 51, 128, 255, 255, 1]);
    }
}
