// The row as it is stored: 4 WIDTH bytes, and a barrier more.
var<workgroup> wg_stored: array<f32, WIDTH>;

// Element `d` of the row that begins at `at`, after its norm.
fn element(at: u32, d: u32, factor: f32) -> f32 {
    return wg_stored[d] * factor * gain(d);
}

// What a row is multiplied by: 1 / sqrt(mean x^2 + epsilon) (RMSNorm, Zhang & Sennrich 2019), or
// 1 / max(|x|, epsilon). Called by the whole workgroup.
fn norm_factor(at: u32, lane: u32) -> f32 {
    for (var d = lane; d < WIDTH; d += LANES) {
        wg_stored[d] = load1_q(at + d * params.q_stride_d);
    }
    workgroupBarrier();
    // Every thread sums by itself, in two levels: a wide row's rounding error does not grow with it.
    var sum = 0.0;
    for (var first = 0u; first < WIDTH; first += 16u) {
        var part = 0.0;
        for (var d = first; d < min(first + 16u, WIDTH); d += 1u) {
            part += wg_stored[d] * wg_stored[d];
        }
        sum += part;
    }
    return select(
        1.0 / max(sqrt(sum), params.norm_epsilon),
        1.0 / sqrt(sum / f32(WIDTH) + params.norm_epsilon),
        RMS,
    );
}
