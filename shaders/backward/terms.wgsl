// Words of the lists, which come first.
fn terms_first() -> u32 {
    return 2u * params.heads_q + 3u * params.batch + 2u;
}
