// The logit that joins the denominator of head `h` alone (Xiao 2023).
fn sink(h: u32) -> f32 {
    return bitcast<f32>(read_sinks(h));
}

fn sink_weight(h: u32, row_max: f32) -> f32 {
    return exp2((sink(h) - row_max) * LOG2_E);
}
