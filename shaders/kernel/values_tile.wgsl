// Values through workgroup memory: (seq_q, seq_kv) @ (seq_kv, head_dim_v) -> (seq_q, head_dim_v).
//
// A workgroup of SIDE x SIDE threads owns VALUES_ROWS = 4 SIDE queries and SIDE quads of head_dim_v;
// a thread owns one quad of four rows, spread by SIDE. VALUES_STEP keys are staged at a time:
// VALUES_ROWS (VALUES_STEP / 4 + 1) + SIDE VALUES_STEP vec4 of workgroup memory, two barriers a
// step. Each step has a sum of its own; what the total cannot take of it begins the next (Neumaier 1974), so that the
// rounding error of a long row does not grow with it.

const QUADS = VALUES_STEP / 4u;
const SKEW = QUADS + 1u;

@group(0) @binding(11) var<storage, read> weights: array<vec4<f32>>;

var<workgroup> wg_weights: array<vec4<f32>, VALUES_ROWS * SKEW>;
var<workgroup> wg_v: array<vec4<f32>, VALUES_STEP * SIDE>;

@compute @workgroup_size(SIDE, SIDE)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let tiles_d = div_ceil(params.head_dim_v, 4u * SIDE);
    let tiles_q = div_ceil(params.row_count, VALUES_ROWS);
    let tile = linear_group(group, groups);
    if tile >= tiles_d * tiles_q * params.head_count {
        return;
    }
    let first_d = tile % tiles_d * SIDE * 4u;
    let row = tile / tiles_d % tiles_q * VALUES_ROWS;
    let head = tile / tiles_d / tiles_q;
    let bh = batch_head(head);
    let kv_head = bh.y / params.group_size;
    let len_k = key_length(bh.x);
    let visited = own_part(values_range(bh.x, row, len_k));

    var acc: array<vec4<f32>, 4>;
    var part: array<vec4<f32>, 4>;
    for (var j = visited.x; j < visited.y; j += VALUES_STEP) {
        for (var at = lane; at < VALUES_ROWS * QUADS; at += SIDE * SIDE) {
            let r = min(row + at / QUADS, params.row_count - 1u);
            let base = (head * params.row_count + r) * params.score_stride + j;
            wg_weights[at / QUADS * SKEW + at % QUADS] = weights[base / 4u + at % QUADS];
        }
        for (var at = lane; at < VALUES_STEP * SIDE; at += SIDE * SIDE) {
            let key = j + at / SIDE;
            let d = first_d + at % SIDE * 4u;
            var v = vec4<f32>();
            if key < len_k && d < params.head_dim_v {
                v = load4_v(row_v(bh.x, kv_head, key), d);
            }
            wg_v[at] = v;
        }
        workgroupBarrier();
        for (var e = 0u; e < QUADS; e += 1u) {
            let v0 = wg_v[(4u * e) * SIDE + local.x];
            let v1 = wg_v[(4u * e + 1u) * SIDE + local.x];
            let v2 = wg_v[(4u * e + 2u) * SIDE + local.x];
            let v3 = wg_v[(4u * e + 3u) * SIDE + local.x];
            for (var r = 0u; r < 4u; r += 1u) {
                let p = wg_weights[(local.y + r * SIDE) * SKEW + e];
                part[r] += p.x * v0 + p.y * v1 + p.z * v2 + p.w * v3;
            }
        }
        for (var r = 0u; r < 4u; r += 1u) {
            let sum = acc[r] + part[r];
            part[r] = left_over(acc[r], part[r], sum);
            acc[r] = sum;
        }
        workgroupBarrier();
    }

    let d = first_d + local.x * 4u;
    for (var r = 0u; r < 4u; r += 1u) {
        let query = row + local.y + r * SIDE;
        if query < params.row_count && d < params.head_dim_v && is_query(bh.x, params.row_first + query) {
            let index = head * params.row_count + query;
            var sum = acc[r];
            if !is_finite4(sum) {
                sum = careful_value(index * params.score_stride, visited, bh.x, kv_head, len_k, d);
            }
            finish_value(index, row_o(bh.x, bh.y, params.row_first + query), d, sum);
        }
    }
}
