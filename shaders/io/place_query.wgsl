// Rows stay those of the queries, wherever their keys go.
fn has_place(b: u32, count: u32, position: u32) -> bool {
    return true;
}

fn place_of(b: u32, h: u32, t: u32, position: u32) -> u32 {
    return row_k(b, h, t);
}
