// Element `d` of the row that begins at `at`.
fn element(at: u32, d: u32, factor: f32) -> f32 {
    return load1_q(at + d * params.q_stride_d);
}

fn norm_factor(at: u32, lane: u32) -> f32 {
    return 1.0;
}
