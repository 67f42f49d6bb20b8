// OPERAND as rows of 4-bit codes (src/quant.rs): a word with scale and lowest value for each 16 elements,
// then the codes.
@group(0) @binding(BINDING) var<storage, read> OPERAND_data: array<u32>;

fn load4_OPERAND(at: u32, d: u32) -> vec4<f32> {
    let range = OPERAND_data[at + d / 16u];
    let codes = OPERAND_data[at + div_ceil(params.WIDTH, 16u) + d / 8u] >> (4u * (d & 4u));
    let x = vec4<f32>((vec4<u32>(codes) >> vec4<u32>(0u, 4u, 8u, 12u)) & vec4<u32>(0xfu));
    return fma(vec4<f32>(bitcast<f32>(range << 16u)), x, vec4<f32>(bitcast<f32>(range & 0xffff0000u)));
}
