// A tile's own rows, each time from the caches.

fn stage_own(thread: u32, b: u32, head: u32, first: u32, last: u32) {}

// Quad `e` of row `r` of a thread's, which lies at `at`.
fn own_quad_a(row_lane: u32, r: u32, at: u32, e: u32) -> vec4<f32> {
    return load_own_a(at, 4u * e);
}

//$ for n in 0..OF_SCORES
fn own_quad_b(row_lane: u32, r: u32, at: u32, e: u32) -> vec4<f32> {
    return load_own_b(at, 4u * e);
}
//$ end
