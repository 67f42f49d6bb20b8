fn key_length(b: u32) -> u32 {
    return params.seq_kv;
}
