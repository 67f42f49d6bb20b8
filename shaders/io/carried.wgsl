// Where row `row` of what is carried from one kernel to another begins: (m, l, 0, 0), then the quads of O, not
// divided by l. Splits have rows of their own, one split after the other.
fn carried_row(row: u32) -> u32 {
    return row * (div_ceil(params.head_dim_v, 4u) + 1u);
}
