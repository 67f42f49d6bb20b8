// A linear map of few rows (decoding): y = x W^T + b, where reading W is all the work.
//
// A workgroup owns ROWS rows and QUADS quads of outputs. LANES threads share a quad, each a LANES-th of the
// inputs; those that are neighbours read neighbours of W, whichever way it lies. Their sums, in two levels of
// LEVEL quads, meet in workgroup memory; first, where there are subgroup operations, those of SHARE threads
// meet without (shaders/io/linear_share_*.wgsl).

const PARTS = LANES / SHARE;

var<workgroup> wg_sums: array<vec4<f32>, ROWS * QUADS * PARTS>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    PLACE_ARGUMENTS,
) {
    let place = Place(PLACE_VALUES);
    let thread = thread_of(place);
    let tiles_n = div_ceil(params.outputs, 4u * QUADS);
    let tile = linear_group(group, groups);
    if tile >= params.groups {
        return;
    }
    let first_row = band_of(tile / tiles_n) * TILE_ROWS;
    let first_quad = tile % tiles_n * QUADS;
    let quad = select(thread / LANES, thread % QUADS, BY_OUTPUTS);
    let lane = select(thread % LANES, thread / QUADS, BY_OUTPUTS);

    //$ for r in 0..ROWS
    let row_$r = min(first_row + $ru, params.rows - 1u);
    var total_$r = vec4<f32>();
    //$ end
    for (var level = 0u; level < params.inputs; level += 4u * LANES * LEVEL) {
        //$ for r in 0..ROWS
        var sum_$r = vec4<f32>();
        //$ end
        let end = min(level + 4u * LANES * LEVEL, params.inputs);
        for (var k = level + 4u * lane; k < end; k += 4u * LANES) {
            let w = w_block(first_quad + quad, k);
            //$ for r in 0..ROWS
            {
                let x = x4(row_$r, k);
                sum_$r = fma(vec4<f32>(x.x), w[0], sum_$r);
                sum_$r = fma(vec4<f32>(x.y), w[1], sum_$r);
                sum_$r = fma(vec4<f32>(x.z), w[2], sum_$r);
                sum_$r = fma(vec4<f32>(x.w), w[3], sum_$r);
            }
            //$ end
        }
        //$ for r in 0..ROWS
        total_$r += sum_$r;
        //$ end
    }
    //$ for r in 0..ROWS
    total_$r = shared_sum(total_$r);
    if lane % SHARE == 0u {
        wg_sums[($ru * QUADS + quad) * PARTS + lane / SHARE] = total_$r;
    }
    //$ end
    workgroupBarrier();
    for (var at = thread; at < ROWS * QUADS; at += THREADS) {
        var sum = vec4<f32>();
        for (var i = 0u; i < PARTS; i += 1u) {
            sum += wg_sums[at * PARTS + i];
        }
        end_quad(first_row + at / QUADS, first_quad + at % QUADS, sum);
    }
}
