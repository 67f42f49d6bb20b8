// All lists in one buffer, made by kernel/bundle.wgsl: slopes and sinks of [heads_q], key lengths of [batch],
// offsets of ragged queries and keys of [batch + 1], and the block table.
@group(0) @binding(BINDING) var<storage, read> bundle: array<u32>;
