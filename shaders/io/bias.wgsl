fn load_bias(b: u32, h: u32, i: u32, j: u32) -> f32 {
    return load1_bias(row_bias(b, h, i) + j * params.bias_stride_d);
}

// A bias of -inf excludes the pair.
fn is_excluded(bias: f32) -> bool {
    return bitcast<u32>(bias) == neg_inf_bits();
}
