// A tile's queries, each time from the caches.

fn stage_q(thread: u32, owner: u32, row: u32) {}

// Quad `e` of a row, of the tile and by where it lies.
fn quad_of_q(row: u32, query: u32, e: u32) -> vec4<f32> {
    return load4_q(query, 4u * e);
}
