fn store_lse(index: u32, bits: u32) {}
