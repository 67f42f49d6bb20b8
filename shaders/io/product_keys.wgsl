// k' = Wk k, the key's half of the additive similarity (Bahdanau 2014), into scratch: (seq_kv, head_dim) @
// (head_dim, hidden), for each head of keys that the chunk's queries read; for each query head, where each
// has its own Wk.
@group(0) @binding(BINDING) var<storage, read_write> key_terms: array<vec4<f32>>;

// Rows beyond the keys may hold anything, or not exist.
var<private> owner_keys: u32;

fn enter_owner() {
    owner_bh = entry_and_head(owner);
    owner_w = owner_bh.y * params.wk_head_stride;
    owner_keys = key_length(owner_bh.x);
}

fn product_owners() -> u32 {
    return key_heads();
}

fn product_rows() -> u32 {
    return params.seq_kv;
}

fn x4(row: u32, k: u32) -> vec4<f32> {
    if row >= owner_keys {
        return vec4<f32>();
    }
    return load4_k(row_k(owner_bh.x, owner_bh.y / params.group_size, row), k);
}

fn end_quad(row: u32, quad: u32, sum: vec4<f32>) {
    let quads = params.projected_stride / 4u;
    if row < owner_keys && quad < quads {
        key_terms[(owner * params.seq_kv + row) * quads + quad] = kept(quad, sum);
    }
}
