// The derivative of a score by its scaled similarity.
fn slope_of(dot: f32) -> f32 {
    if !SOFTCAP {
        return 1.0;
    }
    let x = abs(dot * params.scale / params.softcap);
    if x < SMALL {
        let t = tanh_accurate(x);
        return 1.0 - t * t;
    }
    // The same without the difference of two numbers near 1.
    let below = below_one(x);
    return below * (2.0 - below);
}
