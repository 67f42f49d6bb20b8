// lse and delta of a pair: those of the other.
fn terms_of(b: u32, head: u32, own: vec2<f32>, other: u32) -> vec2<f32> {
    return row_terms(b, head, other);
}
