// The keys in several splits, side by side, a workgroup for each (Flash-Decoding, Dao 2023): kernel/merge.wgsl
// joins them. A row's share of a split: (m, l, 0, 0), then the quads of O, not divided by l.
@group(0) @binding(16) var<storage, read_write> carried: array<vec4<f32>>;

// The tile of a workgroup, at least `tiles` if there is none; and its split of the keys.
fn tile_of(group: u32, tiles: u32) -> vec2<u32> {
    let split = group / tiles;
    return vec2<u32>(select(tiles, group % tiles, split < params.splits), split);
}

fn own_part(visited: vec2<u32>, split: u32) -> vec2<u32> {
    let first = split * params.split_keys;
    return clamp(visited, vec2<u32>(first), vec2<u32>(first + params.split_keys));
}

// Maximum and sum that the chunk's row `index` starts from.
fn start_of(index: u32) -> vec2<f32> {
    return vec2<f32>(DROPPED, 0.0);
}

fn share_of(index: u32, split: u32) -> u32 {
    let rows = params.head_count * params.row_count;
    return (split * rows + index) * (div_ceil(params.head_dim_v, 4u) + 1u);
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
