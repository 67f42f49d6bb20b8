// Splits that have been worked on.
fn splits() -> u32 {
    return params.splits;
}
