@group(0) @binding(BINDING) var<storage, read> kv_lens: array<u32>;

// The host cannot see these numbers: one beyond the keys that exist counts as all of them.
fn key_length(b: u32) -> u32 {
    return min(kv_lens[b], params.seq_kv);
}
