// q' = q / max(|q|, 1e-8), the query's half of the cosine similarity, into scratch: (seq_q, head_dim).
//
// A thread owns a row; a workgroup LANES of them, in order. No workgroup memory, no barriers. Small beside
// the scores.

@group(0) @binding(15) var<storage, read_write> projected: array<vec4<f32>>;

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = linear_group(group, groups) * LANES + lane;
    if index >= params.head_count * params.row_count {
        return;
    }
    let q = query_row(index / params.row_count, index % params.row_count);
    // Four sums each: rounding drifts with the length of a chain of additions.
    var sums = vec4<f32>();
    var shrunk = vec4<f32>();
    for (var d = 0u; d < params.head_dim; d += 4u) {
        let x = load4_q(q, d);
        sums = fma(x, x, sums);
        shrunk = fma(SHRINK * x, SHRINK * x, shrunk);
    }
    let unit = to_unit(sum4(sums), sum4(shrunk));
    let first = index * (params.projected_stride / 4u);
    for (var d = 0u; d < params.head_dim; d += 4u) {
        projected[first + d / 4u] = load4_q(q, d) * unit.x / unit.y;
    }
}
