fn blocks_of(keys: u32) -> u32 {
    return 0u;
}

fn is_page(b: u32, block: u32) -> bool {
    return true;
}

fn keys_before(block: u32, length: u32) -> u32 {
    return length;
}
