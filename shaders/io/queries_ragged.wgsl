// Ragged queries, those of an entry after those of another. The host cannot see the offsets: what decreases
// or reaches too far is cut.
fn query_first(b: u32) -> u32 {
    return min(read_cu_seqlens_q(b), params.total_q);
}

// Queries of a batch entry.
fn query_count(b: u32) -> u32 {
    let first = query_first(b);
    return min(max(query_first(b + 1u), first) - first, params.seq_q);
}

// Whether a batch entry has a query `i` below seq_q.
fn is_query(b: u32, i: u32) -> bool {
    return i < query_count(b);
}

// The number of a row among all. One that the entry does not have is one that exists all the same.
fn token_of(b: u32, i: u32) -> u32 {
    return min(query_first(b) + i, params.total_q - 1u);
}

// Where the lse of query `i` lies.
fn lse_at(b: u32, h: u32, i: u32) -> u32 {
    return h * params.total_q + query_first(b) + i;
}

// Whether an entry's offsets had to be cut.
fn queries_wrong(b: u32) -> bool {
    let first = read_cu_seqlens_q(b);
    let end = read_cu_seqlens_q(b + 1u);
    return end < first || end > params.total_q || end - first > params.seq_q;
}
