// A barrier after values were staged. Whether some of them need care: a branch with subgroup operations in it
// follows, and browsers' compilers want proof that all threads take the same. What is loaded between two
// barriers is one.
fn staged(turn: u32) -> bool {
    return workgroupUniformLoad(&wg_careful[turn]) != 0u;
}
