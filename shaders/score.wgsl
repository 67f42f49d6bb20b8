// From a dot product to a score: what the similarity makes of it, scale, soft cap, bias, ALiBi, masks, in the
// contract's order.

// tanh to a few ULP everywhere. The built-in may be off by 1e-5 absolute, which a cap of 50 turns
// into 5e-4. Below 0.625 an odd polynomial (Cephes tanhf), above it the exponential form.
fn tanh_accurate(x: f32) -> f32 {
    let a = abs(x);
    let z = a * a;
    var p = -5.70498872745e-3;
    p = p * z + 2.06390887954e-2;
    p = p * z - 5.37397155531e-2;
    p = p * z + 1.33314422036e-1;
    p = p * z - 3.33332819422e-1;
    let small = a + a * z * p;
    let t = select(1.0 - below_one(a), small, a < SMALL);
    return select(t, -t, x < 0.0);
}

const SMALL: f32 = 0.625;

// 1 - tanh(a), of an `a` that is not small. Beyond 9 tanh is 1 in f32; the clamp keeps exp from overflowing.
fn below_one(a: f32) -> f32 {
    return 2.0 / (exp2(2.0 * LOG2_E * min(a, 16.0)) + 1.0);
}

// A NaN has no sign to select by and no side of 0.625: it goes round the polynomial.
fn soft_cap(s: f32) -> f32 {
    let capped = params.softcap * tanh_accurate(s / params.softcap);
    return select(capped, s, is_nan(s));
}

// Whether four scores are finite, and so small that it does not matter whether a compiler rounds `dot * scale` before a
// maximum is subtracted: fused, the largest score is up to 2^-5 above its own rounding at 2^20, and up to 512 at 1e10.
fn are_ordinary(s: vec4<f32>) -> bool {
    let size = abs(s);
    let sum = (size.x + size.y) + (size.z + size.w);
    // As bits: NaN and infinity lie above.
    return (bitcast<u32>(sum) & 0x7fffffffu) < bitcast<u32>(1048576.0);
}

// exp(s - m) of ordinary scores. Not by fma(s, log2(e), -m * log2(e)): the last product is rounded, the other is not, and
// the largest score would weigh something else than 1, which it weighs in steps at an edge.
fn exp_of_ordinary(s: vec4<f32>, m: f32) -> vec4<f32> {
    return exp2((s - m) * LOG2_E);
}

// The score of query `i` and key `j`, or DROPPED. `range` is kv_range(b, i), `tile` what the boolean mask
// does to the tile of the pair.
fn finish_score(
    dot: f32, b: u32, h: u32, i: u32, j: u32, range: vec2<u32>, len_k: u32, tile: u32,
) -> f32 {
    if j < range.x || j >= range.y {
        return DROPPED;
    }
    return finish_kept(dot, b, h, i, j, len_k, tile);
}

// The same for a key inside the range.
fn finish_kept(dot: f32, b: u32, h: u32, i: u32, j: u32, len_k: u32, tile: u32) -> f32 {
    if tile != TILE_KEPT && !mask_keeps(b, h, i, j) {
        return DROPPED;
    }
    let bias = load_bias(b, h, i, j);
    if is_excluded(bias) {
        return DROPPED;
    }
    var s = compared(dot, b, h, j) * params.scale;
    if SOFTCAP {
        s = soft_cap(s);
    }
    s += bias;
    s -= alibi(b, h, i, j, len_k);
    return select(max(s, LOWEST_KEPT), s, is_nan(s));
}
