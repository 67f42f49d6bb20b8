// The caller says at which position each row stands: one that the table of angles does not have counts as its last.
fn position_of(b: u32, t: u32, count: u32) -> u32 {
    return read_positions(token_of(b, t));
}
