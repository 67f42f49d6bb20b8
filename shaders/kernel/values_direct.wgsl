// Values, straight from storage: (seq_q, seq_kv) @ (seq_kv, head_dim_v) -> (seq_q, head_dim_v).
//
// A thread owns four neighbours of VALUES_ROWS output rows; a workgroup owns VALUES_ROWS queries and
// LANES such quads. The weights are read at workgroup-uniform addresses, VALUES_STEP = 4 keys at a
// time; no workgroup memory, no barrier. Sums run in two levels; what the outer one cannot take of an
// inner one begins the next (Neumaier 1974), so that the rounding error of a long row does not grow with it.

@group(0) @binding(11) var<storage, read> weights: array<vec4<f32>>;

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let tiles_d = div_ceil(params.head_dim_v, 4u * LANES);
    let tiles_q = div_ceil(params.row_count, VALUES_ROWS);
    let tile = linear_group(group, groups);
    if tile >= tiles_d * tiles_q * params.head_count {
        return;
    }
    let d = (tile % tiles_d * LANES + lane) * 4u;
    let row = tile / tiles_d % tiles_q * VALUES_ROWS;
    let head = tile / tiles_d / tiles_q;
    let bh = batch_head(head);
    let kv_head = bh.y / params.group_size;
    let len_k = key_length(bh.x);
    let visited = own_part(values_range(bh.x, row, len_k));
    if d >= params.head_dim_v {
        return;
    }

    var at: array<u32, VALUES_ROWS>;
    var acc: array<vec4<f32>, VALUES_ROWS>;
    var part: array<vec4<f32>, VALUES_ROWS>;
    for (var r = 0u; r < VALUES_ROWS; r += 1u) {
        at[r] = (head * params.row_count + min(row + r, params.row_count - 1u)) * params.score_stride;
    }
    var j = visited.x;
    while j < visited.y {
        for (var n = 0u; n < 8u && j < visited.y; n += 1u) {
            // Weights at and beyond len_k are dropped ones: any finite value does there.
            let v0 = load4_v(row_v(bh.x, kv_head, min(j, len_k - 1u)), d);
            let v1 = load4_v(row_v(bh.x, kv_head, min(j + 1u, len_k - 1u)), d);
            let v2 = load4_v(row_v(bh.x, kv_head, min(j + 2u, len_k - 1u)), d);
            let v3 = load4_v(row_v(bh.x, kv_head, min(j + 3u, len_k - 1u)), d);
            for (var r = 0u; r < VALUES_ROWS; r += 1u) {
                let p = weights[(at[r] + j) / 4u];
                var x = part[r];
                x = fma(vec4<f32>(p.x), v0, x);
                x = fma(vec4<f32>(p.y), v1, x);
                x = fma(vec4<f32>(p.z), v2, x);
                part[r] = fma(vec4<f32>(p.w), v3, x);
            }
            j += VALUES_STEP;
        }
        for (var r = 0u; r < VALUES_ROWS; r += 1u) {
            let sum = acc[r] + part[r];
            part[r] = left_over(acc[r], part[r], sum);
            acc[r] = sum;
        }
    }

    for (var r = 0u; r < VALUES_ROWS; r += 1u) {
        if row + r < params.row_count && is_query(bh.x, params.row_first + row + r) {
            var sum = acc[r];
            if !is_finite4(sum) {
                sum = careful_value(at[r], visited, bh.x, kv_head, len_k, d);
            }
            let index = head * params.row_count + row + r;
            finish_value(index, row_o(bh.x, bh.y, params.row_first + row + r), d, sum);
        }
    }
}
