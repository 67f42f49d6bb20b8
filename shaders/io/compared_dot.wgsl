// The similarity of query and key, of their dot product: that itself.
fn compared(dot: f32, b: u32, h: u32, j: u32) -> f32 {
    return dot;
}
