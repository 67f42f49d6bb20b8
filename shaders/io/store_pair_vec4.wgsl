// OPERAND as pairs of 16-bit floats whose rows are contiguous multiples of four elements.
@group(0) @binding(BINDING) var<storage, read_write> OPERAND_data: array<vec2<u32>>;

fn store4_OPERAND(at: u32, d: u32, x: vec4<f32>) {
    OPERAND_data[(at + d) / 4u] = vec2<u32>(pack_DTYPE(x.xy), pack_DTYPE(x.zw));
}
