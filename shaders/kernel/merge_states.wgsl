// Merges partial results over disjoint keys, o_i with lse_i (Milakov & Gimelshein 2018; Flash-Decoding, Dao
// 2023; FlashInfer's merge_states):
//
//   m = max lse_i   w_i = exp(lse_i - m)   o = sum w_i o_i / sum w_i   lse = m + ln(sum w_i)
//
// A thread owns a quad of a row of O, and reads the row's lse twice: the maximum comes first, so that no sum
// is ever rescaled. No workgroup memory, no barriers.

// Parts that are added up apart from the others, so that rounding errors do not grow with their number.
const NEAR = 32u;

struct Sums {
    largest: f32,
    weights: f32,
    o: vec4<f32>,
    // An lse is NaN or +inf: so is the row.
    spoiled: bool,
}

fn is_finite_bits(bits: u32) -> bool {
    return (bits & 0x7f800000u) != 0x7f800000u;
}

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = linear_group(id, count);
    // Folding adds workgroups, whose threads' numbers might not fit a u32.
    if group >= params.groups {
        return;
    }
    let quads = div_ceil(params.head_dim_v, 4u);
    let thread = group * LANES + lane;
    let index = thread / quads;
    if index >= params.rows {
        return;
    }
    let d = 4u * (thread % quads);
    let head = index / params.seq_q;
    let row = vec3<u32>(head / params.heads_q, head % params.heads_q, index % params.seq_q);

    var largest = DROPPED;
    //$ for n in 0..PARTIALS
    largest = largest_$n(row, largest);
    //$ end
    var sums = Sums(largest, 0.0, vec4<f32>(), false);
    //$ for n in 0..PARTIALS
    sums = add_$n(row, d, sums);
    //$ end

    // The largest weight is 1: no part weighs anything where the sum is 0.
    let empty = sums.weights == 0.0;
    var o = sums.o * select(1.0 / sums.weights, 0.0, empty);
    var lse = select(bitcast<u32>(largest + log2(sums.weights) * LN_2), neg_inf_bits(), empty);
    if sums.spoiled {
        // A quiet NaN, again no constant.
        lse = neg_inf_bits() | 0x00400000u;
        o = vec4<f32>(bitcast<f32>(lse));
    }
    store4_o(row_o(row.x, row.y, row.z), d, o);
    if d == 0u {
        store_lse(index, lse);
    }
}
