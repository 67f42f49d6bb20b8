// Rows stay where they are. Row t stands at position t, behind as many as come before the first.
fn read_kv_lens(b: u32) -> u32 {
    return query_count(b);
}

fn position_of(b: u32, t: u32, count: u32, length: u32) -> u32 {
    return params.row_first + t;
}
