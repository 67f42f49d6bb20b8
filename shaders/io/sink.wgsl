@group(0) @binding(BINDING) var<storage, read> sinks: array<f32>;

// The logit that joins the denominator of head `h` alone (Xiao 2023).
fn sink(h: u32) -> f32 {
    return sinks[h];
}

fn sink_weight(h: u32, row_max: f32) -> f32 {
    return exp2((sinks[h] - row_max) * LOG2_E);
}
