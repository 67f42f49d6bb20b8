// OPERAND as rows of f32, padded to whole vec4s (with zeros, or with what codes hold beyond the width), into scratch:
// for a kernel that reads each row many times, on adapters where a conversion, or an element that lies by itself,
// takes as long as a multiplication.
//
// A workgroup of one thread owns KEYS keys of one head. Such an adapter takes several cycles for each lane of a store
// whose address differs from lane to lane, and one or two for a store that has one address; and it asks the mask of a
// loop once for all TURN quads of a turn. (Half of the time that a thread for each key takes.)

@group(0) @binding(BINDING) var<storage, read_write> unpacked: array<vec4<f32>>;

@compute @workgroup_size(1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    let own = own_key(linear_group(group, groups), 0u);
    let bh = own.xy;
    // Rows beyond the keys may hold anything, or not exist.
    let len_k = key_length(bh.x);
    if own.z >= len_k {
        return;
    }
    let end = min(own.z + KEYS, len_k);
    for (var j = own.z; j < end; j += 1u) {
        let row = row_OPERAND(bh.x, bh.y / params.group_size, j);
        let begin = unpacked_row(bh.x, bh.y, j) * QUADS;
        // (The problem's width, since a constant bound is unrolled.)
        for (var turn = 0u; turn < div_ceil(params.WIDTH, 4u * TURN); turn += 1u) {
            // The last turn is a whole one, too: some quads are stored twice.
            let first = min(turn * TURN, QUADS - TURN);
            //$ for i in 0..TURN
            unpacked[begin + first + $iu] = load4_OPERAND(row, 4u * (first + $iu));
            //$ end
        }
    }
    // What is left of the last step weighs nothing, and must be no NaN.
    let behind = unpacked_row(bh.x, bh.y, end) * QUADS;
    for (var i = 0u; i < (whole_steps(end) - end) * QUADS; i += 1u) {
        unpacked[behind + i] = vec4<f32>();
    }
}
