fn has_place(b: u32, count: u32, position: u32) -> bool {
    if read_kv_lens(b) < count || position >= params.seq_kv {
        return false;
    }
    return read_block_table(b * params.max_blocks + position / PAGE) < params.pages;
}
