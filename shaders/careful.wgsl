// The second look at an output that is not finite: 0 * NaN is NaN, so a NaN or an infinity in a
// value whose key is dropped must be stepped over, while one whose key is kept must spread.
fn careful_value(weights_at: u32, visited: vec2<u32>, b: u32, kv_head: u32, len_k: u32, d: u32) -> vec4<f32> {
    var acc = vec4<f32>();
    for (var j = visited.x; j < min(visited.y, len_k); j += 1u) {
        let weight = weights[(weights_at + j) / 4u][j % 4u];
        if !is_dropped_weight(weight) {
            acc = fma(vec4<f32>(weight), load4_v(row_v(b, kv_head, j), d), acc);
        }
    }
    return acc;
}
