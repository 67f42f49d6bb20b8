// Writes a quad of y, if it exists.
fn end_quad(row: u32, quad: u32, sum: vec4<f32>) {
    let n = 4u * quad;
    if row < params.rows && n < params.outputs {
        store4_y(params.y_offset + row * params.y_stride_s, n, sum + bias4(row, n));
    }
}
