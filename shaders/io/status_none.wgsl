fn report(wrong: u32) {
}
