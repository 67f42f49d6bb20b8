fn has_place(b: u32, count: u32, position: u32) -> bool {
    return read_kv_lens(b) >= count && position < params.seq_kv;
}
