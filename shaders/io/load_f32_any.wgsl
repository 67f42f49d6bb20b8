// OPERAND as f32 with any strides.
@group(0) @binding(BINDING) var<storage, read> OPERAND_data: array<f32>;

fn load1_OPERAND(index: u32) -> f32 {
    return OPERAND_data[index];
}
