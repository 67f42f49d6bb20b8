// OPERAND as native f16 with any strides.
@group(0) @binding(BINDING) var<storage, read_write> OPERAND_data: array<f16>;

fn store1_OPERAND(index: u32, x: f32) {
    OPERAND_data[index] = f16(x);
}
