// cos and sin of a position's angle for a pair of elements, from the caller's table: built-in functions are off
// by more than a score may be once positions are large.
@group(0) @binding(BINDING) var<storage, read> rope: array<f32>;

fn angle(position: u32, pair: u32) -> vec2<f32> {
    let at = position * ROPE + 2u * pair;
    return vec2<f32>(rope[at], rope[at + 1u]);
}
