@group(0) @binding(BINDING) var<storage, read_write> lse_data: array<f32>;

fn store_lse(index: u32, lse: f32) {
    lse_data[index] = lse;
}
