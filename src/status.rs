//! What only the GPU can find wrong.

/// Bits of the word that [`Operands::status`](crate::Operands::status) receives: numbers on the GPU that no
/// error could name beforehand. What they would have reached beyond is clamped, never read or written.
///
/// The word gains bits and loses none: clear it before the calls that it is to report on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Status(
    /// The word, as it was read back.
    pub u32,
);

impl Status {
    /// A key length was beyond the capacity: the keys up to the capacity count.
    pub const LENGTH: u32 = 1;
    /// The block table named a page that does not exist: the entry's keys end before it.
    pub const BLOCK: u32 = 2;
    /// Offsets of ragged sequences decreased, left the rows that exist, or made an entry longer than the
    /// problem states: such an entry is cut, or empty.
    pub const RAGGED: u32 = 4;
    /// A new key had no place, in a full cache or in a page that does not exist: it was not written.
    pub const FULL: u32 = 8;

    /// Whether nothing was wrong.
    pub const fn is_ok(self) -> bool {
        self.0 == 0
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let said: Vec<_> = [
            (Self::LENGTH, "a key length beyond the capacity"),
            (Self::BLOCK, "a page that does not exist"),
            (Self::RAGGED, "offsets of ragged sequences that decrease or reach too far"),
            (Self::FULL, "a new key without a place"),
        ]
        .into_iter()
        .filter(|(bit, _)| self.0 & bit != 0)
        .map(|(_, what)| what)
        .collect();
        f.write_str(if said.is_empty() { "nothing wrong" } else { "" })?;
        f.write_str(&said.join(", "))
    }
}
