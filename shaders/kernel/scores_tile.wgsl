// Scores through workgroup memory: (seq_q, head_dim) @ (head_dim, seq_kv) -> (seq_q, seq_kv).
//
// A workgroup of SIDE x SIDE threads owns TILE x TILE scores, TILE = 4 SIDE; a thread owns 4 x 4 of
// them, spread by SIDE so that neighbours store neighbours. STEP quads of head_dim are staged at a
// time: 2 TILE (STEP + 1) vec4 of workgroup memory (the one more keeps rows in different banks), two
// barriers a step. Tiles that no query of theirs sees are left unwritten; the softmax never reads
// them.

const TILE = 4u * SIDE;
const SKEW = STEP + 1u;

@group(0) @binding(11) var<storage, read_write> scores: array<f32>;

var<workgroup> wg_q: array<vec4<f32>, TILE * SKEW>;
var<workgroup> wg_k: array<vec4<f32>, TILE * SKEW>;

@compute @workgroup_size(SIDE, SIDE)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let tiles_kv = div_ceil(params.seq_kv, TILE);
    let tiles_q = div_ceil(params.row_count, TILE);
    let tile = linear_group(group, groups);
    if tile >= tiles_kv * tiles_q * params.head_count {
        return;
    }
    let first_key = tile % tiles_kv * TILE;
    let row = tile / tiles_kv % tiles_q * TILE;
    let head = tile / tiles_kv / tiles_q;
    let bh = batch_head(head);
    let len_k = key_length(bh.x);
    let row_end = min(row + TILE, params.row_count);
    let seen = tile_kv_range(bh.x, params.row_first + row, params.row_first + row_end, len_k);
    if first_key >= seen.y || first_key + TILE <= seen.x {
        return;
    }

    var dots: array<vec4<f32>, 4>; // one vector of four keys for each of four queries
    for (var d = 0u; d < compared_dim(); d += 4u * STEP) {
        for (var at = lane; at < TILE * STEP; at += SIDE * SIDE) {
            // Past the edges the last query and key are read again; beyond the width lie zeros.
            let r = at / STEP;
            let e = d + at % STEP * 4u;
            var q = vec4<f32>();
            var k = vec4<f32>();
            if e < compared_dim() {
                q = load4_q(query_row(head, min(row + r, params.row_count - 1u)), e);
                k = load4_k(row_k(bh.x, key_head(bh.y), min(first_key + r, len_k - 1u)), e);
            }
            wg_q[r * SKEW + at % STEP] = q;
            wg_k[r * SKEW + at % STEP] = k;
        }
        workgroupBarrier();
        for (var e = 0u; e < STEP; e += 1u) {
            let k0 = wg_k[local.x * SKEW + e];
            let k1 = wg_k[(local.x + SIDE) * SKEW + e];
            let k2 = wg_k[(local.x + 2u * SIDE) * SKEW + e];
            let k3 = wg_k[(local.x + 3u * SIDE) * SKEW + e];
            let by = pair_weights(bh.y, d + 4u * e);
            for (var r = 0u; r < 4u; r += 1u) {
                let q = wg_q[(local.y + r * SIDE) * SKEW + e];
                dots[r] += vec4<f32>(pair(q, k0, by), pair(q, k1, by), pair(q, k2, by), pair(q, k3, by));
            }
        }
        workgroupBarrier();
    }

    for (var r = 0u; r < 4u; r += 1u) {
        let query = row + local.y + r * SIDE;
        if query < params.row_count {
            let i = params.row_first + query;
            let range = kv_range(bh.x, i, len_k);
            for (var c = 0u; c < 4u; c += 1u) {
                let j = first_key + local.x + c * SIDE;
                if j < params.score_stride {
                    let at = (head * params.row_count + query) * params.score_stride + j;
                    scores[at] = finish_score(component(dots[r], c), bh.x, bh.y, i, j, range, len_k, TILE_MIXED);
                }
            }
        }
    }
}
