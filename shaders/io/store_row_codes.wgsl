// The row in workgroup memory as codes of BITS bits, GROUP of them with a scale and a lowest value
// (src/quant.rs). A thread makes whole words.
@group(0) @binding(BINDING) var<storage, read_write> k_data: array<u32>;

const LEVELS = f32((1u << BITS) - 1u);
const CODES = 32u / BITS;

// The smallest bf16 not below a positive number, and the largest not above any, as bits.
fn bf16_above(x: f32) -> u32 {
    return (bitcast<u32>(x) + 0xffffu) & 0xffff0000u;
}

fn bf16_below(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    return select(bits & 0xffff0000u, (bits + 0xffffu) & 0xffff0000u, x < 0.0);
}

// Bits of scale and of lowest value of the group that begins at element `first`; NaN if one of it is not finite.
fn range_of(first: u32) -> vec2<u32> {
    var least = wg_row[first];
    var most = least;
    var finite = true;
    for (var d = first; d < min(first + GROUP, WIDTH); d += 1u) {
        let x = wg_row[d];
        finite = finite && (bitcast<u32>(x) & 0x7f800000u) != 0x7f800000u;
        least = min(least, x);
        most = max(most, x);
    }
    let lowest = bf16_below(least);
    let scale = bf16_above((most - bitcast<f32>(lowest)) / LEVELS);
    return select(vec2<u32>(0x7fc00000u), vec2<u32>(scale, lowest), finite);
}

fn store_row(to: u32, lane: u32) {
    let groups = div_ceil(WIDTH, GROUP);
    for (var group = lane; group < groups; group += LANES) {
        let range = range_of(group * GROUP);
        k_data[to + group] = (range.x >> 16u) | range.y;
    }
    for (var word = lane; word < div_ceil(WIDTH, CODES); word += LANES) {
        let first = word * CODES;
        let range = range_of(first / GROUP * GROUP);
        let scale = bitcast<f32>(range.x);
        var codes = 0u;
        if scale > 0.0 {
            for (var i = 0u; i < min(CODES, WIDTH - first); i += 1u) {
                let code = floor((wg_row[first + i] - bitcast<f32>(range.y)) / scale + 0.5);
                codes |= u32(clamp(code, 0.0, LEVELS)) << (BITS * i);
            }
        }
        k_data[to + groups + word] = codes;
    }
}
