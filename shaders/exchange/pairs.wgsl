// Which of a row's LANES a thread is, and which of the ROW_LANES along the rows: neighbours are the same lane of two
// rows, and the next two those rows' next lane. Where every thread reads the same as the one beside it, or as the one
// after that, an NVIDIA card hands out 16 bytes to each in half of the time; so it is with keys and values, and with
// queries and weights.
const BESIDE = min(2u, ROW_LANES);

fn lane_of(thread: u32) -> u32 {
    return thread / BESIDE % LANES;
}

fn row_lane_of(thread: u32) -> u32 {
    return thread / (BESIDE * LANES) * BESIDE + thread % BESIDE;
}
