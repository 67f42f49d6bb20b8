// A tile's rows are those of all query heads that share a key-value head, one head after the other: with
// few queries a head, the group's share each key that is read. Chunks have whole groups.

// Owners of tiles, and rows of each.
fn owners() -> u32 {
    return params.head_count / params.group_size;
}

fn owned_rows() -> u32 {
    return params.row_count * params.group_size;
}

// The chunk's head, and its row, of an owner's row.
fn head_of(owner: u32, row: u32) -> u32 {
    return owner * params.group_size + row / params.row_count;
}

fn row_of(row: u32) -> u32 {
    return row % params.row_count;
}

// [first, end) of the queries among an owner's rows [row, row_end).
fn queries_of(row: u32, row_end: u32) -> vec2<u32> {
    return params.row_first + vec2<u32>(0u, params.row_count);
}
