//! Covering arrays: few rows in which every two values of every two axes meet.

use std::collections::HashSet;

use super::rng::Rng;

/// Rows over axes with `sizes[i]` values each, such that every pair of values of two axes is in
/// some row (greedy, after AETG, Cohen 1997). The same seed gives the same rows.
pub fn covering(sizes: &[usize], seed: u64) -> Vec<Vec<usize>> {
    let mut rng = Rng::new(seed);
    // A pair is named by its two axes and values, the lower axis first.
    let name = |a: usize, x: usize, b: usize, y: usize| if a < b { (a, x, b, y) } else { (b, y, a, x) };
    let mut open = HashSet::new();
    let mut order = Vec::new();
    for b in 0..sizes.len() {
        for a in 0..b {
            for (x, y) in (0..sizes[a]).flat_map(|x| (0..sizes[b]).map(move |y| (x, y))) {
                open.insert((a, x, b, y));
                order.push((a, x, b, y));
            }
        }
    }
    rng.shuffle(&mut order);

    let mut rows = Vec::new();
    while let Some(pair) = order.pop() {
        if !open.contains(&pair) {
            continue;
        }
        // Each row starts from one pair that is still open and is filled axis by axis with the
        // value that closes most pairs; the best of a few random fillings is kept.
        let (a, x, b, y) = pair;
        let mut best: (usize, Vec<usize>) = (0, Vec::new());
        for _ in 0..4 {
            let mut row = vec![usize::MAX; sizes.len()];
            (row[a], row[b]) = (x, y);
            let mut axes: Vec<usize> = (0..sizes.len()).filter(|&axis| axis != a && axis != b).collect();
            rng.shuffle(&mut axes);
            let mut closed = 1;
            for axis in axes {
                let gain = |value: usize| {
                    (0..sizes.len())
                        .filter(|&other| {
                            row[other] != usize::MAX && open.contains(&name(axis, value, other, row[other]))
                        })
                        .count()
                };
                let start = rng.below(sizes[axis]);
                let (value, gain) = (0..sizes[axis])
                    .map(|i| (start + i) % sizes[axis])
                    .map(|value| (value, gain(value)))
                    .max_by_key(|&(_, gain)| gain)
                    .expect("an axis has a value");
                row[axis] = value;
                closed += gain;
            }
            if closed > best.0 {
                best = (closed, row);
            }
        }
        let row = best.1;
        for b in 0..row.len() {
            for a in 0..b {
                open.remove(&(a, row[a], b, row[b]));
            }
        }
        rows.push(row);
    }
    assert!(open.is_empty());
    rows
}
