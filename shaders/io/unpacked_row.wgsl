// Rows that are unpacked of so many keys: whole steps of the row kernel, of which four keys are the longest. A step's rows
// then have one address, and what is added to it.
fn whole_steps(keys: u32) -> u32 {
    return (keys + 3u) / 4u * 4u;
}

// The row in scratch of key `j` for query head `h`.
fn unpacked_row(b: u32, h: u32, j: u32) -> u32 {
    return head_of_terms(b, h) * whole_steps(params.seq_kv) + j;
}
