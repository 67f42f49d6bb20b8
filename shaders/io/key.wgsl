// Where the rows of OPERAND lie: the first of an entry's head, and key `j` from there.
fn begin_OPERAND(b: u32, h: u32) -> u32 {
    return params.OPERAND_offset + b * params.OPERAND_stride_b + h * params.OPERAND_stride_h;
}

fn key_OPERAND(begin: u32, b: u32, j: u32) -> u32 {
    return begin + j * params.OPERAND_stride_s;
}
