// Pair NUMBER of buffers with partial results: parts of o (load4_partNUMBER), and an lse for each of their
// rows. Its bits, since what is not finite has to be told apart.
@group(0) @binding(BINDING) var<storage, read> lseNUMBER: array<u32>;

// The largest of `so_far` and these parts' lse of a row (batch entry, head, query).
fn largest_NUMBER(row: vec3<u32>, so_far: f32) -> f32 {
    let first = row_lseNUMBER(row.x, row.y, row.z);
    var largest = so_far;
    for (var part = 0u; part < params.partNUMBER_count; part += 1u) {
        let bits = lseNUMBER[first + part * params.lseNUMBER_step];
        if is_finite_bits(bits) {
            largest = max(largest, bitcast<f32>(bits));
        }
    }
    return largest;
}

// The row's sums with these parts, of o for the quad at element `d`.
fn add_NUMBER(row: vec3<u32>, d: u32, so_far: Sums) -> Sums {
    let first = row_lseNUMBER(row.x, row.y, row.z);
    let at = row_partNUMBER(row.x, row.y, row.z);
    var sums = so_far;
    for (var near = 0u; near < params.partNUMBER_count; near += NEAR) {
        var weights = 0.0;
        var o = vec4<f32>();
        for (var part = near; part < min(near + NEAR, params.partNUMBER_count); part += 1u) {
            let bits = lseNUMBER[first + part * params.lseNUMBER_step];
            // A part that has seen no key of the row: whatever lies in its o is not read.
            if bits == NEG_INF_BITS {
                continue;
            }
            if !is_finite_bits(bits) {
                sums.spoiled = true;
                continue;
            }
            let weight = exp2((bitcast<f32>(bits) - sums.largest) * LOG2_E);
            weights += weight;
            o += weight * load4_partNUMBER(at + part * params.partNUMBER_step, d);
        }
        sums.weights += weights;
        sums.o += o;
    }
    return sums;
}
