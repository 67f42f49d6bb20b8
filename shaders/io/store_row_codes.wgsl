// The row in workgroup memory as codes of BITS bits, GROUP of them with a scale and a lowest value
// (src/quant.rs, whose Range is the twin). A thread makes whole words.
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

fn bf16_near(x: f32) -> f32 {
    return bitcast<f32>((bitcast<u32>(x) + 0x8000u) & 0xffff0000u);
}

// A group's lowest value and the step from code to code.
struct Range {
    lowest: f32,
    scale: f32,
}

// From the least to the most of the elements from `first` to `end`; NaN if one of them is not finite.
fn whole_range(first: u32, end: u32) -> Range {
    var least = wg_row[first];
    var most = least;
    var finite = true;
    for (var d = first; d < end; d += 1u) {
        let x = wg_row[d];
        finite = finite && is_finite(x);
        least = min(least, x);
        most = max(most, x);
    }
    let lowest = bf16_below(least);
    let scale = bf16_above((most - bitcast<f32>(lowest)) / LEVELS);
    let bits = select(vec2<u32>(0x7fc00000u), vec2<u32>(lowest, scale), finite);
    return Range(bitcast<f32>(bits.x), bitcast<f32>(bits.y));
}

fn code_of(x: f32, range: Range) -> f32 {
    return clamp(floor((x - range.lowest) / range.scale + 0.5), 0.0, LEVELS);
}

// Squares of what the codes are wrong by, in steps.
fn error_of(first: u32, end: u32, range: Range, step: f32) -> f32 {
    var sum = 0.0;
    for (var d = first; d < end; d += 1u) {
        let off = (range.lowest + range.scale * code_of(wg_row[d], range) - wg_row[d]) / step;
        sum += off * off;
    }
    return sum;
}

// The line through the elements over their codes; the same range where they all have one code.
fn fitted(first: u32, end: u32, range: Range) -> Range {
    var mid_code = 0.0;
    var mid_place = 0.0;
    for (var d = first; d < end; d += 1u) {
        mid_code += code_of(wg_row[d], range);
        mid_place += (wg_row[d] - range.lowest) / range.scale;
    }
    mid_code /= f32(end - first);
    mid_place /= f32(end - first);
    var both = 0.0;
    var square = 0.0;
    for (var d = first; d < end; d += 1u) {
        let code = code_of(wg_row[d], range) - mid_code;
        both += code * ((wg_row[d] - range.lowest) / range.scale - mid_place);
        square += code * code;
    }
    if square <= 0.0 {
        return range;
    }
    let step = both / square;
    let lowest = range.lowest + range.scale * (mid_place - step * mid_code);
    return Range(bf16_near(lowest), bf16_near(range.scale * step));
}

// The range of the group that begins at element `first`, moved FITS times to where its codes are less wrong.
fn range_of(first: u32) -> Range {
    let end = min(first + GROUP, WIDTH);
    let whole = whole_range(first, end);
    var best = whole;
    if FITS > 0u && whole.scale > 0.0 {
        var error = error_of(first, end, whole, whole.scale);
        for (var fit = 0u; fit < FITS; fit += 1u) {
            let next = fitted(first, end, best);
            let of_next = error_of(first, end, next, whole.scale);
            if of_next < error {
                best = next;
                error = of_next;
            }
        }
    }
    return best;
}

// A group begins with a word, whose thread also stores the group's range.
fn store_row(to: u32, lane: u32) {
    let groups = div_ceil(WIDTH, GROUP);
    var range: Range;
    // One group: its range is looked for once, and not for every word.
    if GROUP >= WIDTH {
        range = range_of(0u);
    }
    for (var word = lane; word < div_ceil(WIDTH, CODES); word += LANES) {
        let first = word * CODES;
        let group = first / GROUP;
        if GROUP < WIDTH {
            range = range_of(group * GROUP);
        }
        if first == group * GROUP {
            k_data[to + group] = (bitcast<u32>(range.scale) >> 16u) | bitcast<u32>(range.lowest);
        }
        var codes = 0u;
        if range.scale > 0.0 {
            for (var i = 0u; i < min(CODES, WIDTH - first); i += 1u) {
                codes |= u32(code_of(wg_row[first + i], range)) << (BITS * i);
            }
        }
        k_data[to + groups + word] = codes;
    }
}
