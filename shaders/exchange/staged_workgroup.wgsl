// A barrier after values were staged. Whether some of them need care.
fn staged(turn: u32) -> bool {
    workgroupBarrier();
    return atomicLoad(&wg_careful[turn]) != 0u;
}
