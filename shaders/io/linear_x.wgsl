// Four neighbours of a row of x from element k on, which exists; those past the end are 0.
fn x4(row: u32, k: u32) -> vec4<f32> {
    return load4_x(params.x_offset + row * params.x_stride_s, k);
}
