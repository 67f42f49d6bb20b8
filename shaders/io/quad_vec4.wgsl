// A row's quads, from its first element. The mask changes no index (a binding of OPERAND ends below
// 2^26 quads, and rows begin at multiples of the quads that it leaves out): it tells a compiler that the byte offset
// cannot be negative, and how many quads are added to it without a carry.
fn quad_at_OPERAND(row: u32) -> u32 {
    return (row / 4u) & MASK;
}

fn quad_OPERAND(at: u32, quad: u32) -> vec4<f32> {
    return load_quad_OPERAND(at + quad);
}
