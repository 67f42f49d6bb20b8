// What the tile kernel asks of a step.

// Whether all of them keep all others of a step.
fn all_kept(b: u32, own: u32, own_end: u32, first: u32, len_k: u32) -> bool {
    let full = tile_full_range(b, own, own_end, len_k);
    return first >= full.x && first + STEP <= full.y;
}

// lse and delta of a pair: those of an own row.
fn stage_terms(thread: u32, b: u32, head: u32, first: u32, end: u32) {}

fn terms_of(own: vec2<f32>, other: u32) -> vec2<f32> {
    return own;
}
