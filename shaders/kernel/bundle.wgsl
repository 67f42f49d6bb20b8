// Everything that is a list into one buffer, in the order of shaders/io/list_bundled.wgsl: where a device
// binds too few buffers for a fused kernel with every option. A list that the problem lacks is zeros.
//
// A thread owns one word. No workgroup memory, no barriers.

@group(0) @binding(17) var<storage, read_write> bundle_out: array<u32>;

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = linear_group(group, groups) * LANES + lane;
    let heads = params.heads_q;
    let entries = params.batch;
    if index < heads {
        bundle_out[index] = read_alibi_slopes(index);
    } else if index < 2u * heads {
        bundle_out[index] = read_sinks(index - heads);
    } else if index < 2u * heads + entries {
        bundle_out[index] = read_kv_lens(index - 2u * heads);
    } else if index < 2u * heads + 2u * entries + 1u {
        bundle_out[index] = read_cu_seqlens_q(index - 2u * heads - entries);
    } else if index < 2u * heads + 3u * entries + 2u {
        bundle_out[index] = read_cu_seqlens_k(index - 2u * heads - 2u * entries - 1u);
    } else if index < arrayLength(&bundle_out) {
        bundle_out[index] = read_block_table(index - 2u * heads - 3u * entries - 2u);
    }
}
