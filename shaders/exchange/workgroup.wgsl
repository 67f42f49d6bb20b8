// What the LANES threads of a query row tell one another, through workgroup memory: any device can.

const P_SKEW = LANES + 1u;

var<workgroup> wg_p: array<vec4<f32>, TILE_Q * P_SKEW>;
var<workgroup> wg_mine: array<f32, TILE_Q * LANES>;

// Offers a number of lane `x` to the other lanes of its row (of the tile). A barrier has to follow.
fn offer(row: u32, x: u32, mine: f32) {
    wg_mine[row * LANES + x] = mine;
}

// The maximum, and the sum, of what a row's lanes have offered. `mine` is what this one has.
fn row_max(row: u32, mine: f32) -> f32 {
    var peak = DROPPED;
    for (var x = 0u; x < LANES; x += 1u) {
        peak = max(peak, wg_mine[row * LANES + x]);
    }
    return peak;
}

fn row_sum(row: u32, mine: f32) -> f32 {
    var sum = 0.0;
    for (var x = 0u; x < LANES; x += 1u) {
        sum += wg_mine[row * LANES + x];
    }
    return sum;
}

// Gives the weights of lane `x`. A barrier has to follow.
fn give_weights(row: u32, x: u32, mine: vec4<f32>) {
    wg_p[row * P_SKEW + x] = mine;
}

// The weights of lane `x` of a row. `mine` is what this lane gave.
fn weights_of(row: u32, x: u32, mine: vec4<f32>, place: Place) -> vec4<f32> {
    return wg_p[row * P_SKEW + x];
}
