// Which of a row's LANES a thread is, and which along the rows: a row's are neighbours, in one subgroup.
fn lane_of(thread: u32) -> u32 {
    return thread % LANES;
}

fn row_lane_of(thread: u32) -> u32 {
    return thread / LANES;
}
