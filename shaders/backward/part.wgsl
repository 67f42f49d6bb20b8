// A part of the others, [key_first, key_end) of those of all heads that are met, one head's after another's.

fn part_of(meeting: u32, met: vec2<u32>) -> vec2<u32> {
    let before = meeting * params.seq_q;
    let first = max(params.key_first, before) - before;
    let end = max(params.key_end, before) - before;
    return vec2<u32>(max(met.x, first), min(met.y, end));
}

// The sum of a part joins those of the parts before, and does not go on from them: so rounding errors grow with the terms
// of a part.
fn end_quad(at: u32, b: u32, head: u32, row: u32, quad: u32, of_part: vec4<f32>, factor: f32) {
    var sum = of_part;
    if params.key_first > 0u {
        sum += carried[at];
    }
    if params.key_end == 0xffffffffu {
        store4_grad(row_grad(b, head, row), 4u * quad, sum * factor);
    } else {
        carried[at] = sum;
    }
}
