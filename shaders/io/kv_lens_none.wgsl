fn asked_length(b: u32) -> u32 {
    return params.seq_kv;
}

fn keys_wrong(b: u32) -> u32 {
    return 0u;
}
