// The quads of key `c` of the step that begins at key `first` of `len`, where a step's quads are a power of two: one address,
// and numbers that are added to it without a carry, as the mask tells a compiler (see quad_vec4.wgsl). Behind the last
// key of the last step are rows of zeros.
fn quads_of_OPERAND(begin: u32, b: u32, first: u32, c: u32, len: u32) -> u32 {
    let step = min(first, (len - 1u) / KEYS * KEYS);
    return ((begin / 4u + step * ROW_QUADS) & MASK) + c * ROW_QUADS;
}

fn quad_OPERAND(at: u32, quad: u32) -> vec4<f32> {
    return load_quad_OPERAND(at + quad);
}
