fn sink(h: u32) -> f32 {
    return DROPPED;
}

fn sink_weight(h: u32, row_max: f32) -> f32 {
    return 0.0;
}
