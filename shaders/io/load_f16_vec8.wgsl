// OPERAND as f16 whose rows are contiguous multiples of eight elements, in words of two.
@group(0) @binding(BINDING) var<storage, read> OPERAND_data: array<vec4<u32>>;

fn load8_OPERAND(at: u32, d: u32) -> vec4<u32> {
    return OPERAND_data[(at + d) / 8u];
}

fn load4_OPERAND(at: u32, d: u32) -> vec4<f32> {
    let words = load8_OPERAND(at, d);
    let pairs = select(words.xy, words.zw, (d & 4u) != 0u);
    return vec4<f32>(unpack2x16float(pairs.x), unpack2x16float(pairs.y));
}
