// Where the rows of OPERAND lie: the first of a head in page 0, and key `j` of an entry from there. Every
// block of keys that exist has a page that exists (kernel/lengths.wgsl).
fn begin_OPERAND(b: u32, h: u32) -> u32 {
    return params.OPERAND_offset + h * params.OPERAND_stride_h;
}

fn key_OPERAND(begin: u32, b: u32, j: u32) -> u32 {
    let page = read_block_table(b * params.max_blocks + j / PAGE);
    return begin + page * params.OPERAND_stride_b + j % PAGE * params.OPERAND_stride_s;
}
