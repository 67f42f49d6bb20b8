fn has_place(b: u32, count: u32, length: u32, position: u32) -> bool {
    return length >= count && position < params.seq_kv;
}
