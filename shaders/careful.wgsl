// The second look at an output that is not finite: 0 * NaN is NaN, so a NaN or an infinity in a
// value whose key is dropped must be stepped over, while one whose key is kept must spread.
// Four keys, as their weights lie, take one iteration: some drivers count them.
fn careful_value(weights_at: u32, visited: vec2<u32>, b: u32, kv_head: u32, len_k: u32, d: u32) -> vec4<f32> {
    var acc = vec4<f32>();
    for (var j = visited.x; j < visited.y; j += 4u) {
        let four = weights[(weights_at + j) / 4u];
        acc = careful_key(acc, four.x, b, kv_head, j, len_k, d);
        acc = careful_key(acc, four.y, b, kv_head, j + 1u, len_k, d);
        acc = careful_key(acc, four.z, b, kv_head, j + 2u, len_k, d);
        acc = careful_key(acc, four.w, b, kv_head, j + 3u, len_k, d);
    }
    return acc;
}

fn careful_key(acc: vec4<f32>, weight: f32, b: u32, kv_head: u32, j: u32, len_k: u32, d: u32) -> vec4<f32> {
    if j >= len_k || is_dropped_weight(weight) {
        return acc;
    }
    return fma(vec4<f32>(weight), load4_v(row_v(b, kv_head, j), d), acc);
}

// What `sum`, the rounded a + b, has not taken; exact whichever is larger (Knuth), so that adding it to nothing more
// changes nothing.
fn left_over(a: vec4<f32>, b: vec4<f32>, sum: vec4<f32>) -> vec4<f32> {
    // Zero, which no compiler can know: (a + b) - a is b to some of them, unless it is added between.
    let nought = f32((params.row_count >> 31u) != 0u);
    let taken = (sum + nought) - a;
    return (a - (sum - taken)) + (b - taken);
}
