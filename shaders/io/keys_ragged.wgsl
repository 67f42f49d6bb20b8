// Ragged keys, those of an entry after those of another.
fn key_first(b: u32) -> u32 {
    return min(read_cu_seqlens_k(b), params.total_kv);
}
