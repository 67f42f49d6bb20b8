// The batch entry, the first query head and the key of a thread, where a workgroup owns KEYS keys of one of the chunk's
// heads of keys; the key is seq_kv where there is none for it.
fn own_key(group: u32, lane: u32) -> vec3<u32> {
    let tiles = div_ceil(params.seq_kv, KEYS);
    let bh = entry_and_head(min(group / tiles, key_heads() - 1u));
    return vec3<u32>(bh, select(params.seq_kv, group % tiles * KEYS + lane, group < tiles * key_heads()));
}
