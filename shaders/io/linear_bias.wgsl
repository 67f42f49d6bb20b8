// What is added to a quad of y.
fn bias4(row: u32, n: u32) -> vec4<f32> {
    let at = params.bias_offset + row * params.bias_stride_s;
    let last = params.outputs - 1u;
    return vec4<f32>(
        load1_bias(at + n * params.bias_stride_d),
        load1_bias(at + min(n + 1u, last) * params.bias_stride_d),
        load1_bias(at + min(n + 2u, last) * params.bias_stride_d),
        load1_bias(at + min(n + 3u, last) * params.bias_stride_d),
    );
}
