@group(0) @binding(BINDING) var<storage, read> gains: array<f32>;

fn gain(d: u32) -> f32 {
    return gains[d];
}
