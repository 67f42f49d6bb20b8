// OPERAND as f32 with any strides.
@group(0) @binding(BINDING) var<storage, read_write> OPERAND_data: array<f32>;

fn store1_OPERAND(index: u32, x: f32) {
    OPERAND_data[index] = x;
}
