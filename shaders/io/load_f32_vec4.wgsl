// OPERAND as f32 whose rows are contiguous multiples of four elements.
@group(0) @binding(BINDING) var<storage, read> OPERAND_data: array<vec4<f32>>;

fn load_quad_OPERAND(quad: u32) -> vec4<f32> {
    return OPERAND_data[quad];
}

fn load4_OPERAND(at: u32, d: u32) -> vec4<f32> {
    return load_quad_OPERAND(at / 4u + d / 4u);
}
