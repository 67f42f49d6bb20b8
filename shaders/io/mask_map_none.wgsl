fn mask_tile(b: u32, h: u32, i: u32, j: u32) -> u32 {
    return TILE_MIXED;
}

fn mask_tile_end(j: u32, end: u32) -> u32 {
    return end;
}
