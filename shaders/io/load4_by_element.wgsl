// Four neighbours along the innermost dimension; those at and beyond its width are 0. (They are read where the last one
// lies: a branch around each is slower, and takes compilers longer.)
fn load4_OPERAND(at: u32, d: u32) -> vec4<f32> {
    let last = params.WIDTH - 1u;
    let own = vec4<u32>(d, d + 1u, d + 2u, d + 3u);
    let index = at + min(own, vec4<u32>(last)) * params.OPERAND_stride_d;
    let x = vec4<f32>(load1_OPERAND(index.x), load1_OPERAND(index.y), load1_OPERAND(index.z), load1_OPERAND(index.w));
    return select(vec4<f32>(), x, own <= vec4<u32>(last));
}
