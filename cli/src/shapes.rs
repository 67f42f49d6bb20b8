//! `BxHq[/Hkv]xSq[/Sk]xD[/Dv]`: how shapes are written on the command line and in tables.

use std::fmt;
use std::str::FromStr;

use wgpu_attention::AttentionProblem;

/// Sizes of one attention call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) batch: usize,
    pub(crate) heads_q: usize,
    pub(crate) heads_kv: usize,
    pub(crate) seq_q: usize,
    pub(crate) seq_kv: usize,
    pub(crate) head_dim: usize,
    pub(crate) head_dim_v: usize,
}

impl Shape {
    /// The problem of this shape, everything else by default.
    pub(crate) fn problem(&self) -> AttentionProblem {
        AttentionProblem::new(
            self.batch,
            self.heads_q,
            self.heads_kv,
            self.seq_q,
            self.seq_kv,
            self.head_dim,
            self.head_dim_v,
        )
    }

    /// The shape of a problem.
    pub(crate) fn of(p: &AttentionProblem) -> Self {
        Self {
            batch: p.batch,
            heads_q: p.heads_q,
            heads_kv: p.heads_kv,
            seq_q: p.seq_q,
            seq_kv: p.seq_kv,
            head_dim: p.head_dim,
            head_dim_v: p.head_dim_v,
        }
    }
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str = "want BxHq[/Hkv]xSq[/Sk]xD[/Dv], for instance 1x8x2048x64 or 1x32/8x1/4096x128";
        let number = |text: &str| -> Result<usize, String> {
            match text.trim().parse() {
                Ok(n) => Ok(n),
                Err(_) => Err(format!("'{text}' is not a size; {FORM}")),
            }
        };
        let pair = |text: &str| -> Result<(usize, usize), String> {
            match text.split_once('/') {
                Some((a, b)) => Ok((number(a)?, number(b)?)),
                None => number(text).map(|n| (n, n)),
            }
        };
        let parts: Vec<&str> = text.trim().split(['x', 'X']).collect();
        let &[b, h, s, d] = parts.as_slice() else {
            return Err(format!("{} sizes; {FORM}", parts.len()));
        };
        let ((heads_q, heads_kv), (seq_q, seq_kv), (head_dim, head_dim_v)) = (pair(h)?, pair(s)?, pair(d)?);
        let shape = Self { batch: number(b)?, heads_q, heads_kv, seq_q, seq_kv, head_dim, head_dim_v };
        shape.problem().validate().map_err(|error| error.to_string())?;
        Ok(shape)
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pair = |a: usize, b: usize| if a == b { a.to_string() } else { format!("{a}/{b}") };
        let (heads, seq) = (pair(self.heads_q, self.heads_kv), pair(self.seq_q, self.seq_kv));
        let text = format!("{}x{heads}x{seq}x{}", self.batch, pair(self.head_dim, self.head_dim_v));
        f.pad(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_read_as_they_print() {
        for text in ["1x8x2048x64", "2x32/8x1/4096x128", "1x1x1x1/256", "0x1x0/3x4"] {
            assert_eq!(text.parse::<Shape>().unwrap().to_string(), text);
        }
        assert_eq!("1x8/8x5/5x4".parse::<Shape>().unwrap().to_string(), "1x8x5x4");
    }

    #[test]
    fn bad_shapes_say_why() {
        for text in
            ["", "1x2x3", "1x2x3x4x5", "1x8/3x4x4", "axbxcxd", "1x-1x3x4", "1x0x3x4", "1x1x1x99999999999"]
        {
            assert!(text.parse::<Shape>().is_err(), "{text}");
        }
        assert!("99999999999999999999x1x1x1".parse::<Shape>().unwrap_err().contains("not a size"));
    }
}
