// [lo, hi) of the keys that the value kernel visits for row `row` of the chunk: all that any row of
// its tile of VALUES_ROWS sees, widened to whole steps of VALUES_STEP keys. The softmax writes a
// weight for each of them.
fn values_range(b: u32, row: u32, len_k: u32) -> vec2<u32> {
    let first = row / VALUES_ROWS * VALUES_ROWS;
    let end = min(first + VALUES_ROWS, params.row_count);
    let seen = tile_kv_range(b, params.row_first + first, params.row_first + end, len_k);
    return vec2<u32>(seen.x / VALUES_STEP, div_ceil(seen.y, VALUES_STEP)) * VALUES_STEP;
}
