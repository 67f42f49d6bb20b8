// Joins what the splits of the keys have found out about each row (the online softmax's recurrence, whose
// order does not matter):
//
//   m = max m_s   l = sum l_s exp(m_s - m)   o = sum o_s exp(m_s - m) / l
//
// A thread owns a quad of a row of O. A split without a key of the row has l_s = 0 and weighs nothing.
// The sink joins here, once.

const NEAR = 32u;

@group(0) @binding(16) var<storage, read> carried: array<vec4<f32>>;

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let quads = div_ceil(params.head_dim_v, 4u);
    let rows = params.head_count * params.row_count;
    let thread = linear_group(group, groups) * LANES + lane;
    let index = thread / quads;
    if index >= rows {
        return;
    }
    let bh = batch_head(index / params.row_count);
    let i = params.row_first + index % params.row_count;
    if !is_query(bh.x, i) {
        return;
    }
    let quad = thread % quads;
    var m = DROPPED;
    for (var s = 0u; s < splits(); s += 1u) {
        m = max(m, carried[carried_row(s * rows + index)].x);
    }
    var l = 0.0;
    var sum = vec4<f32>();
    // NEAR splits apart from the others, so that rounding errors do not grow with their number.
    for (var near = 0u; near < splits(); near += NEAR) {
        var near_l = 0.0;
        var near_sum = vec4<f32>();
        for (var s = near; s < min(near + NEAR, splits()); s += 1u) {
            let share = carried_row(s * rows + index);
            let of_split = carried[share].xy;
            // Nothing to add. (A sum that is NaN is not 0, and has to spread.)
            if of_split.y == 0.0 {
                continue;
            }
            let weight = exp2((of_split.x - m) * LOG2_E);
            near_l += of_split.y * weight;
            near_sum += carried[share + 1u + quad] * weight;
        }
        l += near_l;
        sum += near_sum;
    }
    let factor = close_row(index, bh.y, m, l, quad == 0u);
    let at = row_o(bh.x, bh.y, i);
    store4_o(at, 4u * quad, sum * factor);
}
