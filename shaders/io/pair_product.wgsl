// How queries and keys are compared, four neighbours of each at a time: by products.
fn compared_dim() -> u32 {
    return params.head_dim;
}

// The head of keys that query head `h` reads.
fn key_head(h: u32) -> u32 {
    return h / params.group_size;
}

// What pairs of the elements from `d` on are multiplied by: nothing.
fn pair_weights(h: u32, d: u32) -> vec4<f32> {
    return vec4<f32>();
}
