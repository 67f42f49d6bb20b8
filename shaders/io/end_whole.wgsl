// All keys in one part.

// The tile of a workgroup, at least `tiles` if there is none; and its split of the keys.
fn tile_of(group: u32, tiles: u32) -> vec2<u32> {
    return vec2<u32>(group, 0u);
}

// A split's keys, of those that a tile sees; and what of a range lies among them.
fn part_of(seen: vec2<u32>, split: u32) -> vec2<u32> {
    return seen;
}

fn own_part(range: vec2<u32>, part: vec2<u32>) -> vec2<u32> {
    return range;
}

// Maximum and sum that the chunk's row `index` starts from.
fn start_of(index: u32) -> vec2<f32> {
    return vec2<f32>(DROPPED, 0.0);
}

// The factors for `end_quad`, once a row's maximum `m` and sum `l` are known.
fn end_of(index: u32, h: u32, start: vec2<f32>, m: f32, l: f32, first_lane: bool, split: u32) -> vec2<f32> {
    return vec2<f32>(0.0, close_row(index, h, m, l, first_lane));
}

// Stores a quad of the chunk's row `index`; its output row begins at `at`.
fn end_quad(index: u32, at: u32, d: u32, sum: vec4<f32>, end: vec2<f32>, split: u32) {
    store4_o(at, d, sum * end.y);
}
