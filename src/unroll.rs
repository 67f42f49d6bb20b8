//! Unrolls a kernel's text. A software adapter's compiler keeps hundreds of values in registers and on
//! the stack if each has a name, but puts an array of them into memory that every lane gathers from; it
//! gives up unrolling loops long before that.

use std::ops::Range;

/// Expands the blocks of a text: between `//$ for i in A..B` and `//$ end`, on lines of their own, lines
/// are repeated with `$i` replaced. A and B are sums of products of numbers, names of `sizes` and outer
/// variables; `below C` cuts the range off. Blocks nest.
pub(crate) fn unroll(text: &str, sizes: &[(&str, u32)]) -> String {
    let mut out = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let Some((name, range)) = directive(line, sizes) else {
            out.push_str(line);
            out.push('\n');
            continue;
        };
        let block = block(&mut lines);
        for i in range {
            out.push_str(&unroll(&block.replace(&format!("${name}"), &i.to_string()), sizes));
        }
    }
    out
}

/// The variable and the range of a line that opens a block.
fn directive<'a>(line: &'a str, sizes: &[(&str, u32)]) -> Option<(&'a str, Range<u32>)> {
    let number = |text: &str| {
        let named = sizes.iter().find(|(name, _)| *name == text).map(|(_, size)| *size);
        named.or(text.parse().ok()).unwrap_or_default()
    };
    let bound = |text: &str| -> u32 {
        text.split('+').map(|product| product.split('*').map(number).product::<u32>()).sum()
    };
    let words: Vec<_> = line.trim_start().strip_prefix("//$ for ")?.split_whitespace().collect();
    let (name, range, below) = match words[..] {
        [name, "in", range] => (name, range, u32::MAX),
        [name, "in", range, "below", below] => (name, range, bound(below)),
        _ => return None,
    };
    let (first, end) = range.split_once("..")?;
    Some((name, bound(first)..bound(end).min(below)))
}

/// The lines up to the end of the block.
fn block<'a>(lines: &mut impl Iterator<Item = &'a str>) -> String {
    let mut out = String::new();
    let mut depth = 1;
    for line in lines {
        match line.trim_start() {
            "//$ end" => depth -= 1,
            start if start.starts_with("//$ for ") => depth += 1,
            _ => {}
        }
        if depth == 0 {
            break;
        }
        out.push_str(line);
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_nest_and_repeat() {
        let text = "a\n//$ for r in 0..ROWS\nr$r\n  //$ for i in 1..3\n  q$r_$i\n  //$ end\n//$ end\nb";
        assert_eq!(unroll(text, &[("ROWS", 2)]), "a\nr0\n  q0_1\n  q0_2\nr1\n  q1_1\n  q1_2\nb\n");
        assert_eq!(unroll("//$ for i in 1..N\nx\n//$ end\n", &[("N", 1)]), "");
        let rounds = "//$ for g in 0..2\n[\n//$ for n in $g*N..$g*N+N below 5\nx$n\n//$ end\n]\n//$ end\n";
        assert_eq!(unroll(rounds, &[("N", 3)]), "[\nx0\nx1\nx2\n]\n[\nx3\nx4\n]\n");
    }
}
