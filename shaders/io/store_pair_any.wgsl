// OPERAND as pairs of 16-bit floats with any strides: the other half of a word may belong to another
// thread, or to nobody, so each half is cleared and set by atomics.
@group(0) @binding(BINDING) var<storage, read_write> OPERAND_data: array<atomic<u32>>;

fn store1_OPERAND(index: u32, x: f32) {
    let shift = 16u * (index & 1u);
    atomicAnd(&OPERAND_data[index / 2u], ~(0xffffu << shift));
    atomicOr(&OPERAND_data[index / 2u], (pack_DTYPE(vec2<f32>(x, 0.0)) & 0xffffu) << shift);
}
