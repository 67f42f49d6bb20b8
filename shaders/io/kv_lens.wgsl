// Keys of a batch entry, as the caller gives them.
fn asked_length(b: u32) -> u32 {
    return read_kv_lens(b);
}

// What the status word gains where that is more than can be.
fn keys_wrong(b: u32) -> u32 {
    return select(0u, STATUS_LENGTH, read_kv_lens(b) > params.seq_kv);
}
