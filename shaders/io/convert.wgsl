// 16-bit floats in pairs of a u32, the lower half first.

fn unpack_f16(pair: u32) -> vec2<f32> {
    return unpack2x16float(pair);
}

fn unpack_bf16(pair: u32) -> vec2<f32> {
    return bitcast<vec2<f32>>(vec2<u32>(pair << 16u, pair & 0xffff0000u));
}

// Rounded to f16's precision, to nearest, ties to even: pack2x16float may round towards zero, and does on AMD's GPUs. What
// f16 has no normal number for is left as it is.
fn nearest_f16(x: f32) -> f32 {
    let bits = bitcast<u32>(x);
    let size = bits & 0x7fffffffu;
    let rounded = (bits + 0xfffu + ((bits >> 13u) & 1u)) & 0xffffe000u;
    return bitcast<f32>(select(bits, rounded, size >= 0x38800000u && size < 0x47800000u));
}

// Each by itself: SwiftShader lets a NaN in the lower half reach into the upper one.
fn pack_f16(x: vec2<f32>) -> u32 {
    let low = pack2x16float(vec2<f32>(nearest_f16(x.x), 0.0));
    let high = pack2x16float(vec2<f32>(nearest_f16(x.y), 0.0));
    return (low & 0xffffu) | (high << 16u);
}

// Round to nearest, ties to even; a NaN stays one (rounding could carry it into infinity).
fn bf16_bits(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    let rounded = (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
    return select(rounded, (bits >> 16u) | 0x40u, is_nan(x));
}

fn pack_bf16(x: vec2<f32>) -> u32 {
    return bf16_bits(x.x) | (bf16_bits(x.y) << 16u);
}
