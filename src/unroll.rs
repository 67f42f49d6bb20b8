//! Unrolls a kernel's text. A software adapter's compiler keeps hundreds of values in registers and on
//! the stack if each has a name, but puts an array of them into memory that every lane gathers from; it
//! gives up unrolling loops long before that.

/// Expands the blocks of a text: between `//$ for i in A..B` and `//$ end`, on lines of their own, lines
/// are repeated with `$i` replaced. Bounds are numbers or names of `sizes`; blocks nest.
pub(crate) fn unroll(text: &str, sizes: &[(&str, u32)]) -> String {
    let mut out = String::new();
    expand(&mut text.lines(), sizes, &mut out);
    out
}

/// Expands up to the end of the block or the text.
fn expand<'a>(lines: &mut impl Iterator<Item = &'a str>, sizes: &[(&str, u32)], out: &mut String) {
    while let Some(line) = lines.next() {
        let Some(directive) = line.trim_start().strip_prefix("//$ ") else {
            out.push_str(line);
            out.push('\n');
            continue;
        };
        let words: Vec<_> = directive.split_whitespace().collect();
        let ["for", name, "in", range] = words[..] else { return };
        let mut block = String::new();
        expand(lines, sizes, &mut block);
        let bound = |text: &str| {
            let named = sizes.iter().find(|(name, _)| *name == text).map(|(_, size)| *size);
            named.or(text.parse().ok()).unwrap_or_default()
        };
        let (first, end) = range.split_once("..").unwrap_or_default();
        for i in bound(first)..bound(end) {
            out.push_str(&block.replace(&format!("${name}"), &i.to_string()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_nest_and_repeat() {
        let text = "a\n//$ for r in 0..ROWS\nr$r\n  //$ for i in 1..3\n  q$r_$i\n  //$ end\n//$ end\nb";
        assert_eq!(unroll(text, &[("ROWS", 2)]), "a\nr0\n  q0_1\n  q0_2\nr1\n  q1_1\n  q1_2\nb\n");
        assert_eq!(unroll("//$ for i in 1..N\nx\n//$ end\n", &[("N", 1)]), "");
    }
}
