// The derivative of a score by its scaled similarity.
fn slope_of(dot: f32) -> f32 {
    if !SOFTCAP {
        return 1.0;
    }
    let t = tanh_accurate(dot * params.scale / params.softcap);
    return 1.0 - t * t;
}
