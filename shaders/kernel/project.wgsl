// q' = qT W, the bilinear similarity's left half (Luong 2015, eq. 8 "general"):
//   (seq_q, query_dim) @ (query_dim, head_dim) -> (seq_q, head_dim), into scratch.
//
// A thread owns four neighbours of one row; a workgroup LANES of such quads, in order. No workgroup
// memory, no barriers. Small beside the scores: W is read by every row, from the cache.

@group(0) @binding(12) var<storage, read> w_data: array<f32>;
@group(0) @binding(15) var<storage, read_write> projected: array<vec4<f32>>;

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let quads = params.projected_stride / 4u;
    let index = linear_group(group, groups) * LANES + lane;
    if index >= params.head_count * params.row_count * quads {
        return;
    }
    let d = index % quads * 4u;
    let row = index / quads % params.row_count;
    let head = index / quads / params.row_count;
    let q = query_row(head, row);
    let w = batch_head(head).y * params.w_head_stride;
    let valid = vec4<u32>(d, d + 1u, d + 2u, d + 3u) < vec4<u32>(params.head_dim);

    var acc = vec4<f32>();
    for (var c = 0u; c < params.query_dim; c += 4u) {
        let q4 = load4_q(q, c);
        for (var i = 0u; i < min(4u, params.query_dim - c); i += 1u) {
            let at = w + (c + i) * params.head_dim + d;
            var w4 = vec4<f32>();
            for (var e = 0u; e < 4u; e += 1u) {
                if valid[e] {
                    w4[e] = w_data[at + e];
                }
            }
            acc = fma(vec4<f32>(q4[i]), w4, acc);
        }
    }
    projected[index] = acc;
}
