// All others in one dispatch.
fn part_of(meeting: u32, met: vec2<u32>) -> vec2<u32> {
    return met;
}

fn end_quad(at: u32, b: u32, head: u32, row: u32, quad: u32, sum: vec4<f32>, factor: f32) {
    store4_grad(row_grad(b, head, row), 4u * quad, sum * factor);
}
