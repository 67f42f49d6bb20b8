// Rows go to their keys' places in a cache.
fn place_of(b: u32, h: u32, t: u32, position: u32) -> u32 {
    return row_k(b, h, position);
}
