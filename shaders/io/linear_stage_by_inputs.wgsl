// W's tile in workgroup memory, a vector along the inputs. Outputs 4 x to 4 x + 3 are one thread's, so they
// lie SIDE_X rows apart: neighbouring threads read neighbouring rows, which begin in different banks.
var<workgroup> wg_w: array<vec4<f32>, 4u * SIDE_X * SKEW>;

fn stage_w(at: u32, first_quad: u32, k: u32) {
    let n = at / STEP;
    let e = at % STEP;
    var w = vec4<f32>();
    if k + 4u * e < params.inputs {
        w = w4(4u * first_quad + n, k + 4u * e);
    }
    wg_w[(n % 4u * SIDE_X + n / 4u) * SKEW + e] = w;
}

fn staged_w(x: u32, e: u32) -> mat4x4<f32> {
    return transpose(mat4x4<f32>(
        wg_w[x * SKEW + e],
        wg_w[(SIDE_X + x) * SKEW + e],
        wg_w[(2u * SIDE_X + x) * SKEW + e],
        wg_w[(3u * SIDE_X + x) * SKEW + e],
    ));
}
