// Index of the first element of a row of OPERAND.
fn row_OPERAND(b: u32, h: u32, s: u32) -> u32 {
    return params.OPERAND_offset + b * params.OPERAND_stride_b + h * params.OPERAND_stride_h
        + s * params.OPERAND_stride_s;
}
