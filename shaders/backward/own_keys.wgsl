// The gradients of k and v: a workgroup owns keys of one key-value head, and steps over the queries that see them, of
// one query head of the group after the other. So each sum has one owner: no atomics, and the same bits each time.

// The entry and the first query head of an owner, and how many of its heads the workgroup's rows meet.
fn owner_of(index: u32) -> vec2<u32> {
    let heads_kv = params.heads_q / params.group_size;
    let head = params.head_first + index;
    return vec2<u32>(head / heads_kv, head % heads_kv * params.group_size);
}

fn met_heads() -> u32 {
    return params.group_size;
}

// The head of an owner's gradient.
fn head_of_gradient(head: u32) -> u32 {
    return kv_head_of(head);
}

fn kv_head_of(head: u32) -> u32 {
    return head / params.group_size;
}

// Query and key of a pair.
fn pair_of(own: u32, other: u32) -> vec2<u32> {
    return vec2<u32>(other, own);
}

// [lo, hi) of the others that any of the own rows [own, own_end) meets: query i sees the keys from
// position - window_left to position + window_right, so that both ends grow with the key.
fn met_by(b: u32, own: u32, own_end: u32, len_k: u32) -> vec2<u32> {
    let end = min(own_end, len_k);
    // One return, as in tile_kv_range.
    var range = vec2<u32>();
    if own < end {
        let offset = position_offset(b, len_k);
        let lo = max(0, i32(own) - offset - params.window_right);
        let hi = clamp(i32(end) - offset + params.window_left, 0, i32(query_count(b)));
        range = vec2<u32>(u32(min(lo, hi)), u32(hi));
    }
    return range;
}

// Others that there are, and own rows that get a gradient.
fn others(b: u32, len_k: u32) -> u32 {
    return query_count(b);
}

fn is_stored(b: u32, own: u32, len_k: u32) -> bool {
    return RAGGED_K == 0u || own < len_k;
}

// An own row that the entry has: its own number, or that of the last.
fn own_that_exists(b: u32, own: u32, len_k: u32) -> u32 {
    return min(own, len_k - 1u);
}

fn own_a(b: u32, head: u32, own: u32) -> u32 {
    return row_k(b, kv_head_of(head), own);
}

//$ for n in 0..OF_SCORES
fn own_b(b: u32, head: u32, own: u32) -> u32 {
    return row_v(b, kv_head_of(head), own);
}
//$ end

fn load_own_a(at: u32, d: u32) -> vec4<f32> {
    return load4_k(at, d);
}

//$ for n in 0..OF_SCORES
fn load_own_b(at: u32, d: u32) -> vec4<f32> {
    return load4_v(at, d);
}
//$ end

fn other_row_a(b: u32, head: u32, other: u32) -> u32 {
    return row_q(b, head, other);
}

fn other_row_b(b: u32, head: u32, other: u32) -> u32 {
    return row_dout(b, head, other);
}

fn load_other_a(at: u32, d: u32) -> vec4<f32> {
    return load4_q(at, d);
}

fn load_other_b(at: u32, d: u32) -> vec4<f32> {
    return load4_dout(at, d);
}

// lse and delta are those of the others.
fn own_terms(b: u32, head: u32, own: u32) -> vec2<f32> {
    return vec2<f32>();
}
