// q' = Wq q, the query's half of the additive similarity (Bahdanau 2014), into scratch:
//   (seq_q, query_dim) @ (query_dim, hidden) -> (seq_q, hidden)
//
// A thread owns four neighbours of one row; a workgroup LANES of such quads, in order. No workgroup
// memory, no barriers. Small beside
// the scores: Wq is read by every row, from the cache.

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
    let row = index / quads % params.row_count;
    let head = index / quads / params.row_count;
    let matrix = batch_head(head).y * params.w_head_stride;
    projected[index] = product4(query_row(head, row), matrix, index % quads * 4u);
}
