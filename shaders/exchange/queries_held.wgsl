// A tile's queries, held in workgroup memory. A GPU spends as much on a load's address and bounds as on what it loads,
// and the products of a quad with four keys are few to pay for it.

// Rows that are read side by side, by a quarter of a warp, begin in different banks.
const Q_SKEW = Q_QUADS + select(0u, 1u, LANES < 8u);

var<workgroup> wg_q: array<vec4<f32>, TILE_Q * Q_SKEW>;

// A barrier has to follow. Rows past the end repeat the last one.
fn stage_q(thread: u32, owner: u32, row: u32) {
    for (var at = thread; at < TILE_Q * Q_QUADS; at += THREADS) {
        let own = min(row + at / Q_QUADS, owned_rows() - 1u);
        let query = query_row(head_of(owner, own), row_of(own));
        wg_q[at / Q_QUADS * Q_SKEW + at % Q_QUADS] = load4_q(query, 4u * (at % Q_QUADS));
    }
}

// Quad `e` of a row, of the tile and by where it lies.
fn quad_of_q(row: u32, query: u32, e: u32) -> vec4<f32> {
    return wg_q[row * Q_SKEW + e];
}
