// o as f32 with any strides.
@group(0) @binding(BINDING) var<storage, read_write> o_data: array<f32>;

fn store1_o(index: u32, x: f32) {
    o_data[index] = x;
}
