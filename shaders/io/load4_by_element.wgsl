// Four neighbours along the innermost dimension; those at and beyond its width are 0.
fn load4_OPERAND(at: u32, d: u32) -> vec4<f32> {
    let step = params.OPERAND_stride_d;
    let index = at + d * step;
    var x = vec4<f32>(load1_OPERAND(index), 0.0, 0.0, 0.0);
    if d + 1u < params.WIDTH {
        x.y = load1_OPERAND(index + step);
    }
    if d + 2u < params.WIDTH {
        x.z = load1_OPERAND(index + 2u * step);
    }
    if d + 3u < params.WIDTH {
        x.w = load1_OPERAND(index + 3u * step);
    }
    return x;
}
