@group(0) @binding(BINDING) var<storage, read> mask_map: array<u32>;

// What the mask does to the tile of query row `i` and key `j`: TILE_DROPPED, TILE_MIXED or TILE_KEPT.
// Where the arguments are workgroup-uniform, so is this, since the map is read-only here.
fn mask_tile(b: u32, h: u32, i: u32, j: u32) -> u32 {
    let entry = select(b, 0u, params.mask_stride_b == 0u);
    let head = entry * map_heads() + min(h, map_heads() - 1u);
    let row = head * div_ceil(map_rows(), MAP_Q) + min(i, map_rows() - 1u) / MAP_Q;
    let word = mask_map[row * map_row_words() + j / MAP_WORD_KEYS];
    return (word >> (2u * (j / MAP_KV % 16u))) & 3u;
}

// The first key after the tile of key `j`, at most `end`.
fn mask_tile_end(j: u32, end: u32) -> u32 {
    return min((j / MAP_KV + 1u) * MAP_KV, end);
}
