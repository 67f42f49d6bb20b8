// A tile's rows are those of one head. (shaders/io/rows_packed.wgsl is the other way.)

// Owners of tiles, and rows of each.
fn owners() -> u32 {
    return params.head_count;
}

fn owned_rows() -> u32 {
    return params.row_count;
}

// The chunk's head, and its row, of an owner's row.
fn head_of(owner: u32, row: u32) -> u32 {
    return owner;
}

fn row_of(row: u32) -> u32 {
    return row;
}

// [first, end) of the queries among an owner's rows [row, row_end).
fn queries_of(row: u32, row_end: u32) -> vec2<u32> {
    return params.row_first + vec2<u32>(row, row_end);
}
