// What the LANES threads of a query row tell one another, by subgroup operations: no workgroup memory,
// and no barrier. LANES is a power of two and at most the device's smallest subgroup; which size a
// subgroup has is asked at run time (shaders/exchange/place_subgroup.wgsl). Rows are made of neighbours in a
// subgroup.

fn offer(row: u32, x: u32, mine: f32) {}

// The maximum, and the sum, of what a row's lanes have: each exchange doubles whom it covers.
fn row_max(row: u32, mine: f32) -> f32 {
    var peak = mine;
    for (var reach = 1u; reach < LANES; reach *= 2u) {
        peak = max(peak, subgroupShuffleXor(peak, reach));
    }
    return peak;
}

fn row_sum(row: u32, mine: f32) -> f32 {
    var sum = mine;
    for (var reach = 1u; reach < LANES; reach *= 2u) {
        sum += subgroupShuffleXor(sum, reach);
    }
    return sum;
}

fn give_weights(row: u32, x: u32, mine: vec4<f32>) {}

// The weights of lane `x` of a row. `mine` is what this lane gave.
fn weights_of(row: u32, x: u32, mine: vec4<f32>, place: Place) -> vec4<f32> {
    return subgroupShuffle(mine, place.lane / LANES * LANES + x);
}
