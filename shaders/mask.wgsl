// Which keys a query may see. The Rust twin is AttentionProblem::kv_range in src/mask.rs.

const TOP_LEFT: u32 = 1u;

// What the boolean mask does to the pairs of a tile, where it has been mapped: it drops them all, some
// (also where nobody knows), or none.
const TILE_DROPPED: u32 = 0u;
const TILE_MIXED: u32 = 1u;
const TILE_KEPT: u32 = 2u;

// The position of query 0, in keys.
fn position_offset(alignment: u32, len_k: u32) -> i32 {
    return select(i32(len_k) - i32(params.seq_q), 0, alignment == TOP_LEFT);
}

// [lo, hi) of the keys that causality, window and key length leave to query `row`.
fn kv_range(row: u32, len_k: u32) -> vec2<u32> {
    var hi = i32(len_k);
    if params.causal != 0u {
        hi = min(hi, i32(row) + position_offset(params.causal, len_k) + 1);
    }
    let position = i32(row) + position_offset(params.window_align, len_k);
    let lo = max(0, position - params.window_left);
    hi = max(0, min(hi, position + params.window_right + 1));
    return vec2<u32>(u32(min(lo, hi)), u32(hi));
}

// [lo, hi) of the keys that any of the queries [row, row_end) sees: both ends grow with the row.
fn tile_kv_range(row: u32, row_end: u32, len_k: u32) -> vec2<u32> {
    let first = kv_range(row, len_k);
    let last = kv_range(row_end - 1u, len_k);
    // An early row before the first key has an empty range at 0, a late row an empty one at its end.
    return vec2<u32>(min(first.x, last.y), last.y);
}

// [lo, hi) of the keys that all of the queries [row, row_end) see; empty where lo >= hi.
fn tile_full_range(row: u32, row_end: u32, len_k: u32) -> vec2<u32> {
    return vec2<u32>(kv_range(row_end - 1u, len_k).x, kv_range(row, len_k).y);
}
