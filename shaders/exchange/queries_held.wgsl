// A tile's queries, held in workgroup memory. A GPU spends as much on a load's address and bounds as on what it loads,
// and the products of a quad with four keys are few to pay for it.

// The rows of a thread; those of one that reads beside it begin in other banks.
const Q_STRIDE = ROWS * Q_QUADS + 1u;

var<workgroup> wg_q: array<vec4<f32>, ROW_LANES * Q_STRIDE>;

// A barrier has to follow. Rows past the end repeat the last one.
fn stage_q(thread: u32, owner: u32, row: u32) {
    for (var at = thread; at < TILE_Q * Q_QUADS; at += THREADS) {
        let own = min(row + at / Q_QUADS, owned_rows() - 1u);
        let query = query_row(head_of(owner, own), row_of(own));
        wg_q[at / (ROWS * Q_QUADS) + at] = load4_q(query, 4u * (at % Q_QUADS));
    }
}

// Quad `e` of row `r` of a thread's, which lies at `query`.
fn quad_of_q(row_lane: u32, r: u32, query: u32, e: u32) -> vec4<f32> {
    return wg_q[row_lane * Q_STRIDE + r * Q_QUADS + e];
}
