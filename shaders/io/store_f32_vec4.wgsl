// OPERAND as f32 whose rows are contiguous multiples of four elements.
@group(0) @binding(BINDING) var<storage, read_write> OPERAND_data: array<vec4<f32>>;

fn store4_OPERAND(at: u32, d: u32, x: vec4<f32>) {
    OPERAND_data[(at + d) / 4u] = x;
}
