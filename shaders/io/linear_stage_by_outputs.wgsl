// W's tile in workgroup memory, a vector along the outputs.
var<workgroup> wg_w: array<vec4<f32>, 4u * SIDE_X * STEP>;

fn stage_w(at: u32, first_quad: u32, k: u32) {
    var w = vec4<f32>();
    if k + at / SIDE_X < params.inputs {
        w = w4(first_quad + at % SIDE_X, k + at / SIDE_X);
    }
    wg_w[at] = w;
}

fn staged_w(x: u32, e: u32) -> mat4x4<f32> {
    let at = 4u * e * SIDE_X + x;
    return mat4x4<f32>(wg_w[at], wg_w[at + SIDE_X], wg_w[at + 2u * SIDE_X], wg_w[at + 3u * SIDE_X]);
}
