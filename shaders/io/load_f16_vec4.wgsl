// OPERAND as native f16 whose rows are contiguous multiples of four elements.
@group(0) @binding(BINDING) var<storage, read> OPERAND_data: array<vec4<f16>>;

fn load4_OPERAND(at: u32, d: u32) -> vec4<f32> {
    return vec4<f32>(OPERAND_data[(at + d) / 4u]);
}
