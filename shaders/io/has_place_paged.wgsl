fn has_place(b: u32, count: u32, length: u32, position: u32) -> bool {
    if length < count || position >= params.seq_kv {
        return false;
    }
    return read_block_table(b * params.max_blocks + position / PAGE) < params.pages;
}
