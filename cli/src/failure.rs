//! How the program ends when something is wrong: one line on stderr and an exit code.

use std::fmt::Display;

/// An error that the user sees as one line.
#[derive(Debug)]
pub(crate) struct Failure {
    /// 2 for bad input or a machine that cannot do what was asked, 1 for results out of budget.
    pub(crate) code: u8,
    line: String,
}

/// `Result` with a [`Failure`].
pub(crate) type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    /// Bad input, or a machine that cannot do what was asked.
    pub(crate) fn input(what: impl Display) -> Self {
        Self { code: 2, line: what.to_string() }
    }

    /// A result is further from the oracle than its budget.
    pub(crate) fn budget(what: impl Display) -> Self {
        Self { code: 1, line: what.to_string() }
    }

    /// The same failure with what it is about in front.
    pub(crate) fn about(self, subject: impl Display) -> Self {
        Self { line: format!("{subject}: {}", self.line), ..self }
    }

    /// The line, without whatever control characters a file or driver smuggled in.
    pub(crate) fn line(&self) -> String {
        const LONGEST: usize = 600;
        let words: Vec<&str> =
            self.line.split(|c: char| c.is_control() || c == ' ').filter(|word| !word.is_empty()).collect();
        let line = words.join(" ");
        if line.chars().count() <= LONGEST {
            return line;
        }
        line.chars().take(LONGEST).chain(" ...".chars()).collect()
    }
}

impl From<wgpu_attention::Error> for Failure {
    fn from(error: wgpu_attention::Error) -> Self {
        Self::input(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_one_line() {
        let failure = Failure::input("bad\nname \x1b[31m").about("file\r");
        assert_eq!(failure.line(), "file : bad name [31m");
        assert!(Failure::input("x".repeat(10_000)).line().len() < 700);
    }
}
