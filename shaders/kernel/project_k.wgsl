// k' = Wk k, the key's half of the additive similarity (Bahdanau 2014), into scratch:
//   (seq_kv, head_dim) @ (head_dim, hidden) -> (seq_kv, hidden)
// for each head of keys that the chunk's queries read; for each query head, where each has its own Wk.
//
// A thread owns four neighbours of one row; a workgroup LANES of such quads, in order. No workgroup
// memory, no barriers.

@group(0) @binding(39) var<storage, read_write> key_terms: array<vec4<f32>>;

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let quads = params.projected_stride / 4u;
    let index = linear_group(group, groups) * LANES + lane;
    if index >= key_heads() * params.seq_kv * quads {
        return;
    }
    let j = index / quads % params.seq_kv;
    let bh = entry_and_head(index / quads / params.seq_kv);
    // Rows beyond the keys may hold anything, or not exist.
    if j >= key_length(bh.x) {
        return;
    }
    let row = row_k(bh.x, bh.y / params.group_size, j);
    key_terms[index] = product4(row, bh.y * params.wk_head_stride, index % quads * 4u);
}
