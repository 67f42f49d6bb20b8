// W's tile in workgroup memory, a row of inputs for each output. Read as columns it is W^T.
const W_STRIDE = STEP / 4u + 2u;

const SIZE_w = TILE_OUTPUTS * W_STRIDE;

fn stage_w(at: u32, first_quad: u32, k: u32) {
    let n = at / (STEP / 4u);
    let e = at % (STEP / 4u);
    var w = vec4<f32>();
    if k + 4u * e < params.inputs {
        w = w4(4u * first_quad + n, k + 4u * e);
    }
    put_w(n * W_STRIDE + e, vec4<f16>(w));
}

// Where the fragment of outputs from `n` on and inputs from `e` on begins.
fn w_at(n: u32, e: u32) -> u32 {
    return n * W_STRIDE + e / 4u;
}
