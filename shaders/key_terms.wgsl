// What other kernels make of keys lies in scratch memory: seq_kv terms for each head of keys that the chunk's
// query heads read. Heads are numbered over all batch entries.
fn first_key_head() -> u32 {
    return params.head_first / params.key_term_group;
}

// How many there are.
fn key_heads() -> u32 {
    return (params.head_first + params.head_count - 1u) / params.key_term_group - first_key_head() + 1u;
}

// The batch entry of the chunk's head of keys `index`, and its first query head.
fn entry_and_head(index: u32) -> vec2<u32> {
    let head = (first_key_head() + index) * params.key_term_group;
    return vec2<u32>(head / params.heads_q, head % params.heads_q);
}

// The number of the head of keys that query head `h` reads.
fn head_of_terms(b: u32, h: u32) -> u32 {
    return (b * params.heads_q + h) / params.key_term_group - first_key_head();
}

// The term of key `j` for query head `h`.
fn key_term(b: u32, h: u32, j: u32) -> u32 {
    return head_of_terms(b, h) * params.seq_kv + j;
}
