@group(0) @binding(BINDING) var<storage, read> launch: array<u32>;

// Splits that have been worked on (kernel/count.wgsl).
fn splits() -> u32 {
    return launch[3];
}
