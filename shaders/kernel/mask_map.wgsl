// The map of a boolean mask, once a call: what the fused kernels may skip, and where they need not ask.
//
//   tile = DROPPED if no pair of it is kept, KEPT if all are, else MIXED
//
// A workgroup makes one word: it reads MAP_Q rows of 16 MAP_KV keys, four keys a lane at a time and
// neighbouring lanes at neighbouring keys, and gathers for each of the 16 tiles whether something is
// kept and whether something is dropped. 8 bytes of workgroup memory, two barriers.

@group(0) @binding(18) var<storage, read_write> mask_map_out: array<u32>;

// A bit for each tile.
var<workgroup> wg_keeps: atomic<u32>;
var<workgroup> wg_drops: atomic<u32>;

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let words = map_row_words();
    let index = linear_group(group, groups);
    let tiles = div_ceil(map_rows(), MAP_Q);
    let head = index / words / tiles;
    let bh = vec2<u32>(head / map_heads(), head % map_heads());
    let row = index / words % tiles * MAP_Q;
    let first_key = index % words * MAP_WORD_KEYS;
    // The surplus of a folded dispatch has no rows to read and nothing to store.
    let exists = index < arrayLength(&mask_map_out);
    let row_end = select(row, min(row + MAP_Q, map_rows()), exists);

    if lane == 0u {
        atomicStore(&wg_keeps, 0u);
        atomicStore(&wg_drops, 0u);
    }
    workgroupBarrier();
    for (var at = 4u * lane; at < MAP_WORD_KEYS && first_key + at < params.seq_kv; at += 4u * LANES) {
        let key = first_key + at;
        let keys = min(4u, params.seq_kv - key);
        let begin = row_mask(bh.x, bh.y, row) + key * params.mask_stride_d;
        var keeps = false;
        var drops = false;
        // Both paths outside the loop over rows: an adapter that runs lanes in lockstep walks both.
        if keys == 4u && params.mask_stride_d == 1u && ((begin | params.mask_stride_s) & 3u) == 0u {
            var any = 0u;
            var zeros = 0u;
            for (var i = 0u; i < row_end - row; i += 1u) {
                let four = mask_data[(begin + i * params.mask_stride_s) / 4u];
                any |= four;
                // Not zero if and only if one of the bytes is.
                zeros |= (four - 0x01010101u) & ~four & 0x80808080u;
            }
            keeps = any != 0u;
            drops = zeros != 0u;
        } else {
            for (var i = row; i < row_end; i += 1u) {
                for (var c = 0u; c < keys; c += 1u) {
                    let kept = mask_keeps(bh.x, bh.y, i, key + c);
                    keeps = keeps || kept;
                    drops = drops || !kept;
                }
            }
        }
        let bit = 1u << (at / MAP_KV);
        atomicOr(&wg_keeps, select(0u, bit, keeps));
        atomicOr(&wg_drops, select(0u, bit, drops));
    }
    workgroupBarrier();
    if lane == 0u && exists {
        let keeps = atomicLoad(&wg_keeps);
        let drops = atomicLoad(&wg_drops);
        var word = 0u;
        for (var t = 0u; t < 16u; t += 1u) {
            let kept = (keeps >> t) & 1u;
            let mixed = kept & (drops >> t);
            word |= select(TILE_KEPT * kept, TILE_MIXED, mixed == 1u) << (2u * t);
        }
        mask_map_out[index] = word;
    }
}
