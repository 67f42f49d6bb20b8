// W's tile in workgroup memory, a row of outputs for each input.
const W_STRIDE = TILE_OUTPUTS / 4u + 2u;

const SIZE_w = STEP * W_STRIDE;

fn stage_w(at: u32, first_quad: u32, k: u32) {
    let e = at / (TILE_OUTPUTS / 4u);
    let quad = at % (TILE_OUTPUTS / 4u);
    var w = vec4<f32>();
    if k + e < params.inputs {
        w = w4(first_quad + quad, k + e);
    }
    put_w(e * W_STRIDE + quad, vec4<f16>(w));
}

// Where the fragment of outputs from `n` on and inputs from `e` on begins.
fn w_at(n: u32, e: u32) -> u32 {
    return e * W_STRIDE + n / 4u;
}
