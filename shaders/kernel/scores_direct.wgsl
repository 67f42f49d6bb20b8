// Scores, straight from storage: (seq_q, head_dim) @ (head_dim, seq_kv) -> (seq_q, seq_kv).
//
// A thread owns ROWS queries and KEYS keys, spread by LANES; a workgroup owns ROWS queries and
// LANES * KEYS keys. All threads of a workgroup read the same query elements (a workgroup-uniform
// address, which an adapter on a CPU turns into a broadcast) and each its own keys, so there is no
// workgroup memory and no barrier. Tiles that no query of theirs sees are left unwritten; the
// softmax never reads them.

const TILE_KV = LANES * KEYS;

@group(0) @binding(11) var<storage, read_write> scores: array<f32>;

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let tiles_kv = div_ceil(params.seq_kv, TILE_KV);
    let tiles_q = div_ceil(params.row_count, ROWS);
    let tile = linear_group(group, groups);
    if tile >= tiles_kv * tiles_q * params.head_count {
        return;
    }
    let first_key = tile % tiles_kv * TILE_KV;
    let row = tile / tiles_kv % tiles_q * ROWS;
    let head = tile / tiles_kv / tiles_q;
    let bh = batch_head(head);
    let len_k = key_length(bh.x);
    let row_end = min(row + ROWS, params.row_count);
    let seen = tile_kv_range(bh.x, params.row_first + row, params.row_first + row_end, len_k);
    if first_key >= seen.y || first_key + TILE_KV <= seen.x {
        return;
    }

    // Past the edges the last key and the last query are read again, and nothing is written.
    var query: array<u32, ROWS>;
    var key: array<u32, KEYS>;
    var dots: array<f32, ROWS * KEYS>;
    for (var r = 0u; r < ROWS; r += 1u) {
        query[r] = query_row(head, min(row + r, params.row_count - 1u));
    }
    for (var c = 0u; c < KEYS; c += 1u) {
        key[c] = row_k(bh.x, key_head(bh.y), min(first_key + lane + c * LANES, len_k - 1u));
    }
    for (var d = 0u; d < compared_dim(); d += 4u) {
        let by = pair_weights(bh.y, d);
        var k = array<vec4<f32>, KEYS>();
        for (var c = 0u; c < KEYS; c += 1u) {
            k[c] = load4_k(key[c], d);
        }
        for (var r = 0u; r < ROWS; r += 1u) {
            let q = load4_q(query[r], d);
            for (var c = 0u; c < KEYS; c += 1u) {
                let at = r * KEYS + c;
                // A quad's products are summed apart: a chain of 256 would cost a digit.
                dots[at] += pair(q, k[c], by);
            }
        }
    }

    for (var r = 0u; r < ROWS; r += 1u) {
        if row + r < params.row_count {
            let i = params.row_first + row + r;
            let range = kv_range(bh.x, i, len_k);
            for (var c = 0u; c < KEYS; c += 1u) {
                let j = first_key + lane + c * LANES;
                if j < params.score_stride {
                    let at = (head * params.row_count + row + r) * params.score_stride + j;
                    scores[at] = finish_score(dots[r * KEYS + c], bh.x, bh.y, i, j, range, len_k, TILE_MIXED);
                }
            }
        }
    }
}
