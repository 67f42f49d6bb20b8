// The gradient of q: a workgroup owns queries of one head, and steps over the keys that they see.

// The entry and the first query head of an owner, and how many of its heads the workgroup's rows meet.
fn owner_of(index: u32) -> vec2<u32> {
    return batch_head(index);
}

fn met_heads() -> u32 {
    return 1u;
}

// The head of an owner's gradient.
fn head_of_gradient(head: u32) -> u32 {
    return head;
}

fn kv_head_of(head: u32) -> u32 {
    return head / params.group_size;
}

// Query and key of a pair.
fn pair_of(own: u32, other: u32) -> vec2<u32> {
    return vec2<u32>(own, other);
}

// [lo, hi) of the others that any of the own rows [own, own_end) meets.
fn met_by(b: u32, own: u32, own_end: u32, len_k: u32) -> vec2<u32> {
    return tile_kv_range(b, own, own_end, len_k);
}

// Others that there are, and own rows that get a gradient.
fn others(b: u32, len_k: u32) -> u32 {
    return len_k;
}

fn is_stored(b: u32, own: u32, len_k: u32) -> bool {
    return is_query(b, own);
}

// An own row that the entry has: its own number, or that of the last.
fn own_that_exists(b: u32, own: u32, len_k: u32) -> u32 {
    return min(own, query_count(b) - 1u);
}

fn own_a(b: u32, head: u32, own: u32) -> u32 {
    return row_q(b, head, own);
}

//$ for n in 0..OF_SCORES
fn own_b(b: u32, head: u32, own: u32) -> u32 {
    return row_dout(b, head, own);
}
//$ end

fn load_own_a(at: u32, d: u32) -> vec4<f32> {
    return load4_q(at, d);
}

//$ for n in 0..OF_SCORES
fn load_own_b(at: u32, d: u32) -> vec4<f32> {
    return load4_dout(at, d);
}
//$ end

fn other_row_a(b: u32, head: u32, other: u32) -> u32 {
    return row_k(b, kv_head_of(head), other);
}

fn other_row_b(b: u32, head: u32, other: u32) -> u32 {
    return row_v(b, kv_head_of(head), other);
}

fn load_other_a(at: u32, d: u32) -> vec4<f32> {
    return load4_k(at, d);
}

fn load_other_b(at: u32, d: u32) -> vec4<f32> {
    return load4_v(at, d);
}

// lse and delta are those of an own row.
fn own_terms(b: u32, head: u32, own: u32) -> vec2<f32> {
    return row_terms(b, head, own);
}
