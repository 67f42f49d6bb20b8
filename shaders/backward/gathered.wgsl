// What kernel/backward_rows.wgsl has gathered: the lists (shaders/io/list_bundled.wgsl), then of each query two
// numbers, its lse and its delta = dO . O.
@group(0) @binding(BINDING) var<storage, read> bundle: array<u32>;

// lse and delta of query `i`.
fn row_terms(b: u32, h: u32, i: u32) -> vec2<f32> {
    let at = terms_first() + 2u * lse_at(b, h, i);
    return vec2<f32>(bitcast<f32>(bundle[at]), bitcast<f32>(bundle[at + 1u]));
}
