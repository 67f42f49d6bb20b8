// Everything that a kernel learns at run time. The Rust twin is src/params.rs; a test holds the two
// equal by reflection. Offsets and strides are in elements, so that alignment never matters.
struct Params {
    // Sizes.
    batch: u32,
    heads_q: u32,
    group_size: u32, // query heads that share one key-value head
    seq_q: u32,
    seq_kv: u32,
    head_dim: u32,
    head_dim_v: u32,
    query_dim: u32,
    // This chunk: a range of (batch, head) pairs, and of query rows of each.
    head_first: u32,
    head_count: u32,
    row_first: u32,
    row_count: u32,
    // Scratch rows.
    score_stride: u32,
    projected_stride: u32,
    key_term_group: u32, // query heads that share the terms of a key
    // The value kernel's part of the keys: [key_first, key_end); the last part has no end.
    key_first: u32,
    key_end: u32,
    // Splits of the keys that workgroups take side by side; keys of a step, and fewest steps of a split.
    splits: u32,
    split_step: u32,
    split_least: u32,
    // Tiles of rows that are split, and most workgroups along a dimension.
    split_tiles: u32,
    most_groups: u32,
    // Ragged queries and keys: rows of all entries. Pages, and entries of a row of the block table.
    total_q: u32,
    total_kv: u32,
    pages: u32,
    max_blocks: u32,
    // Scores.
    scale: f32,
    softcap: f32,
    norm_epsilon: f32,
    // The additive similarity's width; matrices of a head, 0 where all have one. w is Wq, too.
    hidden: u32,
    w_head_stride: u32,
    wk_head_stride: u32,
    score_v_head_stride: u32,
    // Masks, and the alignment of positions: 1 top-left, 2 bottom-right. A causal window's right end is 0 at most.
    causal: u32,
    align: u32,
    window_left: i32,
    window_right: i32,
    // Layouts.
    q_offset: u32,
    q_stride_b: u32,
    q_stride_h: u32,
    q_stride_s: u32,
    q_stride_d: u32,
    k_offset: u32,
    k_stride_b: u32,
    k_stride_h: u32,
    k_stride_s: u32,
    k_stride_d: u32,
    v_offset: u32,
    v_stride_b: u32,
    v_stride_h: u32,
    v_stride_s: u32,
    v_stride_d: u32,
    o_offset: u32,
    o_stride_b: u32,
    o_stride_h: u32,
    o_stride_s: u32,
    o_stride_d: u32,
    bias_offset: u32,
    bias_stride_b: u32,
    bias_stride_h: u32,
    bias_stride_s: u32,
    bias_stride_d: u32,
    mask_offset: u32,
    mask_stride_b: u32,
    mask_stride_h: u32,
    mask_stride_s: u32,
    mask_stride_d: u32,
    dout_offset: u32,
    dout_stride_b: u32,
    dout_stride_h: u32,
    dout_stride_s: u32,
    dout_stride_d: u32,
    grad_offset: u32,
    grad_stride_b: u32,
    grad_stride_h: u32,
    grad_stride_s: u32,
    grad_stride_d: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
