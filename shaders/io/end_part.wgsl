// The keys in several parts, a dispatch each; maximum, sum and O are carried from one to the next. No
// thread then loops so often that a driver's watchdog, or lavapipe's limit of 65535 iterations, cuts it
// off; and a part's sums are added up apart, so that their rounding error stays that of a part.
@group(0) @binding(16) var<storage, read_write> carried: array<vec4<f32>>;

// The tile of a workgroup, at least `tiles` if there is none; and its split of the keys.
fn tile_of(group: u32, tiles: u32) -> vec2<u32> {
    return vec2<u32>(group, 0u);
}

// A split's keys, of those that a tile sees; and what of a range lies among them.
fn part_of(seen: vec2<u32>, split: u32) -> vec2<u32> {
    return vec2<u32>(params.key_first, params.key_end);
}

fn own_part(range: vec2<u32>, part: vec2<u32>) -> vec2<u32> {
    return clamp(range, vec2<u32>(part.x), vec2<u32>(part.y));
}

// Maximum and sum that the chunk's row `index` starts from.
fn start_of(index: u32) -> vec2<f32> {
    if params.key_first == 0u {
        return vec2<f32>(DROPPED, 0.0);
    }
    return carried[carried_row(index)].xy;
}

// The factors for `end_quad`, once a row's maximum `m` and this part's sum `l` are known.
fn end_of(index: u32, h: u32, start: vec2<f32>, m: f32, l: f32, first_lane: bool, split: u32) -> vec2<f32> {
    let shrink = shrinking(start.x, m);
    let sum = start.y * shrink + l;
    if params.key_end == 0xffffffffu {
        return vec2<f32>(shrink, close_row(index, h, m, sum, first_lane));
    }
    if first_lane {
        carried[carried_row(index)] = vec4<f32>(m, sum, 0.0, 0.0);
    }
    return vec2<f32>(shrink, 0.0);
}

// Carries on, or at last stores, a quad of the chunk's row `index`; its output row begins at `at`.
fn end_quad(index: u32, at: u32, d: u32, sum: vec4<f32>, end: vec2<f32>, split: u32) {
    let place = carried_row(index) + 1u + d / 4u;
    var total = sum;
    if params.key_first > 0u {
        total += carried[place] * end.x;
    }
    if params.key_end == 0xffffffffu {
        store4_o(at, d, total * end.y);
    } else {
        carried[place] = total;
    }
}
