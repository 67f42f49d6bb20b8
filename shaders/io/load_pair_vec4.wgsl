// OPERAND as pairs of 16-bit floats, whose rows are contiguous multiples of four elements.
@group(0) @binding(BINDING) var<storage, read> OPERAND_data: array<vec2<u32>>;

fn load_quad_OPERAND(quad: u32) -> vec4<f32> {
    let pairs = OPERAND_data[quad];
    return vec4<f32>(unpack_DTYPE(pairs.x), unpack_DTYPE(pairs.y));
}

fn load4_OPERAND(at: u32, d: u32) -> vec4<f32> {
    return load_quad_OPERAND(at / 4u + d / 4u);
}
