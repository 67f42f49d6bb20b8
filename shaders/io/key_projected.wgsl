// Keys that kernel/project_k.wgsl has multiplied by Wk: f32, padded with zeros to whole vec4s.
@group(0) @binding(BINDING) var<storage, read> key_terms: array<vec4<f32>>;

fn load4_k(at: u32, d: u32) -> vec4<f32> {
    return key_terms[(at + d) / 4u];
}

// Index of the first element of key `j` for query head `h`.
fn row_k(b: u32, h: u32, j: u32) -> u32 {
    return key_term(b, h, j) * params.projected_stride;
}
