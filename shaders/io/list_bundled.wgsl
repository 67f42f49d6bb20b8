fn read_OPERAND(index: u32) -> u32 {
    return bundle[FIRST + index];
}
