// A tile's queries, each time from the caches.

fn stage_q(thread: u32, owner: u32, row: u32) {}

// Quad `e` of row `r` of a thread's, which lies at `query`.
fn quad_of_q(row_lane: u32, r: u32, query: u32, e: u32) -> vec4<f32> {
    return load4_q(query, 4u * e);
}
