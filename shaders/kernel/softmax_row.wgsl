// Softmax of rows of any length, in place: weight = exp(score - row_max), and for each row
// 1 / row_sum (the value kernel's factor) and lse = row_max + ln(row_sum).
//
// LANES threads own a row, a workgroup owns GROUP_ROWS rows; each lane walks its row by vec4, once
// for the maximum and once for the exponentials (Milakov & Gimelshein 2018 would merge the walks at
// the price of two exponentials an element). LANES * GROUP_ROWS words of workgroup memory; one lane
// a row needs no barrier, more need 2 (log2(LANES) + 2).

const GROUP = LANES * GROUP_ROWS;

@group(0) @binding(11) var<storage, read_write> scores: array<vec4<f32>>;
@group(0) @binding(14) var<storage, read_write> inverse_sums: array<f32>;

var<workgroup> wg_partial: array<f32, GROUP>;

// The maximum, or else the sum, of `x` over a row's lanes. Called by the whole workgroup.
fn reduce(x: f32, thread: u32, maximum: bool) -> f32 {
    if LANES == 1u {
        return x;
    }
    wg_partial[thread] = x;
    workgroupBarrier();
    for (var step = LANES / 2u; step > 0u; step /= 2u) {
        if thread % LANES < step {
            let a = wg_partial[thread];
            let b = wg_partial[thread + step];
            wg_partial[thread] = select(a + b, max(a, b), maximum);
        }
        workgroupBarrier();
    }
    let all = wg_partial[thread / LANES * LANES];
    workgroupBarrier();
    return all;
}

@compute @workgroup_size(GROUP)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let rows = params.head_count * params.row_count;
    let first = linear_group(group, groups) * GROUP_ROWS;
    if first >= rows {
        return;
    }
    // Threads past the last row work on it too (the barriers want them) but store nothing.
    let own = first + thread / LANES;
    let stores = own < rows;
    let index = min(own, rows - 1u);
    let lane = thread % LANES;
    let head = index / params.row_count;
    let row = index % params.row_count;
    let bh = batch_head(head);
    let len_k = key_length(bh.x);
    let range = kv_range(bh.x, params.row_first + row, len_k);
    let base = index * params.score_stride;

    // A vec4 that overlaps the range lies in a tile that the score kernel has written whole.
    var peak = vec4<f32>(DROPPED);
    let lo = range.x / 4u * 4u;
    for (var j = lo + 4u * lane; j < range.y; j += 4u * LANES) {
        peak = max(peak, scores[(base + j) / 4u]);
    }
    var row_max = reduce(max(max(peak.x, peak.y), max(peak.z, peak.w)), thread, true);
    row_max = max(row_max, sink(bh.y));

    // Sums in two levels, so that the rounding error of a long row does not grow with it.
    var total = vec4<f32>();
    let visited = values_range(bh.x, row, len_k);
    var j = visited.x + 4u * lane;
    while j < visited.y {
        var sum = vec4<f32>();
        for (var n = 0u; n < 64u && j < visited.y; n += 1u) {
            // As bits: see `marked`.
            var weight = vec4<u32>(DROPPED_WEIGHT_BITS);
            if j + 4u > range.x && j < range.y {
                let s = scores[(base + j) / 4u];
                let p = exp_of((s - row_max) * LOG2_E);
                let dropped = bitcast<vec4<u32>>(s) == vec4<u32>(bitcast<u32>(DROPPED));
                weight = select(bitcast<vec4<u32>>(p), weight, dropped);
                sum += bitcast<vec4<f32>>(weight);
            }
            if stores {
                scores[(base + j) / 4u] = bitcast<vec4<f32>>(weight);
            }
            j += 4u * LANES;
        }
        total += sum;
    }
    var row_sum = reduce((total.x + total.y) + (total.z + total.w), thread, false);
    row_sum += sink_weight(bh.y, row_max);

    if stores && lane == 0u {
        // A row without a key (and without a sink) has weights of zero, whatever their factor.
        let empty = row_sum == 0.0;
        // Some software adapters lose a NaN in log2.
        let lse = select(row_max + log2(row_sum) * LN_2, row_sum, is_nan(row_sum));
        inverse_sums[index] = select(1.0 / row_sum, 0.0, empty);
        let i = params.row_first + row;
        if is_query(bh.x, i) {
            store_lse(lse_at(bh.x, bh.y, i), select(bitcast<u32>(lse), neg_inf_bits(), empty));
        }
    }
}
