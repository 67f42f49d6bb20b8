// How many splits of the keys have any, for the dispatch that takes its size from here: workgroups along x, y
// and z, then the splits. Equal shares of at least split_least steps: a longer entry has no fewer.
//
// One workgroup; a thread looks at some entries' lengths. 4 bytes of workgroup memory, two barriers.

@group(0) @binding(28) var<storage, read_write> launch: array<u32>;

var<workgroup> wg_longest: atomic<u32>;

@compute @workgroup_size(LANES)
fn main(@builtin(local_invocation_index) lane: u32) {
    if lane == 0u {
        atomicStore(&wg_longest, 0u);
    }
    workgroupBarrier();
    var longest = 0u;
    for (var b = lane; b < params.batch; b += LANES) {
        longest = max(longest, key_length(b));
    }
    atomicMax(&wg_longest, longest);
    workgroupBarrier();
    if lane == 0u {
        // A window's keys, wherever it stands; it may begin inside a step.
        let window = u32(params.window_left) + u32(params.window_right) + params.seq_q;
        let keys = min(atomicLoad(&wg_longest), window);
        let steps = div_ceil(keys, params.split_step) + 1u;
        let splits = clamp(div_ceil(steps, params.split_least), 1u, params.splits);
        let groups = splits * params.split_tiles;
        let x = min(groups, params.most_groups);
        let y = div_ceil(groups, x);
        launch[0] = x;
        launch[1] = min(y, params.most_groups);
        launch[2] = div_ceil(y, params.most_groups);
        launch[3] = splits;
    }
}
