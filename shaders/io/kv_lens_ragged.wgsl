// Keys of a batch entry, as the caller gives them; what reaches too far is cut.
fn asked_length(b: u32) -> u32 {
    let first = key_first(b);
    return max(key_first(b + 1u), first) - first;
}

// What the status word gains where an entry's offsets had to be cut.
fn keys_wrong(b: u32) -> u32 {
    let first = read_cu_seqlens_k(b);
    let end = read_cu_seqlens_k(b + 1u);
    let cut = end < first || end > params.total_kv || end - first > params.seq_kv;
    return select(0u, STATUS_RAGGED, cut);
}
