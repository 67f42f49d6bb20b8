// o as f32 whose rows are contiguous multiples of four elements.
@group(0) @binding(BINDING) var<storage, read_write> o_data: array<vec4<f32>>;

fn store4_o(at: u32, d: u32, x: vec4<f32>) {
    o_data[(at + d) / 4u] = x;
}
