fn store_lse(index: u32, lse: f32) {}
