// What the tile kernel asks of a step.

// Whether all of them keep all others of a step.
fn all_kept(b: u32, own: u32, own_end: u32, first: u32, len_k: u32) -> bool {
    let full = tile_full_range(b, first, first + STEP, len_k);
    return own >= full.x && own_end <= full.y && first + STEP <= query_count(b);
}

// lse and delta of a pair: those of the other.
var<workgroup> wg_terms: array<vec2<f32>, STEP>;

fn stage_terms(thread: u32, b: u32, head: u32, first: u32, end: u32) {
    for (var round = 0u; round < STEP; round += THREADS) {
        let at = round + thread;
        if at < STEP && first + at < end {
            wg_terms[at] = row_terms(b, head, first + at);
        }
    }
}

fn terms_of(own: vec2<f32>, other: u32) -> vec2<f32> {
    return wg_terms[other];
}
