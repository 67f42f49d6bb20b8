// The quads of key `c` of the step that begins at key `first` of `len`. The mask changes no index (a binding of OPERAND ends
// below 2^26 quads, and rows begin at multiples of the quads that it leaves out): it tells a compiler that the byte offset
// cannot be negative, and how many quads are added to it without a carry.
fn quads_of_OPERAND(begin: u32, b: u32, first: u32, c: u32, len: u32) -> u32 {
    return (key_OPERAND(begin, b, min(first + c, len - 1u)) / 4u) & MASK;
}

fn quad_OPERAND(at: u32, quad: u32) -> vec4<f32> {
    return load_quad_OPERAND(at + quad);
}
