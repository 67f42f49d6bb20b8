// What the SHARE threads of a quad that are neighbours have, together: they lie NEXT threads apart in one
// subgroup. Each exchange doubles whom it covers.
fn shared_sum(mine: vec4<f32>) -> vec4<f32> {
    var sum = mine;
    for (var reach = NEXT; reach < NEXT * SHARE; reach *= 2u) {
        sum += subgroupShuffleXor(sum, reach);
    }
    return sum;
}
