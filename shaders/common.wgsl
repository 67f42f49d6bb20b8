// A score below every score that a kept key can have: it marks a dropped key. WGSL compilers may
// assume that no infinity exists, so the mark is finite, and kept scores are clamped above it.
const DROPPED: f32 = -3.4028234e38;
const LOWEST_KEPT: f32 = -3.4028232e38;
const LOG2_E: f32 = 1.4426950408889634;
const LN_2: f32 = 0.6931471805599453;
const NEG_INF_BITS: u32 = 0xff800000u;
// The weight of a dropped key: minus zero. It adds nothing, and it can be told from the plus zero
// of a kept key whose weight underflows (which must still spread a NaN in v).
const DROPPED_WEIGHT_BITS: u32 = 0x80000000u;

// Weights with the mark where keys are dropped. As bits: among floats FXC takes minus zero for the plus zero that it may
// have at hand.
fn marked(weights: vec4<f32>, dropped: vec4<bool>) -> vec4<f32> {
    return bitcast<vec4<f32>>(select(bitcast<vec4<u32>>(weights), vec4<u32>(DROPPED_WEIGHT_BITS), dropped));
}

fn is_dropped_weight(weight: f32) -> bool {
    return bitcast<u32>(weight) == DROPPED_WEIGHT_BITS;
}

// Bit tests, because `x != x` may be folded away.
fn is_nan(x: f32) -> bool {
    return (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u;
}

// Shifted: compilers know a mask of the exponent's bits for a test of infinity, which they may assume not to exist.
fn is_finite(x: f32) -> bool {
    return (bitcast<u32>(x) << 1u) < 0xff000000u;
}

fn is_finite4(x: vec4<f32>) -> bool {
    return all((bitcast<vec4<u32>>(x) << vec4<u32>(1u)) < vec4<u32>(0xff000000u));
}

// Workgroups are numbered in one dimension and folded over three, since each ends at 65535.
fn linear_group(id: vec3<u32>, count: vec3<u32>) -> u32 {
    return id.x + count.x * (id.y + count.y * id.z);
}

// sum + a . b in four operations where a processor has fused ones: `dot` and an addition are five.
fn add_dot(sum: f32, a: vec4<f32>, b: vec4<f32>) -> f32 {
    return fma(a.w, b.w, fma(a.z, b.z, fma(a.y, b.y, fma(a.x, b.x, sum))));
}

// The same of one vector and four.
fn add_dots(
    sums: vec4<f32>, a: vec4<f32>, b0: vec4<f32>, b1: vec4<f32>, b2: vec4<f32>, b3: vec4<f32>,
) -> vec4<f32> {
    return vec4<f32>(
        add_dot(sums.x, a, b0),
        add_dot(sums.y, a, b1),
        add_dot(sums.z, a, b2),
        add_dot(sums.w, a, b3),
    );
}

// A vector's component by its number, and the vector with another in its place. By selects and not by an index: DirectX's
// older compiler (FXC) makes a dot product with a unit vector of the one, which spreads a NaN and loses a zero's sign, and
// unrolls whatever stands around the other, or fails.
fn component(v: vec4<f32>, c: u32) -> f32 {
    return select(select(v.x, v.y, c == 1u), select(v.z, v.w, c == 3u), c > 1u);
}

fn with_component(v: vec4<f32>, c: u32, x: f32) -> vec4<f32> {
    return select(v, vec4<f32>(x), vec4<u32>(c) == vec4<u32>(0u, 1u, 2u, 3u));
}

fn div_ceil(a: u32, b: u32) -> u32 {
    return (a + b - 1u) / b;
}

// Batch entry and head of the chunk's head `index`.
fn batch_head(index: u32) -> vec2<u32> {
    let head = params.head_first + index;
    return vec2<u32>(head / params.heads_q, head % params.heads_q);
}

// exp2 of something at most 0. Some software adapters clamp the argument and so lose a NaN.
fn exp_of(x: vec4<f32>) -> vec4<f32> {
    let nan = (bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
    return select(exp2(x), x, nan);
}

fn exp_of_one(x: f32) -> f32 {
    return select(exp2(x), x, is_nan(x));
}

// Plus a zero that no compiler knows for one: WGSL rejects a constant that is infinite, and what is compared with the bits
// of one is taken for unequal where compilers may assume that there is none.
fn neg_inf_bits() -> u32 {
    return NEG_INF_BITS + (params.row_first >> 31u);
}
