// How K and V get into workgroup memory where they are f16 already: eight numbers, 16 bytes, at a time. V comes as words,
// for its numbers to be paired anew and looked at; naga has no other way from words to f16 than by f32, which some compilers
// leave out.

const D_EIGHTS = D_QUADS / 2u;
const V_EIGHTS = V_QUADS / 2u;

fn halves(words: vec2<u32>) -> vec4<f16> {
    return vec4<f16>(vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y)));
}

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

// What is not 0 where one of a word's two numbers is not finite: its exponent is all ones, and one more there carries
// into the place of the sign.
fn not_finite_bits(words: vec4<u32>) -> vec4<u32> {
    return ((words & vec4<u32>(0x7fff7fffu)) + vec4<u32>(0x04000400u)) & vec4<u32>(0x80008000u);
}

// Eight columns of a value, for a product with weights: 0 * NaN is NaN, also where the key is dropped, so that quads
// that are not finite are added by themselves.
fn value_eight(b: u32, kv_head: u32, key: u32, len_k: u32, d: u32) -> vec4<u32> {
    var v = vec4<u32>();
    if key < len_k && (WHOLE_V == 1u || d < params.head_dim_v) {
        v = load8_v(row_v(b, kv_head, key), d);
    }
    let bits = not_finite_bits(v);
    if (bits.x | bits.y | bits.z | bits.w) != 0u {
        let low = (bits.x | bits.y) == 0u;
        let high = (bits.z | bits.w) == 0u;
        v = select(vec4<u32>(), v, vec4<bool>(low, low, high, high));
        atomicStore(&wg_leaves, 1u);
        atomicStore(&wg_careful, 1u);
    }
    return v;
}

// V turned over, a row a column, by blocks of four keys and eight columns. Neighbours read whole sectors (16 rows by
// 32 bytes), and write to different banks.
fn stage_v(thread: u32, nought: u32, b: u32, kv_head: u32, first: u32, len_k: u32) {
    for (var at = thread; at < KEY_QUADS * V_EIGHTS + nought; at += THREADS) {
        let block = block_of_v(at, V_EIGHTS, 16u);
        let d = 8u * block.x;
        let quad = block.y;
        let key = first + 4u * quad;
        let v0 = value_eight(b, kv_head, key, len_k, d);
        let v1 = value_eight(b, kv_head, key + 1u, len_k, d);
        let v2 = value_eight(b, kv_head, key + 2u, len_k, d);
        let v3 = value_eight(b, kv_head, key + 3u, len_k, d);
        for (var w = 0u; w < 4u; w += 1u) {
            let two = (d + 2u * w) * V_STRIDE + quad;
            let even = vec2<u32>((v0[w] & 0xffffu) | (v1[w] << 16u), (v2[w] & 0xffffu) | (v3[w] << 16u));
            let odd = vec2<u32>((v0[w] >> 16u) | (v1[w] & 0xffff0000u), (v2[w] >> 16u) | (v3[w] & 0xffff0000u));
            put_kv(two, halves(even));
            put_kv(two + V_STRIDE, halves(odd));
        }
    }
}
