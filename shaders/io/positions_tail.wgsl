// An entry's length is that after its new rows: row t of n goes to position length - n + t.
fn position_of(b: u32, t: u32, count: u32) -> u32 {
    return read_kv_lens(b) - count + t;
}
