// A linear map through workgroup memory: y = x W^T + b, (rows, inputs) @ (inputs, outputs).
//
// A workgroup of SIDE_X x SIDE_Y threads owns SIDE_Y ROWS rows and 4 SIDE_X outputs; a thread owns ROWS rows,
// SIDE_Y apart, and a quad of outputs (shaders/exchange/pairs.wgsl): ROWS + 4 vectors are read for each 16 ROWS
// products. STEP quads of inputs are staged at a time, two barriers a step. Sums run in levels (LEVEL steps,
// FAR_LEVELS of those, and all), so that the rounding error of long sums does not grow with them.

// A vector more than a row of a tile has: rows begin in different banks.
const SKEW = STEP + 1u;

const LANES = SIDE_X;
const ROW_LANES = SIDE_Y;

var<workgroup> wg_x: array<vec4<f32>, SIDE_Y * ROWS * SKEW>;

@compute @workgroup_size(SIDE_X * SIDE_Y)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let x = lane_of(thread);
    let y = row_lane_of(thread);
    let tiles_n = div_ceil(params.outputs, 4u * SIDE_X);
    let tile = linear_group(group, groups);
    if tile >= params.groups {
        return;
    }
    let first_row = band_of(tile / tiles_n) * TILE_ROWS;
    let first_quad = tile % tiles_n * SIDE_X;

    //$ for r in 0..ROWS
    var total_$r = vec4<f32>();
    var sum_$r = vec4<f32>();
    //$ for once in 0..FAR
    var far_$r = vec4<f32>();
    //$ end
    //$ end
    var steps = 0u;
    for (var k = 0u; k < params.inputs; k += 4u * STEP) {
        // Turns that all threads take alike: of loops that begin at a thread's number, with a branch inside, FXC says that
        // a barrier after them is met by some alone.
        for (var round = 0u; round < SIDE_Y * ROWS * STEP; round += SIDE_X * SIDE_Y) {
            let at = round + thread;
            // Past the edges the last row is read again; beyond the inputs lie zeros.
            let e = at % STEP;
            var own = vec4<f32>();
            if k + 4u * e < params.inputs {
                own = x4(min(first_row + at / STEP, params.rows - 1u), k + 4u * e);
            }
            if at < SIDE_Y * ROWS * STEP {
                wg_x[at / STEP * SKEW + e] = own;
            }
        }
        for (var round = 0u; round < 4u * SIDE_X * STEP; round += SIDE_X * SIDE_Y) {
            stage_w(round + thread, first_quad, k);
        }
        workgroupBarrier();
        //$ for e in 0..STEP
        {
            let w = staged_w(x, $eu);
            //$ for r in 0..ROWS
            {
                let own = wg_x[(y + $ru * SIDE_Y) * SKEW + $eu];
                sum_$r = fma(vec4<f32>(own.x), w[0], sum_$r);
                sum_$r = fma(vec4<f32>(own.y), w[1], sum_$r);
                sum_$r = fma(vec4<f32>(own.z), w[2], sum_$r);
                sum_$r = fma(vec4<f32>(own.w), w[3], sum_$r);
            }
            //$ end
        }
        //$ end
        workgroupBarrier();
        steps += 1u;
        if steps % LEVEL == 0u {
            //$ for r in 0..ROWS
            total_$r += sum_$r;
            sum_$r = vec4<f32>();
            //$ end
        }
        //$ for once in 0..FAR
        if steps % (LEVEL * FAR_LEVELS) == 0u {
            //$ for r in 0..ROWS
            far_$r += total_$r;
            total_$r = vec4<f32>();
            //$ end
        }
        //$ end
    }

    //$ for r in 0..ROWS
    //$ for once in 0..FAR
    total_$r += far_$r;
    //$ end
    end_quad(first_row + y + $ru * SIDE_Y, first_quad + x, total_$r + sum_$r);
    //$ end
}
