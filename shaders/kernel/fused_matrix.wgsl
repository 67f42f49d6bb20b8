// Fused attention on cooperative matrices (FlashAttention, Dao 2022): products of EDGE x EDGE fragments
// by matrix units, f16 factors and f32 sums, softmax by threads. The recurrence is that of the tile
// kernel (fused_tile.wgsl).
//
// A workgroup owns TILE_Q query rows of one head. COLUMNS subgroups share a band of BANDS fragments of
// rows: each computes S of every COLUMNS-th fragment of keys, and keeps OWN_FRAGS fragments of columns of
// O (variables of their own, hence the unrolled text, src/unroll.rs). With one column, no row leaves its
// subgroup but for the softmax (FlashAttention 2); more are for widths whose O one subgroup cannot keep,
// and for compilers that take their time over each operation on fragments. Q stays in fragments where
// KEPT_Q is 1, else in workgroup memory. In a step of TILE_KV keys:
//
//   stage K | S = Q KT, stored | each thread: scores of a part of its row, P stored; stage V | O += P V
//
// with a barrier at each stroke. K and V take turns in wg_kv, V turned over: the rows of both hold what a product
// sums over, as matrix units take their second factor. (Read across its rows, it costs a load for each number, or
// a transposition for each fragment.) A fragment has no elements that a thread could name, so S and P go through
// workgroup memory (the bytes of a step: 8 TILE_Q TILE_KV for S, 4 for P, and 2 (TILE_KV D) for each of K and V once
// for the staging and once for each subgroup's reading).
// O is rescaled there as well, but only in a step where some row's maximum rises by more than LAZY; and
// what is not finite in V, which staging replaces by 0, joins O on the same way. Sums are taken of P
// before it is rounded to f16: lse keeps f32's digits. The m that weights refer to lies REACH below the
// largest score: they use f16 from its largest number on down.
//
// Projected queries are f32: each is scaled by a power of two into f16's range and split into two f16
// (Q_PARTS), whose products with K are summed.
//
// The LANES threads of a row are neighbours in a subgroup (shaders/exchange/subgroup.wgsl).

// Subgroups that have products of their own.
const SUBGROUPS = TILE_Q / (BANDS * EDGE) * COLUMNS;
const THREADS = LANES * TILE_Q;
// Quads of four scores of a thread.
const OWN_QUADS = TILE_KV / 4u / LANES;
// A row of K (and Q), and one of V in whole fragments of each column, in quads.
const D_QUADS = D_FRAGS * EDGE / 4u;
const V_QUADS = COLUMNS * OWN_FRAGS * EDGE / 4u;
const KEY_QUADS = TILE_KV / 4u;
// Rows of workgroup memory, skewed so that they begin in different banks, in quads: by 16 bytes, and S by 32, as its
// rows are read by two threads and stored by four, eight bytes each. V has a row for each column, like P for each query.
const K_STRIDE = D_QUADS + 2u;
const S_STRIDE = KEY_QUADS + 2u;
const P_STRIDE = KEY_QUADS + 2u;
const V_STRIDE = P_STRIDE;

// Quads of workgroup memory (shaders/exchange/quads.wgsl). Where Q is kept it lies at first where K and V do then.
const SIZE_kv = max(max(TILE_KV, TILE_Q * KEPT_Q) * K_STRIDE, 4u * V_QUADS * V_STRIDE);
//$ for once in KEPT_Q..1
const SIZE_q = Q_PARTS * TILE_Q * K_STRIDE;
//$ end
const SIZE_s = TILE_Q * S_STRIDE;
const SIZE_p = TILE_Q * P_STRIDE;
// exp(REACH) = 2^8, and exp(REACH + LAZY) is just below f16's largest number. Below 2^-14 f16 loses digits, or all
// of them on some devices: a score may lie 15 below the largest then, not 10, and many such keys be a large share.
const REACH: f32 = 5.545177;

// Whether O has to leave its fragments, and whether for values that are not finite.
var<workgroup> wg_leaves: atomic<u32>;
var<workgroup> wg_careful: atomic<u32>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    PLACE_ARGUMENTS,
) {
    let place = Place(PLACE_VALUES);
    let thread = thread_of(place);
    let x = thread % LANES;
    let own_row = thread / LANES;
    let tiles_q = div_ceil(owned_rows(), TILE_Q);
    let tiles = tiles_q * owners();
    // The surplus of a folded dispatch sees no key and stores nothing (naga wants all to arrive at the
    // operations on fragments).
    let tile_split = tile_of(linear_group(group, groups), tiles);
    let surplus = tile_split.x >= tiles;
    let tile = min(tile_split.x, tiles - 1u);
    let split = tile_split.y;
    let owner = tile / tiles_q;
    let row = band_row(tile % tiles_q, tiles_q, TILE_Q);
    let queries = queries_of(row, min(row + TILE_Q, owned_rows()));
    let bh = batch_head(head_of(owner, 0u));
    let kv_head = bh.y / params.group_size;
    let len_k = key_length(bh.x);
    let seen_by_any = tile_kv_range(bh.x, queries.x, queries.y, len_k);
    let part = part_of(seen_by_any, split);
    var seen = own_part(seen_by_any, part);
    if surplus {
        seen = vec2<u32>();
    }
    let seen_by_all = tile_full_range(bh.x, queries.x, queries.y, len_k);
    // Rows past the end repeat the last one, and are not stored.
    let own = min(row + own_row, owned_rows() - 1u);
    let head = head_of(owner, own);
    let h = batch_head(head).y;
    let i = params.row_first + row_of(own);
    let index = head * params.row_count + row_of(own);
    // Zero. A processor's compiler must not know: it would unroll loops over operations on fragments.
    //$ for once in 0..ROLLED
    let nought = params.row_count >> 31u;
    //$ end
    //$ for once in ROLLED..1
    const nought = 0u;
    //$ end
    // Smaller subgroups than THREADS was made for are more: those do, and store, as the first do.
    let subgroup = place.subgroup % SUBGROUPS;
    let band = subgroup / COLUMNS * BANDS * EDGE;
    let column = subgroup % COLUMNS;

    let query = query_row(head, row_of(own));
    var scale = 1.0;
    var unscale = 1.0;
    if Q_PARTS > 1u {
        var largest = 0.0;
        for (var d = 4u * x; d < params.head_dim; d += 4u * LANES) {
            let q = abs(load4_q(query, d));
            largest = max(largest, max(max(q.x, q.y), max(q.z, q.w)));
        }
        // By powers of two, so that scaling is exact; to 2^14, so that of the second part too few numbers
        // to matter are below 2^-14, where f16 has no normal ones and some devices have zero.
        let exponent = clamp(bitcast<u32>(row_max(own_row, largest)) >> 23u, 15u, 253u);
        scale = bitcast<f32>((268u - exponent) << 23u);
        unscale = bitcast<f32>((exponent - 14u) << 23u);
    }
    //$ for h in 0..Q_PARTS
    //$ for once in 0..KEPT_Q
    workgroupBarrier();
    //$ end
    for (var e = x; e < D_QUADS; e += LANES) {
        var q = vec4<f32>();
        if 4u * e < params.head_dim {
            q = scale * load4_q(query, 4u * e);
        }
        if Q_PARTS > 1u && is_finite4(q) {
            // The leading 11 bits, and the rest. Cut by bits: a compiler may take a conversion to f16 and
            // back for none.
            let leading = bitcast<vec4<f32>>(bitcast<vec4<u32>>(q) & vec4<u32>(0xffffe000u));
            q = select(q - leading, leading, $hu == 0u);
        } else if $hu > 0u {
            q = vec4<f32>();
        }
        //$ for once in 0..KEPT_Q
        put_kv(own_row * K_STRIDE + e, vec4<f16>(q));
        //$ end
        //$ for once in KEPT_Q..1
        put_q(($hu * TILE_Q + own_row) * K_STRIDE + e, vec4<f16>(q));
        //$ end
    }
    //$ for once in 0..KEPT_Q
    workgroupBarrier();
    //$ for b in 0..BANDS
    //$ for e in 0..D_FRAGS
    let q_$b_$e_$h = coopLoadT<FRAGMENT<f16, A>>(&wg_kv[CELL * ((band + $bu * EDGE) * K_STRIDE + $eu * EDGE / 4u)], CELL * K_STRIDE);
    //$ end
    //$ end
    //$ end
    //$ end
    //$ for b in 0..BANDS
    //$ for n in 0..OWN_FRAGS
    var o_$b_$n = FRAGMENT<f32, C>();
    //$ end
    //$ end

    let start = start_of(index);
    var m = start.x;
    var l = 0.0;
    for (var first = seen.x / TILE_KV * TILE_KV; first < seen.y; first += TILE_KV) {
        // Whole tiles of the mask: chunks of rows begin at one, or lie inside one.
        let masked = mask_tile(bh.x, bh.y, queries.x, first);
        if masked == TILE_DROPPED {
            continue;
        }
        workgroupBarrier();
        stage_k(thread, nought, bh.x, kv_head, first, len_k);
        if thread == 0u {
            atomicStore(&wg_leaves, 0u);
            atomicStore(&wg_careful, 0u);
        }
        workgroupBarrier();
        // SIDE fragments of S side by side: their products do not wait for one another.
        for (var own = 0u; own < KEY_FRAGS / COLUMNS + nought; own += SIDE) {
            //$ for c in 0..SIDE
            let key_$c = ((own + $cu) * COLUMNS + column) * EDGE;
            //$ for b in 0..BANDS
            var s_$b_$c = FRAGMENT<f32, C>();
            //$ end
            //$ end
            // Rows of K are read as columns: its transpose.
            //$ for once in 0..KEPT_Q
            //$ for e in 0..D_FRAGS
            //$ for c in 0..SIDE
            {
                let k = coopLoad<FRAGMENT<f16, B>>(&wg_kv[CELL * (key_$c * K_STRIDE + $eu * EDGE / 4u)], CELL * K_STRIDE);
                //$ for b in 0..BANDS
                //$ for h in 0..Q_PARTS
                s_$b_$c = coopMultiplyAdd(q_$b_$e_$h, k, s_$b_$c);
                //$ end
                //$ end
            }
            //$ end
            //$ end
            //$ end
            //$ for once in KEPT_Q..1
            for (var e = 0u; e < D_FRAGS + nought; e += 1u) {
                //$ for b in 0..BANDS
                //$ for h in 0..Q_PARTS
                let q_$b_$h = coopLoadT<FRAGMENT<f16, A>>(&wg_q[CELL * (($hu * TILE_Q + band + $bu * EDGE) * K_STRIDE + e * EDGE / 4u)], CELL * K_STRIDE);
                //$ end
                //$ end
                //$ for c in 0..SIDE
                {
                    let k = coopLoad<FRAGMENT<f16, B>>(&wg_kv[CELL * (key_$c * K_STRIDE + e * EDGE / 4u)], CELL * K_STRIDE);
                    //$ for b in 0..BANDS
                    //$ for h in 0..Q_PARTS
                    s_$b_$c = coopMultiplyAdd(q_$b_$h, k, s_$b_$c);
                    //$ end
                    //$ end
                }
                //$ end
            }
            //$ end
            //$ for c in 0..SIDE
            //$ for b in 0..BANDS
            coopStoreT(s_$b_$c, &wg_s[CELL * ((band + $bu * EDGE) * S_STRIDE + key_$c / 4u)], CELL * S_STRIDE);
            //$ end
            //$ end
        }
        workgroupBarrier();

        let inside = first >= seen_by_all.x && first + TILE_KV <= seen_by_all.y;
        var range = vec2<u32>(0u, len_k);
        if !inside {
            range = own_part(kv_range(bh.x, i, len_k), part);
        }
        // Whether scores are products by scale alone, as most are.
        var plain = PLAIN == 1u && inside;
        var scores: array<vec4<f32>, OWN_QUADS>;
        if plain {
            var sizes = vec4<f32>();
            for (var c = 0u; c < OWN_QUADS; c += 1u) {
                scores[c] = (unscale * params.scale) * get_s(own_row * S_STRIDE + x + c * LANES);
                sizes += abs(scores[c]);
            }
            plain = are_ordinary(sizes);
        }
        var peak = DROPPED;
        for (var c = 0u; c < OWN_QUADS; c += 1u) {
            if !plain {
                let quad = x + c * LANES;
                let dots = unscale * get_s(own_row * S_STRIDE + quad);
                for (var j = 0u; j < 4u; j += 1u) {
                    scores[c][j] = finish_score(dots[j], bh.x, h, i, first + 4u * quad + j, range, len_k, masked);
                }
            }
            peak = max(peak, max(max(scores[c].x, scores[c].y), max(scores[c].z, scores[c].w)));
        }
        peak = row_max(own_row, peak);
        var shrink = 1.0;
        // A difference: rounding could lift a sum past what f16 holds.
        if peak - m > REACH + LAZY {
            let risen = peak - REACH;
            shrink = shrinking(m, risen);
            if m != DROPPED {
                atomicStore(&wg_leaves, 1u);
            }
            m = risen;
            l *= shrink;
        }
        for (var c = 0u; c < OWN_QUADS; c += 1u) {
            var kept: vec4<f32>;
            var weights: vec4<f16>;
            if plain {
                kept = exp_of_ordinary(scores[c], m);
                weights = vec4<f16>(kept);
            } else {
                let dropped = bitcast<vec4<u32>>(scores[c]) == vec4<u32>(bitcast<u32>(DROPPED));
                let p = exp_of((scores[c] - m) * LOG2_E);
                kept = select(p, vec4<f32>(), dropped);
                // Minus zero marks a dropped key.
                weights = select(vec4<f16>(p), vec4<f16>(-0.0), dropped);
            }
            l += (kept.x + kept.y) + (kept.z + kept.w);
            put_p(own_row * P_STRIDE + x + c * LANES, weights);
        }
        stage_v(thread, nought, bh.x, kv_head, first, len_k);
        workgroupBarrier();

        if atomicLoad(&wg_leaves) != 0u {
            let careful = atomicLoad(&wg_careful) != 0u;
            // ROUND_FRAGS fragments of each column at a time, as many as S has room for.
            //$ for g in 0..ROUNDS
            //$ for again in 0..$g below 1
            workgroupBarrier();
            //$ end
            //$ for n in $g*ROUND_FRAGS..$g*ROUND_FRAGS+ROUND_FRAGS below OWN_FRAGS
            //$ for b in 0..BANDS
            coopStoreT(o_$b_$n, &wg_s[CELL * ((band + $bu * EDGE) * S_STRIDE + (column * ROUND_FRAGS + $nu % ROUND_FRAGS) * EDGE / 4u)], CELL * S_STRIDE);
            //$ end
            //$ end
            workgroupBarrier();
            for (var e = x; e < TILE_KV / 4u; e += LANES) {
                let d = column_in_s($gu, e);
                if d < params.head_dim_v {
                    var sum = shrink * get_s(own_row * S_STRIDE + e);
                    if careful {
                        sum += not_finite(own_row, bh.x, kv_head, first, len_k, d);
                    }
                    put_s(own_row * S_STRIDE + e, sum);
                }
            }
            workgroupBarrier();
            //$ for n in $g*ROUND_FRAGS..$g*ROUND_FRAGS+ROUND_FRAGS below OWN_FRAGS
            //$ for b in 0..BANDS
            o_$b_$n = coopLoadT<FRAGMENT<f32, C>>(&wg_s[CELL * ((band + $bu * EDGE) * S_STRIDE + (column * ROUND_FRAGS + $nu % ROUND_FRAGS) * EDGE / 4u)], CELL * S_STRIDE);
            //$ end
            //$ end
            //$ end
        }
        for (var c = 0u; c < KEY_FRAGS + nought; c += 1u) {
            //$ for b in 0..BANDS
            let p_$b = coopLoadT<FRAGMENT<f16, A>>(&wg_p[CELL * ((band + $bu * EDGE) * P_STRIDE + c * EDGE / 4u)], CELL * P_STRIDE);
            //$ end
            //$ for n in 0..OWN_FRAGS
            {
                let v = coopLoad<FRAGMENT<f16, B>>(&wg_kv[CELL * ((column * OWN_FRAGS + $nu) * EDGE * V_STRIDE + c * EDGE / 4u)], CELL * V_STRIDE);
                //$ for b in 0..BANDS
                o_$b_$n = coopMultiplyAdd(p_$b, v, o_$b_$n);
                //$ end
            }
            //$ end
        }
    }

    let sum = row_sum(own_row, l);
    var end = vec2<f32>();
    let exists = !surplus && row + own_row < owned_rows() && is_query(bh.x, i);
    if exists {
        end = end_of(index, h, start, m, sum, x == 0u, split);
    }
    let out = row_o(bh.x, h, i);
    //$ for g in 0..ROUNDS
    workgroupBarrier();
    //$ for n in $g*ROUND_FRAGS..$g*ROUND_FRAGS+ROUND_FRAGS below OWN_FRAGS
    //$ for b in 0..BANDS
    coopStoreT(o_$b_$n, &wg_s[CELL * ((band + $bu * EDGE) * S_STRIDE + (column * ROUND_FRAGS + $nu % ROUND_FRAGS) * EDGE / 4u)], CELL * S_STRIDE);
    //$ end
    //$ end
    workgroupBarrier();
    for (var e = x; e < TILE_KV / 4u && exists; e += LANES) {
        let d = column_in_s($gu, e);
        if d < params.head_dim_v {
            end_quad(index, out, d, get_s(own_row * S_STRIDE + e), end, split);
        }
    }
    //$ end
}

// A block of V by its turn: its place among `width` blocks of columns, and its quad of keys. Neighbours take up to `side`
// quads of keys, and then the next columns.
fn block_of_v(at: u32, width: u32, side: u32) -> vec2<u32> {
    let beside = min(side, KEY_QUADS);
    return vec2<u32>(at / beside % width, at / (beside * width) * beside + at % beside);
}

// The column of O that begins a quad of S while O is there, in a round; past every column where S has room for more.
fn column_in_s(round: u32, quad: u32) -> u32 {
    let fragment = quad / (EDGE / 4u);
    let own = round * ROUND_FRAGS + fragment % ROUND_FRAGS;
    let d = (fragment / ROUND_FRAGS * OWN_FRAGS + own) * EDGE + quad % (EDGE / 4u) * 4u;
    return select(0xffffffffu, d, own < OWN_FRAGS);
}

const MOST_F16: f32 = 65504.0;

// Whether four numbers are finite, as f16 too. As bits: NaN and infinity lie above.
fn are_within_f16(x: vec4<f32>) -> bool {
    let size = bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu);
    return all(size <= vec4<u32>(bitcast<u32>(MOST_F16)));
}

// What the values of a step that are not finite as f16 add to a quad of a row's O.
fn not_finite(row: u32, b: u32, kv_head: u32, first: u32, len_k: u32, d: u32) -> vec4<f32> {
    var sum = vec4<f32>();
    for (var key = 0u; key < TILE_KV && first + key < len_k; key += 1u) {
        let v = load4_v(row_v(b, kv_head, first + key), d);
        let p = f32(get_p(row * P_STRIDE + key / 4u)[key % 4u]);
        if !are_within_f16(v) && !is_dropped_weight(p) {
            sum += p * v;
        }
    }
    return sum;
}
