fn blocks_of(keys: u32) -> u32 {
    return div_ceil(keys, PAGE);
}

fn is_page(b: u32, block: u32) -> bool {
    return read_block_table(b * params.max_blocks + block) < params.pages;
}

fn keys_before(block: u32, length: u32) -> u32 {
    return min(block * PAGE, length);
}
