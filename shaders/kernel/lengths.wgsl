// Keys of each batch entry, where something about them has to be looked after once a call: an entry ends
// before the first page that does not exist, and the status word (src/status.rs) gains what was wrong.
//
// A workgroup looks after one entry, its threads take turns at the blocks. 4 bytes of workgroup memory, two
// barriers.

@group(0) @binding(23) var<storage, read_write> lens_out: array<u32>;

// Blocks of an inner loop.
const LEVEL = 1024u * LANES;

// The first block whose page does not exist.
var<workgroup> wg_bad: atomic<u32>;

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let entry = linear_group(group, groups);
    // The surplus of a folded dispatch looks at the last entry again, and stores nothing.
    let b = min(entry, params.batch - 1u);
    let length = key_length(b);
    let blocks = blocks_of(length);
    if lane == 0u {
        atomicStore(&wg_bad, 0xffffffffu);
    }
    workgroupBarrier();
    // In two loops: lavapipe 22.3 leaves one after 65535 rounds.
    for (var level = 0u; level < blocks; level += LEVEL) {
        for (var block = level + lane; block < min(level + LEVEL, blocks); block += LANES) {
            if !is_page(b, block) {
                atomicMin(&wg_bad, block);
                break;
            }
        }
    }
    workgroupBarrier();
    if lane == 0u && entry < params.batch {
        let bad = atomicLoad(&wg_bad);
        var wrong = keys_wrong(b);
        wrong |= select(0u, STATUS_RAGGED, queries_wrong(b));
        wrong |= select(0u, STATUS_BLOCK, bad < blocks);
        lens_out[b] = keys_before(min(bad, blocks), length);
        report(wrong);
    }
}
