// Row t stands at position t, behind as many as come before the first.
fn position_of(b: u32, t: u32, count: u32) -> u32 {
    return params.row_first + t;
}
