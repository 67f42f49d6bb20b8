// OPERAND as rows of f32, padded to whole vec4s (with zeros, or with what codes hold beyond the width), into scratch:
// for a kernel that reads each row many times, on adapters where a conversion, or an element that lies by itself,
// takes as long as a multiplication.
//
// A thread owns a key; a workgroup LANES of one head. No workgroup memory, no barriers. (Adapters on a CPU store lane by
// lane in any case; that a thread's quads are neighbours spares a division for each.)

@group(0) @binding(BINDING) var<storage, read_write> unpacked: array<vec4<f32>>;

@compute @workgroup_size(LANES)
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
    let row = row_OPERAND(bh.x, bh.y / params.group_size, j);
    let quads = params.unpacked_OPERAND / 4u;
    let begin = key_term(bh.x, bh.y, j) * quads;
    for (var i = 0u; i < quads; i += 1u) {
        unpacked[begin + i] = load4_OPERAND(row, 4u * i);
    }
}
