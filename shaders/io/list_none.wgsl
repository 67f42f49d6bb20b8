fn read_OPERAND(index: u32) -> u32 {
    return 0u;
}
