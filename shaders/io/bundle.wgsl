// Slopes, sinks and key lengths in one buffer: [heads_q | heads_q | batch], made by kernel/bundle.wgsl.
@group(0) @binding(BINDING) var<storage, read> bundle: array<u32>;
