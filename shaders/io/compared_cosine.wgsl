// One over the norms of keys (kernel/key_norms.wgsl).
@group(0) @binding(BINDING) var<storage, read> key_terms: array<f32>;

// The similarity of query and key, of the dot product of a query of length 1 and the key: their cosine.
fn compared(dot: f32, b: u32, h: u32, j: u32) -> f32 {
    return dot * key_terms[key_term(b, h, j)];
}
