// How K and V get into workgroup memory as f16: a quad at a time.

// K, a row a key. Keys past the end repeat the last one.
fn stage_k(thread: u32, nought: u32, b: u32, kv_head: u32, first: u32, len_k: u32) {
    for (var at = thread; at < TILE_KV * D_QUADS + nought; at += THREADS) {
        let r = at / D_QUADS;
        let e = at % D_QUADS;
        var k = vec4<f32>();
        if WHOLE_D == 1u || 4u * e < params.head_dim {
            k = load4_k(row_k(b, kv_head, min(first + r, len_k - 1u)), 4u * e);
        }
        // Codes reach further than f16: -65504 has a lowest value of -65536, whose f16 were an infinity.
        let nearest = clamp(k, vec4<f32>(-MOST_F16), vec4<f32>(MOST_F16));
        put_kv(r * K_STRIDE + e, vec4<f16>(select(k, nearest, is_finite4(k))));
    }
}

// Four columns of a value, for a product with weights: 0 * NaN is NaN, also where the key is dropped, so that quads
// that are not finite as f16 are added by themselves.
fn value_quad(b: u32, kv_head: u32, key: u32, len_k: u32, d: u32) -> vec4<f32> {
    var v = vec4<f32>();
    if key < len_k && (WHOLE_V == 1u || d < params.head_dim_v) {
        v = load4_v(row_v(b, kv_head, key), d);
    }
    if !are_within_f16(v) {
        v = vec4<f32>();
        atomicStore(&wg_leaves, 1u);
        atomicStore(&wg_careful, 1u);
    }
    return v;
}

// V turned over, a row a column, by blocks of four keys and four columns. Neighbours read whole sectors (8 rows by
// 32 bytes), and write to different banks.
fn stage_v(thread: u32, nought: u32, b: u32, kv_head: u32, first: u32, len_k: u32) {
    for (var at = thread; at < KEY_QUADS * V_QUADS + nought; at += THREADS) {
        let block = block_of_v(at, V_QUADS, 8u);
        let d = 4u * block.x;
        let quad = block.y;
        let key = first + 4u * quad;
        let v = transpose(mat4x4<f32>(
            value_quad(b, kv_head, key, len_k, d),
            value_quad(b, kv_head, key + 1u, len_k, d),
            value_quad(b, kv_head, key + 2u, len_k, d),
            value_quad(b, kv_head, key + 3u, len_k, d),
        ));
        for (var c = 0u; c < 4u; c += 1u) {
            put_kv((d + c) * V_STRIDE + quad, vec4<f16>(v[c]));
        }
    }
}
