// The gradient of the bias: that of the scores, since the bias is a term of theirs, summed over the entries and heads
// that it repeats over. With the symbols of kernel/backward_tile.wgsl:
//
//   dbias = sum of P o (dP - delta)
//
// A workgroup of SIDE x SIDE threads owns TILE x TILE pairs of queries and keys, TILE = 4 SIDE, and meets one entry's head
// after the other. A thread owns the queries y + SIDE r and the keys x + SIDE c (r, c < 4): each sum has one owner. Rows
// meet in workgroup memory, SLICE quads at a time (skewed by one, so that they begin in different banks); two barriers for
// each staging.

const THREADS = SIDE * SIDE;
const TILE = 4u * SIDE;
const SKEW = SLICE + 1u;

var<workgroup> wg_own: array<vec4<f32>, TILE * SKEW>;
var<workgroup> wg_other: array<vec4<f32>, TILE * SKEW>;

// Stages SLICE quads, from `begin` on, of queries from `row` on, the last one again past it, and of keys from `key` to
// `end`.
fn stage(thread: u32, b: u32, head: u32, row: u32, last: u32, key: u32, end: u32, begin: u32, is_a: bool) {
    for (var at = thread; at < TILE * SLICE; at += THREADS) {
        let line = at / SLICE;
        let d = 4u * (begin + at % SLICE);
        let i = min(row + line, last);
        let j = key + line;
        var own = vec4<f32>();
        var other = vec4<f32>();
        if d < select(params.head_dim_v, params.head_dim, is_a) {
            if is_a {
                own = load_own_a(own_a(b, head, i), d);
            } else {
                own = load_own_b(own_b(b, head, i), d);
            }
            if j < end && is_a {
                other = load_other_a(other_row_a(b, head, j), d);
            } else if j < end {
                other = load_other_b(other_row_b(b, head, j), d);
            }
        }
        wg_own[line * SKEW + at % SLICE] = own;
        wg_other[line * SKEW + at % SLICE] = other;
    }
}

// The products, over one width, of the thread's queries with its keys: a vector a query. Whole workgroups come here.
fn products(
    thread: u32, b: u32, head: u32, row: u32, last: u32, key: u32, end: u32, is_a: bool,
) -> array<vec4<f32>, 4> {
    let width = select(params.head_dim_v, params.head_dim, is_a);
    let x = thread % SIDE;
    let y = thread / SIDE;
    var sums = array<vec4<f32>, 4>();
    for (var begin = 0u; 4u * begin < width; begin += SLICE) {
        workgroupBarrier();
        stage(thread, b, head, row, last, key, end, begin, is_a);
        workgroupBarrier();
        for (var e = 0u; e < SLICE; e += 1u) {
            let k0 = wg_other[x * SKEW + e];
            let k1 = wg_other[(x + SIDE) * SKEW + e];
            let k2 = wg_other[(x + 2u * SIDE) * SKEW + e];
            let k3 = wg_other[(x + 3u * SIDE) * SKEW + e];
            for (var r = 0u; r < 4u; r += 1u) {
                let own = wg_own[(y + SIDE * r) * SKEW + e];
                sums[r] = add_dots(sums[r], own, k0, k1, k2, k3);
            }
        }
    }
    return sums;
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let x = thread % SIDE;
    let y = thread / SIDE;
    let tiles = vec2<u32>(div_ceil(params.row_count, TILE), div_ceil(params.seq_kv, TILE));
    let tile = linear_group(group, groups);
    if tile >= tiles.x * tiles.y * params.head_count {
        return;
    }
    let heads = select(params.heads_q, 1u, SUMS_HEADS);
    let owner = params.head_first + tile / (tiles.x * tiles.y);
    let first_entry = owner / heads;
    let first_head = owner % heads;
    let row = params.row_first + tile / tiles.y % tiles.x * TILE;
    let row_end = min(row + TILE, params.row_first + params.row_count);
    let key = tile % tiles.y * TILE;

    var sums = array<vec4<f32>, 4>();
    let met_heads = params.heads_q / heads;
    let meetings = met_heads * select(1u, params.batch, SUMS_ENTRIES);
    for (var meeting = params.key_first; meeting < min(params.key_end, meetings); meeting += 1u) {
        let b = first_entry + meeting / met_heads;
        let head = first_head + meeting % met_heads;
        let len_k = key_length(b);
        let met = tile_kv_range(b, row, row_end, len_k);
        if met.x >= min(met.y, key + TILE) || key >= met.y {
            continue;
        }
        let last = own_that_exists(b, row_end - 1u, len_k);
        var dps = products(thread, b, head, row, last, key, len_k, false);
        var dots = products(thread, b, head, row, last, key, len_k, true);
        for (var r = 0u; r < 4u; r += 1u) {
            let i = row + y + SIDE * r;
            if i >= row_end || !is_query(b, i) {
                continue;
            }
            let terms = own_terms(b, head, i);
            let range = kv_range(b, i, len_k);
            for (var c = 0u; c < 4u; c += 1u) {
                let j = key + x + SIDE * c;
                let s = finish_score(component(dots[r], c), b, head, i, j, range, len_k, TILE_MIXED);
                // As bits: a NaN is no number that differs, on some adapters.
                if bitcast<u32>(s) != bitcast<u32>(DROPPED) {
                    let of_pair = exp_of_one((s - terms.x) * LOG2_E) * (component(dps[r], c) - terms.y);
                    sums[r] = with_component(sums[r], c, component(sums[r], c) + of_pair);
                }
            }
        }
    }

    //$ for n in 0..PARTS
    // As in shaders/backward/part.wgsl.
    let sum_at = (tile * THREADS + thread) * 4u;
    if params.key_first > 0u {
        for (var r = 0u; r < 4u; r += 1u) {
            sums[r] += carried[sum_at + r];
        }
    }
    if params.key_end != 0xffffffffu {
        for (var r = 0u; r < 4u; r += 1u) {
            carried[sum_at + r] = sums[r];
        }
        return;
    }
    //$ end
    for (var r = 0u; r < 4u; r += 1u) {
        let i = row + y + SIDE * r;
        for (var c = 0u; c < 4u; c += 1u) {
            let j = key + x + SIDE * c;
            if i < row_end && j < params.seq_kv {
                store1_grad(row_grad(first_entry, first_head, i) + j * params.grad_stride_d, component(sums[r], c));
            }
        }
    }
}
