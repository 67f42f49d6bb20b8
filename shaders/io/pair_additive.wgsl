// How projected queries and keys are compared, four neighbours of each at a time: v tanh(q' + k').
@group(0) @binding(BINDING) var<storage, read> OPERAND_data: array<f32>;

fn compared_dim() -> u32 {
    return params.hidden;
}

// The head of keys that query head `h` reads: the terms know which share theirs.
fn key_head(h: u32) -> u32 {
    return h;
}

// v from `d` on; 0 beyond its width.
fn pair_weights(h: u32, d: u32) -> vec4<f32> {
    let at = h * params.OPERAND_head_stride;
    var v = vec4<f32>();
    for (var e = 0u; e < 4u; e += 1u) {
        if d + e < params.hidden {
            v = with_component(v, e, OPERAND_data[at + d + e]);
        }
    }
    return v;
}

// A NaN goes round the polynomial.
fn tanh_of(x: f32) -> f32 {
    return select(tanh_accurate(x), x, is_nan(x));
}

fn pair(q: vec4<f32>, k: vec4<f32>, by: vec4<f32>) -> f32 {
    let x = q + k;
    return fma(by.x, tanh_of(x.x), fma(by.y, tanh_of(x.y), fma(by.z, tanh_of(x.z), by.w * tanh_of(x.w))));
}
