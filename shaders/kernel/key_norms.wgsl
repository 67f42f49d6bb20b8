// 1 / max(|k|, 1e-8), the key's half of the cosine similarity, into scratch: a number for each key of each
// head that the chunk's queries read.
//
// A thread owns a key; a workgroup KEYS of one head. No workgroup memory, no barriers. It reads all keys
// once more: beside many queries that is little, in a step of decoding a third or so of all that is read.

@group(0) @binding(39) var<storage, read_write> key_terms: array<f32>;

@compute @workgroup_size(KEYS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let own = own_key(linear_group(group, groups), lane);
    let bh = own.xy;
    let j = own.z;
    // Rows beyond the keys may hold anything, or not exist.
    if j >= key_length(bh.x) {
        return;
    }
    let k = row_k(bh.x, bh.y / params.group_size, j);
    var sums = vec4<f32>();
    var shrunk = vec4<f32>();
    for (var d = 0u; d < params.head_dim; d += 4u) {
        // Codes beyond the width are not 0.
        let inside = vec4<u32>(d, d + 1u, d + 2u, d + 3u) < vec4<u32>(params.head_dim);
        let x = select(vec4<f32>(), load4_k(k, d), inside);
        sums = fma(x, x, sums);
        shrunk = fma(SHRINK * x, SHRINK * x, shrunk);
    }
    let unit = to_unit(sum4(sums), sum4(shrunk));
    key_terms[key_term(bh.x, bh.y, j)] = unit.x / unit.y;
}
