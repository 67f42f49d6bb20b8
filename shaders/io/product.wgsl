// A matrix [hidden, WIDTH] or one for each query head.
@group(0) @binding(BINDING) var<storage, read> OPERAND_data: array<f32>;

// Four neighbours of the product of the matrix that begins at `matrix` and the row at `row`; 0 beyond hidden.
fn product4(row: u32, matrix: u32, d: u32) -> vec4<f32> {
    var acc = vec4<f32>();
    for (var c = 0u; c < params.WIDTH; c += 4u) {
        let x = load4_ROWS(row, c);
        for (var e = 0u; e < min(4u, params.hidden - d); e += 1u) {
            let at = matrix + (d + e) * params.WIDTH + c;
            for (var i = 0u; i < min(4u, params.WIDTH - c); i += 1u) {
                acc[e] = fma(x[i], OPERAND_data[at + i], acc[e]);
            }
        }
    }
    return acc;
}
