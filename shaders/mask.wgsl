// Which keys a query may see. The Rust twin is AttentionProblem::kv_range in src/mask.rs.

const TOP_LEFT: u32 = 1u;

// The position of query 0 of batch entry `b`, in keys.
fn position_offset(b: u32, len_k: u32) -> i32 {
    return select(i32(len_k) - i32(query_count(b)), 0, params.align == TOP_LEFT);
}

// [lo, hi) of the keys that causality, window and key length leave to query `row`. Causality is a window, too.
fn kv_range(b: u32, row: u32, len_k: u32) -> vec2<u32> {
    let position = i32(row) + position_offset(b, len_k);
    let lo = max(0, position - params.window_left);
    let hi = max(0, min(i32(len_k), position + params.window_right + 1));
    return vec2<u32>(u32(min(lo, hi)), u32(hi));
}

// [lo, hi) of the keys that any of the queries [row, row_end) sees: both ends grow with the row. None
// where the entry has no such query.
fn tile_kv_range(b: u32, row: u32, row_end: u32, len_k: u32) -> vec2<u32> {
    let end = min(row_end, query_count(b));
    // One return: of a function with two, FXC takes the result for perhaps not initialised, and no branch by that for
    // one that all threads of a workgroup take alike.
    var range = vec2<u32>();
    if row < end {
        let first = kv_range(b, row, len_k);
        let last = kv_range(b, end - 1u, len_k);
        // An early row before the first key has an empty range at 0, a late row an empty one at its end.
        range = vec2<u32>(min(first.x, last.y), last.y);
    }
    return range;
}

// [lo, hi) of the keys that all of the queries [row, row_end) see; empty where lo >= hi.
fn tile_full_range(b: u32, row: u32, row_end: u32, len_k: u32) -> vec2<u32> {
    return vec2<u32>(kv_range(b, row_end - 1u, len_k).x, kv_range(b, row, len_k).y);
}
