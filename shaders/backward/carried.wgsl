// Sums that are carried from the dispatch of a part of the others to the next part's.
@group(0) @binding(BINDING) var<storage, read_write> carried: array<vec4<f32>>;
