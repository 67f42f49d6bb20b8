// Sums between two parts of those that a tile of pairs meets.
@group(0) @binding(BINDING) var<storage, read_write> carried: array<vec4<f32>>;
