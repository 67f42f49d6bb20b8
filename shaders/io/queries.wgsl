// Queries of a batch entry.
fn query_count(b: u32) -> u32 {
    return params.seq_q;
}

// Whether a batch entry has a query `i` below seq_q.
fn is_query(b: u32, i: u32) -> bool {
    return true;
}

// The number of a row among all.
fn token_of(b: u32, i: u32) -> u32 {
    return b * params.seq_q + i;
}

// Where the lse of query `i` lies.
fn lse_at(b: u32, h: u32, i: u32) -> u32 {
    return (b * params.heads_q + h) * params.seq_q + i;
}

fn queries_wrong(b: u32) -> bool {
    return false;
}
