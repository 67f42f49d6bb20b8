// A tile's own rows, held in workgroup memory: see exchange/queries_held.wgsl.

// Rows that are read side by side, by a quarter of a warp, begin in different banks.
const A_SKEW = A_QUADS + select(0u, 1u, LANES < 8u);
//$ for n in 0..OF_SCORES
const B_SKEW = B_QUADS + select(0u, 1u, LANES < 8u);
//$ end

var<workgroup> wg_own_a: array<vec4<f32>, TILE * A_SKEW>;
//$ for n in 0..OF_SCORES
var<workgroup> wg_own_b: array<vec4<f32>, TILE * B_SKEW>;
//$ end

// A barrier has to follow. Rows past the last one repeat it.
fn stage_own(thread: u32, b: u32, head: u32, first: u32, last: u32) {
    for (var at = thread; at < TILE * A_QUADS; at += THREADS) {
        let own = own_a(b, head, min(first + at / A_QUADS, last));
        wg_own_a[at / A_QUADS * A_SKEW + at % A_QUADS] = load_own_a(own, 4u * (at % A_QUADS));
    }
    //$ for n in 0..OF_SCORES
    for (var at = thread; at < TILE * B_QUADS; at += THREADS) {
        let own = own_b(b, head, min(first + at / B_QUADS, last));
        wg_own_b[at / B_QUADS * B_SKEW + at % B_QUADS] = load_own_b(own, 4u * (at % B_QUADS));
    }
    //$ end
}

// Quad `e` of a row, of the tile and by where it lies.
fn own_quad_a(row: u32, at: u32, e: u32) -> vec4<f32> {
    return wg_own_a[row * A_SKEW + e];
}

//$ for n in 0..OF_SCORES
fn own_quad_b(row: u32, at: u32, e: u32) -> vec4<f32> {
    return wg_own_b[row * B_SKEW + e];
}
//$ end
