// The weights matrix, on request: weight = exp(score - row_max) / row_sum, [B, Hq, Sq, Sk].
//
// A thread owns one weight; keys that the value kernel does not visit have a weight of 0. No
// workgroup memory, no barriers.

@group(0) @binding(11) var<storage, read> weights: array<f32>;
@group(0) @binding(13) var<storage, read_write> weights_out: array<f32>;
@group(0) @binding(14) var<storage, read> inverse_sums: array<f32>;

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let tiles_kv = div_ceil(params.seq_kv, LANES);
    let tile = linear_group(group, groups);
    let j = tile % tiles_kv * LANES + lane;
    let index = tile / tiles_kv;
    if index >= params.head_count * params.row_count || j >= params.seq_kv {
        return;
    }
    let head = index / params.row_count;
    let row = index % params.row_count;
    let b = batch_head(head).x;
    let visited = values_range(b, row, key_length(b));
    var weight = 0.0;
    if j >= visited.x && j < visited.y && is_query(b, params.row_first + row) {
        let p = weights[index * params.score_stride + j];
        weight = select(p * inverse_sums[index], 0.0, is_dropped_weight(p));
    }
    let i = (params.head_first + head) * params.seq_q + params.row_first + row;
    weights_out[i * params.seq_kv + j] = weight;
}
