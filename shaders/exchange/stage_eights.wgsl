// How K and V get into workgroup memory where they are f16 already: eight numbers, 16 bytes, at a time.

const D_EIGHTS = D_QUADS / 2u;
const V_EIGHTS = V_QUADS / 2u;

// K, a row a key. Keys past the end repeat the last one.
fn stage_k(thread: u32, nought: u32, b: u32, kv_head: u32, first: u32, len_k: u32) {
    for (var at = thread; at < TILE_KV * D_EIGHTS + nought; at += THREADS) {
        let r = at / D_EIGHTS;
        let e = at % D_EIGHTS;
        var k = Eight_k();
        if WHOLE_D == 1u || 8u * e < params.head_dim {
            k = load8_k(row_k(b, kv_head, min(first + r, len_k - 1u)), 8u * e);
        }
        put_kv(r * K_STRIDE + 2u * e, k.low);
        put_kv(r * K_STRIDE + 2u * e + 1u, k.high);
    }
}

// Whether the sum of eight sizes is finite, as it is unless one of them is not, or is large.
fn have_finite_sum(v: Eight_v) -> bool {
    let four = abs(v.low) + abs(v.high);
    let two = four.xy + four.zw;
    return is_finite(f32(two.x) + f32(two.y));
}

// Eight columns of a value, for a product with weights: 0 * NaN is NaN, also where the key is dropped, so that quads
// that are not finite are added by themselves.
fn value_eight(b: u32, kv_head: u32, key: u32, len_k: u32, d: u32) -> Eight_v {
    var v = Eight_v();
    if key < len_k && (WHOLE_V == 1u || d < params.head_dim_v) {
        v = load8_v(row_v(b, kv_head, key), d);
    }
    if !have_finite_sum(v) {
        let low = is_finite4(vec4<f32>(v.low));
        let high = is_finite4(vec4<f32>(v.high));
        if !low || !high {
            v = Eight_v(select(vec4<f16>(), v.low, low), select(vec4<f16>(), v.high, high));
            atomicStore(&wg_leaves, 1u);
            atomicStore(&wg_careful, 1u);
        }
    }
    return v;
}

// V turned over, a row a column, by blocks of four keys and eight columns. Neighbours read whole sectors (16 rows by
// 32 bytes), and write to different banks.
fn stage_v(thread: u32, nought: u32, b: u32, kv_head: u32, first: u32, len_k: u32) {
    for (var at = thread; at < KEY_QUADS * V_EIGHTS + nought; at += THREADS) {
        let block = block_of_v(at, V_EIGHTS, 16u);
        let d = 8u * block.x;
        let key = first + 4u * block.y;
        let v0 = value_eight(b, kv_head, key, len_k, d);
        let v1 = value_eight(b, kv_head, key + 1u, len_k, d);
        let v2 = value_eight(b, kv_head, key + 2u, len_k, d);
        let v3 = value_eight(b, kv_head, key + 3u, len_k, d);
        let to = d * V_STRIDE + block.y;
        //$ for c in 0..4
        put_kv(to + $cu * V_STRIDE, vec4<f16>(v0.low[$c], v1.low[$c], v2.low[$c], v3.low[$c]));
        put_kv(to + (4u + $cu) * V_STRIDE, vec4<f16>(v0.high[$c], v1.high[$c], v2.high[$c], v3.high[$c]));
        //$ end
    }
}
