// Four neighbours along the innermost dimension; those at and beyond its width are left out.
fn store4_OPERAND(at: u32, d: u32, x: vec4<f32>) {
    let step = params.OPERAND_stride_d;
    let index = at + d * step;
    store1_OPERAND(index, x.x);
    if d + 1u < params.WIDTH {
        store1_OPERAND(index + step, x.y);
    }
    if d + 2u < params.WIDTH {
        store1_OPERAND(index + 2u * step, x.z);
    }
    if d + 3u < params.WIDTH {
        store1_OPERAND(index + 3u * step, x.w);
    }
}
