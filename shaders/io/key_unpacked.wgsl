// Where the rows lie that kernel/unpack.wgsl has made of OPERAND: the first of a head, and key `j` from there.
fn begin_OPERAND(b: u32, h: u32) -> u32 {
    return key_term(b, h * params.group_size, 0u) * params.unpacked_OPERAND;
}

fn key_OPERAND(begin: u32, b: u32, j: u32) -> u32 {
    return begin + j * params.unpacked_OPERAND;
}
