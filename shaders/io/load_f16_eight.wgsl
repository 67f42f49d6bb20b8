// OPERAND as native f16 whose rows are contiguous multiples of eight elements.
struct Eight_OPERAND {
    low: vec4<f16>,
    high: vec4<f16>,
}

@group(0) @binding(BINDING) var<storage, read> OPERAND_data: array<Eight_OPERAND>;

fn load8_OPERAND(at: u32, d: u32) -> Eight_OPERAND {
    return OPERAND_data[at / 8u + d / 8u];
}

fn load4_OPERAND(at: u32, d: u32) -> vec4<f32> {
    let eight = load8_OPERAND(at, d);
    return vec4<f32>(select(eight.low, eight.high, (d & 4u) != 0u));
}
