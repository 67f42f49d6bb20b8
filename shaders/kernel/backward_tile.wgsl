// The gradients of fused attention (FlashAttention 2, Dao 2023, algorithm 2), one kernel for each of q, k and v:
// scores are computed again, and no pair leaves the workgroup. With delta and lse of kernel/backward_rows.wgsl:
//
//   S = finish(Q KT)   P = exp(S - lse)                      (seq_q, head_dim) @ (head_dim, seq_kv)
//   dP = dO VT         dS = P o (dP - delta) o finish'       (seq_q, head_dim_v) @ (head_dim_v, seq_kv)
//   dQ = scale dS K    dK = scale dST Q    dV = PT dO
//
// The three are one text: each sums, over others, a weight of the pair times a row of the other. A workgroup of
// LANES x ROW_LANES threads owns TILE = ROW_LANES ROWS rows (of queries, or of keys: shaders/backward/own_*.wgsl)
// and steps over STEP = 4 LANES others. A thread owns ROWS rows, of each step's pairs the others x + LANES c (c < 4),
// and of the gradient the quads x + LANES n. So each sum has one owner: no atomics, and the same bits each time.
//
// The others take turns in wg_other, SLICE quads of a row at a time: dO or V first (what dP is made of), then Q or K,
// which also are what dS is multiplied by and so need no second staging where a row is one slice. Own rows lie in
// workgroup memory for good where they have room there, else they come from the caches. Workgroup memory is priced in
// src/backward/kernel.rs; two barriers for each staging, and one for the weights.

const STEP = 4u * LANES;
const THREADS = LANES * ROW_LANES;
const SKEW = SLICE + 1u;
const SLICE_QUADS = SLICE / LANES;
const P_SKEW = LANES + 1u;

var<workgroup> wg_other: array<vec4<f32>, STEP * SKEW>;
var<workgroup> wg_weights: array<vec4<f32>, TILE * P_SKEW>;
// Whether what weights are multiplied by holds something that is not finite; steps take turns, so that one can be
// cleared while the other is in use.
var<workgroup> wg_careful: array<atomic<u32>, 2>;

// Stages SLICE quads, from `begin` on, of the others from `first` to `end`.
fn stage(thread: u32, b: u32, head: u32, first: u32, end: u32, begin: u32, turn: u32, is_a: bool) {
    // Turns that all threads take alike, as in shaders/kernel/linear_tile.wgsl.
    for (var round = 0u; round < STEP * SLICE; round += THREADS) {
        let at = round + thread;
        if at >= STEP * SLICE {
            continue;
        }
        let other = first + at / SLICE;
        let d = 4u * (begin + at % SLICE);
        var x = vec4<f32>();
        if other < end && d < select(params.head_dim_v, params.head_dim, is_a) {
            if is_a {
                x = load_other_a(other_row_a(b, head, other), d);
            } else {
                x = load_other_b(other_row_b(b, head, other), d);
            }
        }
        // 0 * NaN is NaN, also where the pair is dropped.
        if !is_finite4(x) {
            atomicStore(&wg_careful[turn], 1u);
        }
        wg_other[at / SLICE * SKEW + at % SLICE] = x;
    }
}

// Adds what the thread's four others of quad `e` of the slice make of an own quad.
fn add_products(sums: vec4<f32>, x: u32, e: u32, own: vec4<f32>) -> vec4<f32> {
    return add_dots(
        sums,
        own,
        wg_other[x * SKEW + e],
        wg_other[(x + LANES) * SKEW + e],
        wg_other[(x + 2u * LANES) * SKEW + e],
        wg_other[(x + 3u * LANES) * SKEW + e],
    );
}

// A weight times a row's quad; one of zero adds nothing, whatever lies there.
fn weighed(weight: f32, x: vec4<f32>) -> vec4<f32> {
    return select(weight * x, vec4<f32>(), weight == 0.0);
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let x = lane_of(thread);
    let tiles = div_ceil(params.row_count, TILE);
    let tile = linear_group(group, groups);
    if tile >= tiles * params.head_count {
        return;
    }
    let owner = owner_of(tile / tiles);
    let b = owner.x;
    let len_k = key_length(b);
    let row = params.row_first + tile % tiles * TILE;
    let row_end = min(row + TILE, params.row_first + params.row_count);
    let end = others(b, len_k);
    let met = met_by(b, row, row_end, len_k);
    let row_lane = row_lane_of(thread);
    let own_row = row_lane * ROWS;

    // Rows past the end repeat the last one, and are not stored.
    var own: array<u32, ROWS>;
    var acc: array<vec4<f32>, ROWS * QUADS>;
    for (var r = 0u; r < ROWS; r += 1u) {
        own[r] = min(row + own_row + r, row_end - 1u);
    }

    if thread == 0u {
        atomicStore(&wg_careful[0], 0u);
    }
    var turn = 0u;
    var staged_own = false;
    for (var meeting = 0u; meeting < met_heads(); meeting += 1u) {
        let head = owner.y + meeting;
        let part = part_of(meeting, met);
        if part.x >= part.y {
            continue;
        }
        var at_a: array<u32, ROWS>;
        var at_b: array<u32, ROWS>;
        var own_term: array<vec2<f32>, ROWS>;
        for (var r = 0u; r < ROWS; r += 1u) {
            let exists = own_that_exists(b, own[r], len_k);
            at_a[r] = own_a(b, head, exists);
            //$ for n in 0..OF_SCORES
            at_b[r] = own_b(b, head, exists);
            //$ end
            own_term[r] = own_terms(b, head, exists);
        }
        if !staged_own {
            staged_own = true;
            stage_own(thread, b, head, row, own_that_exists(b, row_end - 1u, len_k));
        }
        for (var first = part.x / STEP * STEP; first < part.y; first += STEP) {
            var dps = array<vec4<f32>, ROWS>();
            //$ for n in 0..OF_SCORES
            for (var begin = 0u; 4u * begin < params.head_dim_v; begin += SLICE) {
                workgroupBarrier();
                stage(thread, b, head, first, end, begin, turn, false);
                workgroupBarrier();
                for (var e = 0u; e < SLICE && 4u * (begin + e) < params.head_dim_v; e += 1u) {
                    for (var r = 0u; r < ROWS; r += 1u) {
                        dps[r] = add_products(dps[r], x, e, own_quad_b(row_lane, r, at_b[r], begin + e));
                    }
                }
            }
            //$ end
            var dots = array<vec4<f32>, ROWS>();
            for (var begin = 0u; 4u * begin < params.head_dim; begin += SLICE) {
                workgroupBarrier();
                if thread == 0u {
                    atomicStore(&wg_careful[1u - turn], 0u);
                }
                stage(thread, b, head, first, end, begin, turn, true);
                stage_terms(thread, b, head, first, end);
                workgroupBarrier();
                for (var e = 0u; e < SLICE && 4u * (begin + e) < params.head_dim; e += 1u) {
                    for (var r = 0u; r < ROWS; r += 1u) {
                        dots[r] = add_products(dots[r], x, e, own_quad_a(row_lane, r, at_a[r], begin + e));
                    }
                }
            }

            let inside = first >= part.x && first + STEP <= part.y && all_kept(b, row, row_end, first, len_k);
            for (var r = 0u; r < ROWS; r += 1u) {
                var lse: vec4<f32>;
                var delta: vec4<f32>;
                for (var c = 0u; c < 4u; c += 1u) {
                    let terms = terms_of(own_term[r], x + c * LANES);
                    lse = with_component(lse, c, terms.x);
                    delta = with_component(delta, c, terms.y);
                }
                let scaled = dots[r] * params.scale;
                // Zeros by name: in a browser what is declared without them keeps those of the row before.
                var weight = vec4<f32>();
                if PLAIN && inside && are_ordinary(scaled) && are_ordinary(lse) {
                    weight = exp2((scaled - lse) * LOG2_E);
                    if OF_SCORES == 1u {
                        weight *= dps[r] - delta;
                    }
                } else {
                    for (var c = 0u; c < 4u; c += 1u) {
                        let other = first + x + c * LANES;
                        if other < part.x || other >= part.y {
                            continue;
                        }
                        let pair = pair_of(own[r], other);
                        let range = kv_range(b, pair.x, len_k);
                        let s = finish_score(component(dots[r], c), b, head, pair.x, pair.y, range, len_k, TILE_MIXED);
                        // As bits: a NaN is no number that differs, on some adapters.
                        if bitcast<u32>(s) == bitcast<u32>(DROPPED) {
                            continue;
                        }
                        var of_pair = exp_of_one((s - component(lse, c)) * LOG2_E);
                        if OF_SCORES == 1u {
                            let dp = component(dps[r], c) - component(delta, c);
                            of_pair *= dp * slope_of(component(dots[r], c));
                        }
                        weight = with_component(weight, c, of_pair);
                    }
                }
                wg_weights[(own_row + r) * P_SKEW + x] = weight;
            }

            // Text, as in the forward kernel.
            //$ for slice in 0..SLICES
            {
                const begin = $sliceu * SLICE_QUADS;
                if !STAGED || begin > 0u {
                    workgroupBarrier();
                    stage(thread, b, head, first, end, begin * LANES, turn, OF_SCORES == 1u);
                }
                workgroupBarrier();
                let careful = atomicLoad(&wg_careful[turn]) != 0u;
                const count = min(SLICE_QUADS, QUADS - begin);
                //$ for share in 0..SHARES
                {
                    const n = $shareu * SHARE;
                    const sharing = min(count, n + SHARE) - min(count, n);
                    // Each step's sum by itself, so that the rounding error of many does not grow with them.
                    var part = array<vec4<f32>, ROWS * SHARE>();
                    for (var giver = 0u; giver < LANES; giver += 1u) {
                        if careful {
                            // Seldom, and text: a loop that a compiler leaves one would keep all parts in memory.
                            //$ for s in 0..SHARE
                            if $su < sharing {
                                let column = x + (n + $su) * LANES;
                                let v0 = wg_other[giver * SKEW + column];
                                let v1 = wg_other[(giver + LANES) * SKEW + column];
                                let v2 = wg_other[(giver + 2u * LANES) * SKEW + column];
                                let v3 = wg_other[(giver + 3u * LANES) * SKEW + column];
                                //$ for r in 0..ROWS
                                {
                                    let w = wg_weights[(own_row + $ru) * P_SKEW + giver];
                                    let at = $ru * SHARE + $su;
                                    part[at] += weighed(w.x, v0) + weighed(w.y, v1);
                                    part[at] += weighed(w.z, v2) + weighed(w.w, v3);
                                }
                                //$ end
                            }
                            //$ end
                            continue;
                        }
                        for (var s = 0u; s < sharing; s += 1u) {
                            let column = x + (n + s) * LANES;
                            let v0 = wg_other[giver * SKEW + column];
                            let v1 = wg_other[(giver + LANES) * SKEW + column];
                            let v2 = wg_other[(giver + 2u * LANES) * SKEW + column];
                            let v3 = wg_other[(giver + 3u * LANES) * SKEW + column];
                            for (var r = 0u; r < ROWS; r += 1u) {
                                let w = wg_weights[(own_row + r) * P_SKEW + giver];
                                let at = r * SHARE + s;
                                part[at] += w.x * v0;
                                part[at] += w.y * v1;
                                part[at] += w.z * v2;
                                part[at] += w.w * v3;
                            }
                        }
                    }
                    for (var r = 0u; r < ROWS; r += 1u) {
                        for (var s = 0u; s < sharing; s += 1u) {
                            acc[r * QUADS + begin + n + s] += part[r * SHARE + s];
                        }
                    }
                }
                //$ end
            }
            //$ end
            turn = 1u - turn;
        }
    }

    let head = head_of_gradient(owner.y);
    let factor = select(1.0, params.scale, OF_SCORES == 1u);
    for (var r = 0u; r < ROWS; r += 1u) {
        let at = row + own_row + r;
        if at < row_end && is_stored(b, at, len_k) {
            for (var n = 0u; n < QUADS; n += 1u) {
                let quad = x + n * LANES;
                if 4u * quad < OUT_WIDTH {
                    let sum = acc[r * QUADS + n];
                    end_quad((tile * TILE + own_row + r) * OUT_QUADS + quad, b, head, at, quad, sum, factor);
                }
            }
        }
    }
}
