// The keys in several splits, side by side, a workgroup for each (Flash-Decoding, Dao 2023): kernel/merge.wgsl
// joins them.
@group(0) @binding(16) var<storage, read_write> carried: array<vec4<f32>>;

// The tile of a workgroup, at least `tiles` if there is none; and its split of the keys.
fn tile_of(group: u32, tiles: u32) -> vec2<u32> {
    let split = group / tiles;
    return vec2<u32>(select(tiles, group % tiles, split < params.splits), split);
}

// A split's keys, of those that a tile sees: equal shares in whole steps, as few as are worth a split. They
// are shared out here, because how many keys there are may be known on the GPU alone.
fn part_of(seen: vec2<u32>, split: u32) -> vec2<u32> {
    let first = seen.x / params.split_step;
    let steps = div_ceil(seen.y, params.split_step) - first;
    let share = max(params.split_least, div_ceil(steps, params.splits));
    let begin = first + split * share;
    return min(vec2<u32>(begin, begin + share) * params.split_step, vec2<u32>(seen.y));
}

// What of a range lies in a part.
fn own_part(range: vec2<u32>, part: vec2<u32>) -> vec2<u32> {
    return clamp(range, vec2<u32>(part.x), vec2<u32>(part.y));
}

// Maximum and sum that the chunk's row `index` starts from.
fn start_of(index: u32) -> vec2<f32> {
    return vec2<f32>(DROPPED, 0.0);
}

fn share_of(index: u32, split: u32) -> u32 {
    let rows = params.head_count * params.row_count;
    return carried_row(split * rows + index);
}

// What `end_quad` wants to know, once a row's maximum `m` and sum `l` are known.
fn end_of(index: u32, h: u32, start: vec2<f32>, m: f32, l: f32, first_lane: bool, split: u32) -> vec2<f32> {
    if first_lane {
        carried[share_of(index, split)] = vec4<f32>(m, l, 0.0, 0.0);
    }
    return vec2<f32>();
}

fn end_quad(index: u32, at: u32, d: u32, sum: vec4<f32>, end: vec2<f32>, split: u32) {
    carried[share_of(index, split) + 1u + d / 4u] = sum;
}

// Rows of o are the other kernel's business.
fn row_o(b: u32, h: u32, s: u32) -> u32 {
    return 0u;
}
