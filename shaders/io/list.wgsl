@group(0) @binding(BINDING) var<storage, read> OPERAND: array<u32>;

fn read_OPERAND(index: u32) -> u32 {
    return OPERAND[index];
}
