// The quads of key `c` of the step that begins at key `first` of `len`, where elements lie anyhow.
fn quads_of_OPERAND(begin: u32, b: u32, first: u32, c: u32, len: u32) -> u32 {
    return key_OPERAND(begin, b, min(first + c, len - 1u));
}

fn quad_OPERAND(at: u32, quad: u32) -> vec4<f32> {
    return load4_OPERAND(at, 4u * quad);
}
