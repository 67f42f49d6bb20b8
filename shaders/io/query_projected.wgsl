// Queries that kernel/project.wgsl has multiplied by W: f32, padded with zeros to whole vec4s.
@group(0) @binding(BINDING) var<storage, read> projected: array<vec4<f32>>;

fn load4_q(at: u32, d: u32) -> vec4<f32> {
    return projected[(at + d) / 4u];
}

// First element of the query at row `row` of the chunk's head `head`.
fn query_row(head: u32, row: u32) -> u32 {
    return (head * params.row_count + row) * params.projected_stride;
}
