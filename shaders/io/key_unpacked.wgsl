// Where the rows lie that kernel/unpack.wgsl has made of OPERAND: the first of a head, and key `j` from there. (Their width
// is the problem's: a compiler that knows it makes all addresses of a step first, and keeps them on the stack.)
fn begin_OPERAND(b: u32, h: u32) -> u32 {
    return key_OPERAND(0u, b, unpacked_row(b, h * params.group_size, 0u));
}

fn key_OPERAND(begin: u32, b: u32, j: u32) -> u32 {
    return begin + j * 4u * div_ceil(params.WIDTH, 4u);
}
