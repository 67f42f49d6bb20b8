// W as [outputs, inputs]: a vector lies along the inputs.

// Four neighbours of output n's row from input k on, which exists; those past the end are 0. Outputs past
// the end repeat the last one.
fn w4(n: u32, k: u32) -> vec4<f32> {
    return load4_w(params.w_offset + min(n, params.outputs - 1u) * params.w_stride_s, k);
}

// Inputs k to k + 3, a column each, of the outputs of a quad.
fn w_block(quad: u32, k: u32) -> mat4x4<f32> {
    let n = 4u * quad;
    return transpose(mat4x4<f32>(w4(n, k), w4(n + 1u, k), w4(n + 2u, k), w4(n + 3u, k)));
}
