// Scores, straight from storage: (seq_q, head_dim) @ (head_dim, seq_kv) -> (seq_q, seq_kv).
//
// A thread owns one key and ROWS queries; a workgroup owns ROWS queries and LANES keys. All threads
// of a workgroup read the same query elements (a workgroup-uniform address, which an adapter on a
// CPU turns into a broadcast) and each its own key, so there is no workgroup memory and no barrier.
// Tiles that no query of theirs sees are left unwritten; the softmax never reads them.

@group(0) @binding(11) var<storage, read_write> scores: array<f32>;

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let tiles_kv = div_ceil(params.seq_kv, LANES);
    let tiles_q = div_ceil(params.row_count, ROWS);
    let tile = linear_group(group, groups);
    if tile >= tiles_kv * tiles_q * params.head_count {
        return;
    }
    let tile_kv = tile % tiles_kv;
    let row = tile / tiles_kv % tiles_q * ROWS;
    let head = tile / tiles_kv / tiles_q;
    let bh = batch_head(head);
    let len_k = key_length(bh.x);
    let row_end = min(row + ROWS, params.row_count);
    let seen = tile_kv_range(params.row_first + row, params.row_first + row_end, len_k);
    if tile_kv * LANES >= seen.y || (tile_kv + 1u) * LANES <= seen.x {
        return;
    }

    // Past the edges the last key and the last query are read again, and nothing is written.
    let j = tile_kv * LANES + lane;
    let key = row_k(bh.x, bh.y / params.group_size, min(j, len_k - 1u));
    var query: array<u32, ROWS>;
    var dots: array<f32, ROWS>;
    for (var r = 0u; r < ROWS; r += 1u) {
        query[r] = query_row(head, min(row + r, params.row_count - 1u));
    }
    for (var d = 0u; d < params.head_dim; d += 4u) {
        let k = load4_k(key, d);
        for (var r = 0u; r < ROWS; r += 1u) {
            let q = load4_q(query[r], d);
            dots[r] = fma(q.x, k.x, fma(q.y, k.y, fma(q.z, k.z, fma(q.w, k.w, dots[r]))));
        }
    }

    if j < params.score_stride {
        for (var r = 0u; r < ROWS; r += 1u) {
            if row + r < params.row_count {
                let i = params.row_first + row + r;
                let range = kv_range(i, len_k);
                let at = (head * params.row_count + row + r) * params.score_stride + j;
                scores[at] = finish_score(dots[r], bh.x, bh.y, i, j, range, len_k);
            }
        }
    }
}
