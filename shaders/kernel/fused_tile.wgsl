// Fused attention through workgroup memory (FlashAttention, Dao 2022; 2: Dao 2023): no score leaves
// the workgroup. With m the running maximum, l the running sum and keys in steps of TILE_KV:
//
//   S = finish(Q KT)                      (TILE_Q, head_dim) @ (head_dim, TILE_KV)
//   m' = max(m, rowmax S) if that rises by more than LAZY, else m
//   P = exp(S - m')   l' = l exp(m - m') + rowsum P
//   O' = O exp(m - m') + P V              (TILE_Q, TILE_KV) @ (TILE_KV, head_dim_v)
//
// A workgroup of LANES x ROW_LANES threads owns TILE_Q = ROW_LANES ROWS query rows of one head. A
// thread owns ROWS of them, of each step's scores the keys x + LANES c (c < 4), and of O the quads
// x + LANES n: so m, l and the rescaling of O need no exchange but the maximum over a row's LANES.
// That one, and the weights P, go through workgroup memory or through subgroup operations: the two
// kernels that share this text (shaders/exchange/). K and V take turns in wg_kv, SLICE quads of a row
// at a time, with four barriers a step where a row is one slice and two more for each further slice of
// K or V; or (BOTH) they lie there side by side, where subgroups exchange the rest, with three barriers a
// step (staged_subgroup.wgsl has two of them). Q lies in workgroup memory for good where it has room there,
// else it comes from the caches (shaders/exchange/queries_*.wgsl). Workgroup memory is priced in
// src/fused.rs. Each step's P V is summed apart before it joins O, so that the rounding error of a long
// row does not grow with it; SHARE quads of a row at a time, for which weights are exchanged once.

const TILE_KV = 4u * LANES;
const THREADS = LANES * ROW_LANES;
const KV_SKEW = SLICE + 1u;
const SLICE_QUADS = SLICE / LANES;

// Where the values begin.
const V_AT = select(0u, TILE_KV * KV_SKEW, BOTH);

var<workgroup> wg_kv: array<vec4<f32>, V_AT + TILE_KV * KV_SKEW>;
// Whether the staged values hold something that is not finite; steps take turns, so that one can be
// cleared while the other is in use.
var<workgroup> wg_careful: array<atomic<u32>, 2>;

// Stages SLICE quads, from `begin` on, of the keys from `first` on; and the same of the values.
fn stage_k(thread: u32, b: u32, kv_head: u32, first: u32, begin: u32, len_k: u32) {
    for (var at = thread; at < TILE_KV * SLICE; at += THREADS) {
        let d = 4u * (begin + at % SLICE);
        var k = vec4<f32>();
        if WHOLE_D == 1u || d < params.head_dim {
            k = load4_k(row_k(b, kv_head, min(first + at / SLICE, len_k - 1u)), d);
        }
        wg_kv[at / SLICE * KV_SKEW + at % SLICE] = k;
    }
}

fn stage_v(thread: u32, b: u32, kv_head: u32, first: u32, begin: u32, len_k: u32, turn: u32) {
    for (var at = thread; at < TILE_KV * SLICE; at += THREADS) {
        let key = first + at / SLICE;
        let d = 4u * (begin + at % SLICE);
        var v = vec4<f32>();
        if key < len_k && (WHOLE_V == 1u || d < params.head_dim_v) {
            v = load4_v(row_v(b, kv_head, key), d);
        }
        // 0 * NaN is NaN, also where the key is dropped: such quads are added by themselves.
        if !is_finite4(v) {
            v = vec4<f32>();
            atomicStore(&wg_careful[turn], 1u);
        }
        wg_kv[V_AT + at / SLICE * KV_SKEW + at % SLICE] = v;
    }
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    PLACE_ARGUMENTS,
) {
    let place = Place(PLACE_VALUES);
    let thread = thread_of(place);
    let x = lane_of(thread);
    let tiles_q = div_ceil(owned_rows(), TILE_Q);
    let tile_split = tile_of(linear_group(group, groups), tiles_q * owners());
    let tile = tile_split.x;
    let split = tile_split.y;
    if tile >= tiles_q * owners() {
        return;
    }
    let owner = tile / tiles_q;
    let row = band_row(tile % tiles_q, tiles_q, TILE_Q);
    let queries = queries_of(row, min(row + TILE_Q, owned_rows()));
    let bh = batch_head(head_of(owner, 0u));
    let kv_head = bh.y / params.group_size;
    let len_k = key_length(bh.x);
    let seen_by_any = tile_kv_range(bh.x, queries.x, queries.y, len_k);
    let part = part_of(seen_by_any, split);
    let seen = own_part(seen_by_any, part);
    let seen_by_all = tile_full_range(bh.x, queries.x, queries.y, len_k);
    let quads = div_ceil(params.head_dim, 4u);
    let row_lane = row_lane_of(thread);
    let own_row = row_lane * ROWS;

    // Rows past the end repeat the last one, and are not stored.
    var query: array<u32, ROWS>;
    var start: array<vec2<f32>, ROWS>;
    var peaks: array<f32, ROWS>;
    var m: array<f32, ROWS>;
    var l: array<f32, ROWS>;
    var acc = array<vec4<f32>, ROWS * QUADS>();
    for (var r = 0u; r < ROWS; r += 1u) {
        let own = min(row + own_row + r, owned_rows() - 1u);
        let head = head_of(owner, own);
        query[r] = query_row(head, row_of(own));
        start[r] = start_of(head * params.row_count + row_of(own));
        m[r] = start[r].x;
        l[r] = 0.0;
    }

    stage_q(thread, owner, row);
    if thread == 0u {
        atomicStore(&wg_careful[0], 0u);
    }
    var turn = 0u;
    for (var first = seen.x / TILE_KV * TILE_KV; first < seen.y; first += TILE_KV) {
        // Whole tiles of the mask: chunks of rows begin at one, or lie inside one.
        let masked = mask_tile(bh.x, bh.y, queries.x, first);
        if masked == TILE_DROPPED {
            continue;
        }
        // Products, then scores, then weights.
        var dots = array<vec4<f32>, ROWS>();
        var careful = false;
        for (var begin = 0u; begin < quads; begin += SLICE) {
            workgroupBarrier();
            stage_k(thread, bh.x, kv_head, first, begin, len_k);
            if BOTH {
                stage_v(thread, bh.x, kv_head, first, 0u, len_k, turn);
            }
            if thread == 0u {
                atomicStore(&wg_careful[1u - turn], 0u);
            }
            if BOTH {
                careful = staged(turn);
            } else {
                workgroupBarrier();
            }
            for (var e = 0u; e < min(SLICE, quads - begin); e += 1u) {
                let k0 = wg_kv[x * KV_SKEW + e];
                let k1 = wg_kv[(x + LANES) * KV_SKEW + e];
                let k2 = wg_kv[(x + 2u * LANES) * KV_SKEW + e];
                let k3 = wg_kv[(x + 3u * LANES) * KV_SKEW + e];
                for (var r = 0u; r < ROWS; r += 1u) {
                    let q = quad_of_q(row_lane, r, query[r], begin + e);
                    dots[r] = add_dots(dots[r], q, k0, k1, k2, k3);
                }
            }
        }

        let inside = first >= seen_by_all.x && first + TILE_KV <= seen_by_all.y;
        // Whether scores are products by scale alone, as most are.
        var plain = PLAIN == 1u && inside;
        if plain {
            var sizes = vec4<f32>();
            for (var r = 0u; r < ROWS; r += 1u) {
                sizes += abs(dots[r] * params.scale);
            }
            plain = are_ordinary(sizes);
        }
        for (var r = 0u; r < ROWS; r += 1u) {
            if plain {
                dots[r] *= params.scale;
            } else {
                let own = min(row + own_row + r, owned_rows() - 1u);
                let h = batch_head(head_of(owner, own)).y;
                let i = params.row_first + row_of(own);
                var range = vec2<u32>(0u, len_k);
                if !inside {
                    range = own_part(kv_range(bh.x, i, len_k), part);
                }
                for (var c = 0u; c < 4u; c += 1u) {
                    let j = first + x + c * LANES;
                    let s = finish_score(component(dots[r], c), bh.x, h, i, j, range, len_k, masked);
                    dots[r] = with_component(dots[r], c, s);
                }
            }
            let s = dots[r];
            peaks[r] = max(max(s.x, s.y), max(s.z, s.w));
            offer(own_row + r, x, peaks[r]);
        }
        if !BOTH {
            // All have read the keys, and offered.
            workgroupBarrier();
        }
        for (var r = 0u; r < ROWS; r += 1u) {
            let peak = row_max(own_row + r, peaks[r]);
            if peak > m[r] + LAZY {
                let shrink = shrinking(m[r], peak);
                m[r] = peak;
                l[r] *= shrink;
                for (var n = 0u; n < QUADS; n += 1u) {
                    acc[r * QUADS + n] *= shrink;
                }
            }
            var kept: vec4<f32>;
            if plain {
                kept = exp_of_ordinary(dots[r], m[r]);
                dots[r] = kept;
            } else {
                let dropped = bitcast<vec4<u32>>(dots[r]) == vec4<u32>(bitcast<u32>(DROPPED));
                let p = exp_of((dots[r] - m[r]) * LOG2_E);
                kept = select(p, vec4<f32>(), dropped);
                dots[r] = marked(p, dropped);
            }
            l[r] += (kept.x + kept.y) + (kept.z + kept.w);
            give_weights(own_row + r, x, dots[r]);
        }

        // Slices, and exchanges of weights, are text: in loops some compilers did not see which quads of O are meant, and
        // kept O in memory.
        //$ for slice in 0..SLICES
        {
            const begin = $sliceu * SLICE_QUADS;
            if !BOTH {
                if begin > 0u {
                    workgroupBarrier();
                }
                stage_v(thread, bh.x, kv_head, first, begin * LANES, len_k, turn);
                careful = staged(turn);
            }
            const count = min(SLICE_QUADS, QUADS - begin);
            //$ for share in 0..SHARES
            {
                const n = $shareu * SHARE;
                const sharing = min(count, n + SHARE) - min(count, n);
                var part = array<vec4<f32>, ROWS * SHARE>();
                for (var giver = 0u; giver < LANES; giver += 1u) {
                    var weights: array<vec4<f32>, ROWS>;
                    for (var r = 0u; r < ROWS; r += 1u) {
                        weights[r] = weights_of(own_row + r, giver, dots[r], place);
                    }
                    for (var s = 0u; s < sharing; s += 1u) {
                        let column = V_AT + x + (n + s) * LANES;
                        let v0 = wg_kv[giver * KV_SKEW + column];
                        let v1 = wg_kv[(giver + LANES) * KV_SKEW + column];
                        let v2 = wg_kv[(giver + 2u * LANES) * KV_SKEW + column];
                        let v3 = wg_kv[(giver + 3u * LANES) * KV_SKEW + column];
                        for (var r = 0u; r < ROWS; r += 1u) {
                            let p = weights[r];
                            // One by one: their sum would be an addition more.
                            let at = r * SHARE + s;
                            part[at] += p.x * v0;
                            part[at] += p.y * v1;
                            part[at] += p.z * v2;
                            part[at] += p.w * v3;
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
            if careful {
                for (var key = 0u; key < TILE_KV && first + key < len_k; key += 1u) {
                    // All lanes take part in the exchange, whatever they load.
                    var weights: array<f32, ROWS>;
                    for (var r = 0u; r < ROWS; r += 1u) {
                        weights[r] = component(weights_of(own_row + r, key % LANES, dots[r], place), key / LANES);
                    }
                    for (var n = 0u; n < count; n += 1u) {
                        let d = 4u * (x + (begin + n) * LANES);
                        var v = vec4<f32>();
                        if d < params.head_dim_v {
                            v = load4_v(row_v(bh.x, kv_head, first + key), d);
                        }
                        for (var r = 0u; r < ROWS; r += 1u) {
                            if !is_finite4(v) && !is_dropped_weight(weights[r]) {
                                acc[r * QUADS + begin + n] += weights[r] * v;
                            }
                        }
                    }
                }
            }
        }
        //$ end
        turn = 1u - turn;
    }

    // A row's sum lies spread over its lanes.
    workgroupBarrier();
    for (var r = 0u; r < ROWS; r += 1u) {
        offer(own_row + r, x, l[r]);
    }
    workgroupBarrier();
    for (var r = 0u; r < ROWS; r += 1u) {
        let own = row + own_row + r;
        let sum = row_sum(own_row + r, l[r]);
        if own < owned_rows() && is_query(bh.x, params.row_first + row_of(own)) {
            let head = head_of(owner, own);
            let h = batch_head(head).y;
            let index = head * params.row_count + row_of(own);
            let end = end_of(index, h, start[r], m[r], sum, x == 0u, split);
            let at = row_o(bh.x, h, params.row_first + row_of(own));
            for (var n = 0u; n < QUADS; n += 1u) {
                let d = 4u * (x + n * LANES);
                if d < params.head_dim_v {
                    end_quad(index, at, d, acc[r * QUADS + n], end, split);
                }
            }
        }
    }
}
