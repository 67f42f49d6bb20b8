// Index of the first element of a row of OPERAND, whose entries' rows follow one another. A row that the entry
// does not have is one that exists all the same.
fn row_OPERAND(b: u32, h: u32, s: u32) -> u32 {
    let row = min(query_first(b) + s, params.total_q - 1u);
    return params.OPERAND_offset + h * params.OPERAND_stride_h + row * params.OPERAND_stride_s;
}
