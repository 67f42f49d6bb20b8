// OPERAND as native f16 with any strides.
@group(0) @binding(BINDING) var<storage, read> OPERAND_data: array<f16>;

fn load1_OPERAND(index: u32) -> f32 {
    return f32(OPERAND_data[index]);
}
