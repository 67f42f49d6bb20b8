// OPERAND as rows of 8-bit codes (src/quant.rs): a word with scale and lowest value, then the codes.
@group(0) @binding(BINDING) var<storage, read> OPERAND_data: array<u32>;

fn load4_OPERAND(at: u32, d: u32) -> vec4<f32> {
    let range = OPERAND_data[at];
    let codes = OPERAND_data[at + 1u + d / 4u];
    let x = vec4<f32>((vec4<u32>(codes) >> vec4<u32>(0u, 8u, 16u, 24u)) & vec4<u32>(0xffu));
    return fma(vec4<f32>(bitcast<f32>(range << 16u)), x, vec4<f32>(bitcast<f32>(range & 0xffff0000u)));
}
