// A linear map straight from storage, for adapters that run on a CPU: y = x W^T + b.
//
// A thread owns ROWS rows and QUADS quads of outputs, whose sums live in variables of their own, hence the
// unrolled text (src/unroll.rs). The LANES threads of a workgroup, a vector of the processor, own different
// rows and the same outputs (or the other way round, where rows are few): what is the same is read at
// workgroup-uniform addresses, which such an adapter turns into broadcasts. Sums run in levels
// (LEVEL inputs, FAR_LEVELS of those, and all), so that the rounding error of long sums does not grow with them.

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    // Orders nothing: see shaders/kernel/fused_row.wgsl.
    workgroupBarrier();
    let tiles_n = div_ceil(params.outputs, 4u * TILE_QUADS);
    let tile = linear_group(group, groups);
    if tile >= params.groups {
        return;
    }
    // One of the two steps is 0.
    let first_row = band_of(tile / tiles_n) * TILE_ROWS + lane * LANE_ROWS;
    let first_quad = tile % tiles_n * TILE_QUADS + lane * LANE_QUADS;

    // Past the edges the last row and output are read again, and nothing is written.
    //$ for r in 0..ROWS
    let row_$r = min(first_row + $ru, params.rows - 1u);
    //$ for q in 0..QUADS
    var total_$r_$q = vec4<f32>();
    //$ for once in 0..FAR
    var far_$r_$q = vec4<f32>();
    //$ end
    //$ end
    //$ end
    for (var level = 0u; level < params.inputs; level += LEVEL) {
        //$ for r in 0..ROWS
        //$ for q in 0..QUADS
        var sum_$r_$q = vec4<f32>();
        //$ end
        //$ end
        let end = min(level + LEVEL, params.inputs);
        for (var k = level; k < end; k += 4u) {
            //$ for r in 0..ROWS
            let x_$r = x4(row_$r, k);
            //$ end
            //$ for q in 0..QUADS
            {
                let w = w_block(first_quad + $qu, k);
                //$ for r in 0..ROWS
                sum_$r_$q += x_$r.x * w[0];
                sum_$r_$q += x_$r.y * w[1];
                sum_$r_$q += x_$r.z * w[2];
                sum_$r_$q += x_$r.w * w[3];
                //$ end
            }
            //$ end
        }
        //$ for r in 0..ROWS
        //$ for q in 0..QUADS
        total_$r_$q += sum_$r_$q;
        //$ end
        //$ end
        //$ for once in 0..FAR
        if (level / LEVEL + 1u) % FAR_LEVELS == 0u {
            //$ for r in 0..ROWS
            //$ for q in 0..QUADS
            far_$r_$q += total_$r_$q;
            total_$r_$q = vec4<f32>();
            //$ end
            //$ end
        }
        //$ end
    }

    //$ for r in 0..ROWS
    //$ for q in 0..QUADS
    //$ for once in 0..FAR
    total_$r_$q += far_$r_$q;
    //$ end
    end_quad(first_row + $ru, first_quad + $qu, total_$r_$q);
    //$ end
    //$ end
}
