// A linear map on cooperative matrices: y = x W^T + b, (rows, inputs) @ (inputs, outputs), by products of
// EDGE x EDGE fragments; f16 factors, f32 sums.
//
// A workgroup has DOWN x ACROSS subgroups. Each owns BANDS x COLUMNS fragments of y (variables of their own,
// hence the unrolled text, src/unroll.rs), so that BANDS + COLUMNS fragments are read for BANDS COLUMNS
// products. STEP inputs are staged at a time, two barriers a step. Sums run in levels (LEVEL inputs,
// FAR_LEVELS of those, and all), so that the rounding error of long sums does not grow with them; a matrix
// unit may round worse than f32 does.
//
// A fragment has no elements that a thread could name: at the end each goes through workgroup memory.

const TILE_OUTPUTS = 4u * TILE_QUADS;
// Rows of workgroup memory, skewed by 16 bytes so that they begin in different banks, in quads (y: f32).
const X_STRIDE = STEP / 4u + 2u;
const Y_STRIDE = EDGE + 4u;

const SIZE_x = TILE_ROWS * X_STRIDE;
var<workgroup> wg_y: array<f32, DOWN * ACROSS * EDGE * Y_STRIDE>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    PLACE_ARGUMENTS,
) {
    let place = Place(PLACE_VALUES);
    let thread = thread_of(place);
    let tiles_n = div_ceil(params.outputs, TILE_OUTPUTS);
    // The surplus of a folded dispatch computes the last tile again and stores nothing (naga wants all to
    // arrive at the operations on fragments).
    let asked = linear_group(group, groups);
    let tile = min(asked, params.groups - 1u);
    let first_row = band_of(tile / tiles_n) * TILE_ROWS;
    let first_quad = tile % tiles_n * TILE_QUADS;
    // The subgroup's own, in the tile. (Smaller subgroups than THREADS was made for are more: those do as the first
    // do, and only these store.)
    let subgroup = place.subgroup % (DOWN * ACROSS);
    let band = subgroup / ACROSS * BANDS * EDGE;
    let column = subgroup % ACROSS * COLUMNS * EDGE;
    let stores = asked < params.groups && place.subgroup < DOWN * ACROSS;

    //$ for b in 0..BANDS
    //$ for n in 0..COLUMNS
    var total_$b_$n = FRAGMENT<f32, C>();
    //$ for once in 0..FAR
    var far_$b_$n = FRAGMENT<f32, C>();
    //$ end
    //$ end
    //$ end
    for (var level = 0u; level < params.inputs; level += LEVEL) {
        //$ for b in 0..BANDS
        //$ for n in 0..COLUMNS
        var sum_$b_$n = FRAGMENT<f32, C>();
        //$ end
        //$ end
        let end = min(level + LEVEL, params.inputs);
        for (var k = level; k < end; k += STEP) {
            for (var at = thread; at < TILE_ROWS * (STEP / 4u); at += THREADS) {
                // Past the edges the last row is read again; beyond the inputs lie zeros.
                let row = at / (STEP / 4u);
                let e = at % (STEP / 4u);
                var x = vec4<f32>();
                if k + 4u * e < params.inputs {
                    x = x4(min(first_row + row, params.rows - 1u), k + 4u * e);
                }
                put_x(row * X_STRIDE + e, vec4<f16>(x));
            }
            for (var at = thread; at < TILE_OUTPUTS * (STEP / 4u); at += THREADS) {
                stage_w(at, first_quad, k);
            }
            workgroupBarrier();
            for (var e = 0u; e < STEP; e += EDGE) {
                //$ for b in 0..BANDS
                let x_$b = coopLoadT<FRAGMENT<f16, A>>(&wg_x[CELL * ((band + $bu * EDGE) * X_STRIDE + e / 4u)], CELL * X_STRIDE);
                //$ end
                //$ for n in 0..COLUMNS
                {
                    let w = LOAD_W<FRAGMENT<f16, B>>(&wg_w[CELL * w_at(column + $nu * EDGE, e)], CELL * W_STRIDE);
                    //$ for b in 0..BANDS
                    sum_$b_$n = coopMultiplyAdd(x_$b, w, sum_$b_$n);
                    //$ end
                }
                //$ end
            }
            workgroupBarrier();
        }
        //$ for b in 0..BANDS
        //$ for n in 0..COLUMNS
        total_$b_$n = total_$b_$n + sum_$b_$n;
        //$ end
        //$ end
        //$ for once in 0..FAR
        if (level / LEVEL + 1u) % FAR_LEVELS == 0u {
            //$ for b in 0..BANDS
            //$ for n in 0..COLUMNS
            far_$b_$n = far_$b_$n + total_$b_$n;
            total_$b_$n = FRAGMENT<f32, C>();
            //$ end
            //$ end
        }
        //$ end
    }

    //$ for b in 0..BANDS
    //$ for n in 0..COLUMNS
    //$ for once in 0..FAR
    total_$b_$n = total_$b_$n + far_$b_$n;
    //$ end
    coopStoreT(total_$b_$n, &wg_y[subgroup * EDGE * Y_STRIDE], Y_STRIDE);
    workgroupBarrier();
    for (var at = place.lane; at < EDGE * EDGE / 4u && stores; at += THREADS / place.subgroups) {
        let row = at / (EDGE / 4u);
        let quad = at % (EDGE / 4u);
        let y = (subgroup * EDGE + row) * Y_STRIDE + 4u * quad;
        let sum = vec4<f32>(wg_y[y], wg_y[y + 1u], wg_y[y + 2u], wg_y[y + 3u]);
        end_quad(first_row + band + $bu * EDGE + row, first_quad + (column + $nu * EDGE) / 4u + quad, sum);
    }
    workgroupBarrier();
    //$ end
    //$ end
}
