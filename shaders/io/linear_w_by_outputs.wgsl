// W as [inputs, outputs]: a vector lies along the outputs.

// A quad of outputs at input k, 0 where that does not exist. Quads past the end repeat the last one, and
// outputs past the end in it are 0.
fn w4(quad: u32, k: u32) -> vec4<f32> {
    if !WHOLE && k >= params.inputs {
        return vec4<f32>();
    }
    return load4_w(params.w_offset + k * params.w_stride_d, 4u * min(quad, (params.outputs - 1u) / 4u));
}

// Inputs k to k + 3, a column each, of the outputs of a quad.
fn w_block(quad: u32, k: u32) -> mat4x4<f32> {
    return mat4x4<f32>(w4(quad, k), w4(quad, k + 1u), w4(quad, k + 2u), w4(quad, k + 3u));
}
