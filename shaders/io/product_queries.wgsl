// Queries that a matrix of their head changes, into scratch. Bilinear: q' = qT W, (seq_q, query_dim) @
// (query_dim, head_dim) (Luong 2015, eq. 8 "general"). Additive: q' = Wq q, (seq_q, query_dim) @
// (query_dim, hidden) (Bahdanau 2014).
@group(0) @binding(BINDING) var<storage, read_write> projected: array<vec4<f32>>;

fn enter_owner() {
    owner_bh = batch_head(owner);
    owner_w = owner_bh.y * params.w_head_stride;
}

fn product_owners() -> u32 {
    return params.head_count;
}

fn product_rows() -> u32 {
    return params.row_count;
}

fn x4(row: u32, k: u32) -> vec4<f32> {
    return load4_q(row_q(owner_bh.x, owner_bh.y, params.row_first + row), k);
}

fn end_quad(row: u32, quad: u32, sum: vec4<f32>) {
    let quads = params.projected_stride / 4u;
    if row < params.row_count && quad < quads {
        projected[(owner * params.row_count + row) * quads + quad] = kept(quad, sum);
    }
}
