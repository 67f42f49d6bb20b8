// Where a workgroup's rows are, in tiles: a linear map has one matrix of them.
fn band_of(band: u32) -> u32 {
    return band;
}
