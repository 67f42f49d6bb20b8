// OPERAND as pairs of 16-bit floats with any strides.
@group(0) @binding(BINDING) var<storage, read> OPERAND_data: array<u32>;

fn load1_OPERAND(index: u32) -> f32 {
    return unpack_DTYPE(OPERAND_data[index / 2u] >> (16u * (index & 1u))).x;
}
