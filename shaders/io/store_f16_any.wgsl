// o as native f16 with any strides.
@group(0) @binding(BINDING) var<storage, read_write> o_data: array<f16>;

fn store1_o(index: u32, x: f32) {
    o_data[index] = f16(x);
}
