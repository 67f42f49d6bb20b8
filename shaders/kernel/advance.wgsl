// Lengths grow by the new rows of each entry. A thread owns one entry.

@group(0) @binding(7) var<storage, read_write> kv_lens: array<u32>;

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let b = linear_group(group, groups) * LANES + lane;
    if b < params.batch {
        let count = query_count(b);
        // A length that no cache has stays one.
        kv_lens[b] = min(kv_lens[b], 0xffffffffu - count) + count;
    }
}
