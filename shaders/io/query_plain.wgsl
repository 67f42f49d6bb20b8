// First element of the query at row `row` of the chunk's head `head`: the caller's own q.
fn query_row(head: u32, row: u32) -> u32 {
    let bh = batch_head(head);
    return row_q(bh.x, bh.y, params.row_first + row);
}
