// A tile's own rows, held in workgroup memory: see exchange/queries_held.wgsl.

const A_STRIDE = ROWS * A_QUADS + 1u;
//$ for n in 0..OF_SCORES
const B_STRIDE = ROWS * B_QUADS + 1u;
//$ end

var<workgroup> wg_own_a: array<vec4<f32>, ROW_LANES * A_STRIDE>;
//$ for n in 0..OF_SCORES
var<workgroup> wg_own_b: array<vec4<f32>, ROW_LANES * B_STRIDE>;
//$ end

// A barrier has to follow. Rows past the last one repeat it.
fn stage_own(thread: u32, b: u32, head: u32, first: u32, last: u32) {
    // Turns that all threads take alike, as in shaders/kernel/linear_tile.wgsl.
    for (var round = 0u; round < TILE * A_QUADS; round += THREADS) {
        let at = round + thread;
        if at < TILE * A_QUADS {
            let own = own_a(b, head, min(first + at / A_QUADS, last));
            wg_own_a[at / (ROWS * A_QUADS) + at] = load_own_a(own, 4u * (at % A_QUADS));
        }
    }
    //$ for n in 0..OF_SCORES
    for (var round = 0u; round < TILE * B_QUADS; round += THREADS) {
        let at = round + thread;
        if at < TILE * B_QUADS {
            let own = own_b(b, head, min(first + at / B_QUADS, last));
            wg_own_b[at / (ROWS * B_QUADS) + at] = load_own_b(own, 4u * (at % B_QUADS));
        }
    }
    //$ end
}

// Quad `e` of row `r` of a thread's, which lies at `at`.
fn own_quad_a(row_lane: u32, r: u32, at: u32, e: u32) -> vec4<f32> {
    return wg_own_a[row_lane * A_STRIDE + r * A_QUADS + e];
}

//$ for n in 0..OF_SCORES
fn own_quad_b(row_lane: u32, r: u32, at: u32, e: u32) -> vec4<f32> {
    return wg_own_b[row_lane * B_STRIDE + r * B_QUADS + e];
}
//$ end
