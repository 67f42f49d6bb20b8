// The map of a boolean mask: what it does to each tile of MAP_Q query rows x MAP_KV keys, two bits a
// tile, 16 tiles along the keys to a word, words in the order [batch, head, tile of rows, keys]. Along a
// dimension that the mask repeats (a stride of 0) there is but one. src/mask_map.rs is the Rust twin.

const MAP_WORD_KEYS = 16u * MAP_KV;

fn map_heads() -> u32 {
    return select(params.heads_q, 1u, params.mask_stride_h == 0u);
}

// Query rows that the mask tells apart.
fn map_rows() -> u32 {
    return select(params.seq_q, 1u, params.mask_stride_s == 0u);
}

// Words of a tile of rows.
fn map_row_words() -> u32 {
    return div_ceil(params.seq_kv, MAP_WORD_KEYS);
}
