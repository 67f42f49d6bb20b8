// The keys in several parts, a dispatch each, whose sums are carried from one to the next: no thread
// then loops so often that a driver's watchdog, or lavapipe's limit of 65535 iterations, cuts it off.
@group(0) @binding(14) var<storage, read> inverse_sums: array<f32>;
@group(0) @binding(16) var<storage, read_write> carried: array<vec4<f32>>;

fn own_part(visited: vec2<u32>) -> vec2<u32> {
    return clamp(visited, vec2<u32>(params.key_first), vec2<u32>(params.key_end));
}

// Carries on, or at last stores, a quad of the chunk's row `index`; its output row begins at `at`.
fn finish_value(index: u32, at: u32, d: u32, sum: vec4<f32>) {
    let place = index * div_ceil(params.head_dim_v, 4u) + d / 4u;
    var total = sum;
    if params.key_first > 0u {
        total += carried[place];
    }
    if params.key_end == 0xffffffffu {
        store4_o(at, d, total * inverse_sums[index]);
    } else {
        carried[place] = total;
    }
}
