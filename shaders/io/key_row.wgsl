// Index of the first element of key `j`, which the entry has.
fn row_OPERAND(b: u32, h: u32, j: u32) -> u32 {
    return key_OPERAND(begin_OPERAND(b, h), b, j);
}
