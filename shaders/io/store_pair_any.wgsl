// OPERAND as pairs of 16-bit floats with any strides: the other half of a word may belong to another
// thread, or to nobody, so each half is cleared and set by atomics.
@group(0) @binding(BINDING) var<storage, read_write> OPERAND_data: array<atomic<u32>>;

fn store1_OPERAND(index: u32, x: f32) {
    let shift = 16u * (index & 1u);
    atomicAnd(&OPERAND_data[index / 2u], ~(0xffffu << shift));
    atomicOr(&OPERAND_data[index / 2u], (pack_DTYPE(vec2<f32>(x, 0.0)) & 0xffffu) << shift);
}

// Four neighbours along the innermost dimension; those at and beyond its width are left out. (In a loop, since two
// atomics for each are much text: a driver that runs on a CPU makes each a loop over its lanes.)
fn store4_OPERAND(at: u32, d: u32, x: vec4<f32>) {
    for (var i = d; i < min(d + 4u, params.WIDTH); i += 1u) {
        let halves = select(x.xy, x.zw, i >= d + 2u);
        store1_OPERAND(at + i * params.OPERAND_stride_d, select(halves.x, halves.y, ((i - d) & 1u) != 0u));
    }
}
