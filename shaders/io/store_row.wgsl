// The row in workgroup memory, by quads.
fn store_row(to: u32, lane: u32) {
    for (var d = 4u * lane; d < WIDTH; d += 4u * LANES) {
        var x = vec4<f32>();
        for (var i = 0u; i < min(4u, WIDTH - d); i += 1u) {
            x = with_component(x, i, wg_row[d + i]);
        }
        store4_k(to, d, x);
    }
}
