// Rows stay where they are, and the caller says at which position each stands: one that the table of angles does
// not have counts as its last.
fn read_kv_lens(b: u32) -> u32 {
    return query_count(b);
}

fn position_of(b: u32, t: u32, count: u32, length: u32) -> u32 {
    return read_positions(token_of(b, t));
}
