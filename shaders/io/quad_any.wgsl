// A row's quads, from its first element, where its elements lie anyhow.
fn quad_at_OPERAND(row: u32) -> u32 {
    return row;
}

fn quad_OPERAND(at: u32, quad: u32) -> vec4<f32> {
    return load4_OPERAND(at, 4u * quad);
}
