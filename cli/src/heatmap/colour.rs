//! From a weight to a colour.

/// Steps between the lightest and the darkest colour.
pub(crate) const LEVELS: usize = 64;
/// A weight of exactly 0: of a key that a mask excludes, or whose score lies far below another.
pub(crate) const NOTHING: &str = "#f3f4f6";
/// A NaN.
pub(crate) const NO_NUMBER: &str = "#e11d48";

/// The colour map mako of seaborn (Waskom 2021), light to dark: evenly spaced to the eye, and its
/// lightness alone tells the order.
const ANCHORS: [[u8; 3]; 8] = [
    [0xde, 0xf5, 0xe5],
    [0x8b, 0xda, 0xb2],
    [0x40, 0xb7, 0xad],
    [0x34, 0x8f, 0xa7],
    [0x37, 0x65, 0x9e],
    [0x41, 0x3d, 0x7b],
    [0x2e, 0x1e, 0x3b],
    [0x0b, 0x04, 0x05],
];

/// Where a weight stands on the scale, 0 to 1. The square root gives room to the small weights
/// that most heads are made of.
pub(crate) fn position(weight: f32, largest: f32) -> f64 {
    if largest > 0.0 { f64::from(weight / largest).clamp(0.0, 1.0).sqrt() } else { 0.0 }
}

/// The step of a position.
pub(crate) fn level(position: f64) -> usize {
    ((position * (LEVELS - 1) as f64).round() as usize).min(LEVELS - 1)
}

/// The scale as stops of a gradient, by position.
pub(crate) fn stops() -> impl Iterator<Item = (f64, String)> {
    let hex = |[r, g, b]: [u8; 3]| format!("#{r:02x}{g:02x}{b:02x}");
    ANCHORS
        .into_iter()
        .enumerate()
        .map(move |(i, anchor)| (i as f64 / (ANCHORS.len() - 1) as f64, hex(anchor)))
}

/// The colour of a step.
pub(crate) fn colour(level: usize) -> String {
    let at = level.min(LEVELS - 1) as f64 / (LEVELS - 1) as f64 * (ANCHORS.len() - 1) as f64;
    let below = (at as usize).min(ANCHORS.len() - 2);
    let part = at - below as f64;
    let mix = |i: usize| {
        let (a, b) = (f64::from(ANCHORS[below][i]), f64::from(ANCHORS[below + 1][i]));
        (a + (b - a) * part).round() as u8
    };
    format!("#{:02x}{:02x}{:02x}", mix(0), mix(1), mix(2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_ends_at_its_anchors() {
        assert_eq!((colour(0), colour(LEVELS - 1)), ("#def5e5".into(), "#0b0405".into()));
        assert_eq!((position(0.25, 1.0), position(2.0, 1.0), position(1.0, 0.0)), (0.5, 1.0, 0.0));
        assert_eq!((level(0.0), level(1.0)), (0, LEVELS - 1));
    }

    #[test]
    fn darker_means_more() {
        let light = |level| {
            let text = colour(level);
            (1..7).step_by(2).map(|i| u32::from_str_radix(&text[i..i + 2], 16).unwrap()).sum::<u32>()
        };
        assert!((1..LEVELS).all(|i| light(i) < light(i - 1)));
    }
}
