// Index of the first element of a row of OPERAND, whose entries' rows follow one another.
fn row_OPERAND(b: u32, h: u32, s: u32) -> u32 {
    return params.OPERAND_offset + h * params.OPERAND_stride_h + token_of(b, s) * params.OPERAND_stride_s;
}
