// Fused attention by rows (online softmax, Milakov & Gimelshein 2018; lazy rescaling, FlashAttention 4),
// for adapters that run on a CPU. With m the running maximum and l the running sum, KEYS keys a step:
//
//   s = finish(q k)   m' = max(m, s) if that rises by more than LAZY, else m
//   p = exp(s - m')   l' = l exp(m - m') + sum p   o' = o exp(m - m') + sum p v
//
// A thread owns ROWS query rows and all that belongs to them: q, o, m and l live in variables of their
// own, hence the unrolled text (src/unroll.rs). K and V are read at workgroup-uniform addresses, which
// such an adapter turns into broadcasts: nothing is gathered, scattered or exchanged in the loop, and
// there is no workgroup memory. Sums run in two levels: each step's is added to that of LEVEL keys (src/fused.rs), and
// this one to the total, so that the rounding error of a long row hardly grows with it (a dispatch takes 4096 keys).
//
// A step begins with the exponentials of scores that the step before has computed, computes the next
// ones, and comes to the values last: both chains of dependent instructions, through a row's score and
// through its exponential, have a product's worth of others beside them. (1.1 times as fast.)
//
// A load whose address differs from lane to lane is, on a processor without fast gathers, a branch for each
// lane and number: they were most of the text there. So q is loaded in a loop, where four quads at a time have
// their turn by `select` (its bound is the problem's, since a constant one is unrolled again; more quads a turn
// are more text, fewer are more selects), o is stored in one the same way, and in the second look all lanes go over the
// same keys.
//
// Variables lie in memory there, too, and a block of text with many loads and many stores takes LLVM's scheduler their
// product: half of the time that this kernel takes to compile. So the values' sums begin a block of their own, after
// all of q has been loaded, and so does each row's where a maximum rises or a level ends; and no thread returns before
// the loops, since variables are stored under a mask then, which is a load more for each. (Two blocks for the values of
// wide heads would compile faster by a tenth, and run slower by a quarter.)

// What a step takes there, by its machine code (lavapipe 26.1, 256 bits, a Xeon with AVX-512; D 64, four rows and
// keys): of 8,900 instructions 4,200 multiply or add (the driver has no fused ones), 300 keep O under the loop's mask,
// three operations each on that processor, and 2,300 check bounds, four for each number of K and V. They take 2,500
// cycles where its three vector units have work for 1,800. The text is what limits rows and keys: this processor reads
// 30 bytes of it a cycle out of its instruction cache, 64 KiB, and 13 where it is longer, so that eight rows of four
// keys take half as long again.

// Where the last quad of q begins.
const LAST = 4u * QUADS - 4u;

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    // Orders nothing. With a barrier, lavapipe's compiler makes the shader a coroutine, and its bounds
    // checks conditional moves beside the arithmetic instead of branches before it: 1.6 times as fast.
    workgroupBarrier();
    let tiles_q = div_ceil(owned_rows(), LANES * ROWS);
    let tile_split = tile_of(linear_group(group, groups), tiles_q * owners());
    // A workgroup that there is nothing for goes over no keys and stores nothing.
    let surplus = tile_split.x >= tiles_q * owners();
    let tile = min(tile_split.x, tiles_q * owners() - 1u);
    let split = tile_split.y;
    let owner = tile / tiles_q;
    let first_row = tile % tiles_q * LANES * ROWS;
    let queries = queries_of(first_row, min(first_row + LANES * ROWS, owned_rows()));
    let bh = batch_head(head_of(owner, 0u));
    let kv_head = bh.y / params.group_size;
    let len_k = key_length(bh.x);
    let seen_by_any = tile_kv_range(bh.x, queries.x, queries.y, len_k);
    let part = part_of(seen_by_any, split);
    let seen = own_part(seen_by_any, part);
    let seen_by_all = own_part(tile_full_range(bh.x, queries.x, queries.y, len_k), part);
    let k_begin = begin_k(bh.x, kv_head);
    let v_begin = begin_v(bh.x, kv_head);

    // False and zero, which no compiler can know. Exponentials lose a NaN on some adapters, so a score that
    // is not finite makes the sum NaN by nought, and the second look does the rest.
    let never = (params.row_count >> 31u) != 0u;
    let nought = f32(never);

    // Rows past the end repeat the last one, and are not stored.
    //$ for r in 0..ROWS
    let own_$r = min(first_row + $ru * LANES + lane, owned_rows() - 1u);
    let head_$r = head_of(owner, own_$r);
    let row_$r = row_of(own_$r);
    let query_$r = query_row(head_$r, row_$r);
    let start_$r = start_of(head_$r * params.row_count + row_$r);
    //$ for i in 0..QUADS
    var q_$r_$i = vec4<f32>();
    //$ end
    for (var turn = 0u; turn < div_ceil(params.head_dim, 16u); turn += 1u) {
        let d = 16u * turn;
        // Past the last quad that one again, which is not taken: behind it the buffer may end.
        let four = array<vec4<f32>, 4>(
            load4_q(query_$r, d),
            load4_q(query_$r, min(d + 4u, LAST)),
            load4_q(query_$r, min(d + 8u, LAST)),
            load4_q(query_$r, min(d + 12u, LAST)),
        );
        //$ for i in 0..QUADS
        q_$r_$i = select(q_$r_$i, four[$iu % 4u], turn == $iu / 4u);
        //$ end
    }
    //$ for i in 0..QUADS_V
    var total_$r_$i = vec4<f32>();
    //$ end
    var m_$r = start_$r.x;
    // What exponents are taken from: 0 where no key was seen, and every exponential is 0 there.
    var base_$r = select(m_$r, 0.0, m_$r == DROPPED);
    var l_$r = 0.0;
    //$ end

    //$ for r in 0..ROWS
    //$ for c in 0..KEYS
    var s_$r_$c = 0.0;
    //$ end
    //$ end
    // Whole steps, so that none reaches from one tile of the mask into the next; and one step more than there are, since
    // one computes scores for the next.
    let begin = seen.x / KEYS * KEYS;
    let end = select(begin, seen.y + KEYS, seen.x < seen.y && !surplus);
    for (var level = begin; level < end; level += LEVEL) {
        //$ for r in 0..ROWS
        //$ for i in 0..QUADS_V
        var o_$r_$i = vec4<f32>();
        //$ end
        var sum_$r = 0.0;
        var shrink_$r = 1.0;
        //$ end
        // One loop, or two where the mask is mapped: from one of its tiles to the next. (What is repeated
        // once or never is an option; a loop more costs a tenth.)
        //$ for once in MAPPED..1
        let first = begin;
        let masked = TILE_MIXED;
        for (var next = level; next < min(level + LEVEL, end); next += KEYS) {
        //$ end
        //$ for once in 0..MAPPED
        let level_end = min(level + LEVEL, seen.y);
        for (var first = level; first < level_end; first = mask_tile_end(first, level_end)) {
            let masked = mask_tile(bh.x, bh.y, queries.x, first);
            if masked == TILE_DROPPED {
                continue;
            }
        for (var next = first; next < mask_tile_end(first, level_end) + KEYS; next += KEYS) {
        //$ end
            // The keys of this step. None in the first.
            let j = next - KEYS;
            //$ for c in 0..KEYS
            let j_$c = min(j + $cu, len_k - 1u);
            let v_$c = quads_of_v(v_begin, bh.x, j, $cu, len_k);
            let k_$c = quads_of_k(k_begin, bh.x, next, $cu, len_k);
            //$ end
            //$ for r in 0..ROWS
            //$ for c in 0..KEYS
            //$ for once in PLAIN..1
            s_$r_$c = finish_kept(s_$r_$c, bh.x, batch_head(head_$r).y, params.row_first + row_$r, j_$c, len_k, masked);
            //$ end
            //$ for once in 0..PLAIN
            // The same but for a score below every number, which the second look minds.
            s_$r_$c *= params.scale;
            //$ end
            //$ end
            //$ end
            if next == first || j < seen_by_all.x || next > seen_by_all.y {
                //$ for r in 0..ROWS
                let range_$r = own_part(kv_range(bh.x, params.row_first + row_$r, len_k), part);
                //$ for c in 0..KEYS
                if next == first || j + $cu < range_$r.x || j + $cu >= range_$r.y {
                    s_$r_$c = DROPPED;
                }
                //$ end
                //$ end
            }
            var rises = false;
            //$ for r in 0..ROWS
            var peak_$r = s_$r_0;
            //$ for c in 1..KEYS
            peak_$r = max(peak_$r, s_$r_$c);
            //$ end
            rises = rises || peak_$r > m_$r + LAZY;
            //$ end
            if rises {
                //$ for r in 0..ROWS
                // By the row's own scores, so that its bits do not depend on the rows beside it.
                let m_new_$r = select(m_$r, peak_$r, peak_$r > m_$r + LAZY);
                let by_$r = shrinking(m_$r, m_new_$r);
                m_$r = m_new_$r;
                base_$r = select(m_$r, 0.0, m_$r == DROPPED);
                if by_$r != 1.0 {
                    sum_$r *= by_$r;
                    shrink_$r *= by_$r;
                    //$ for i in 0..QUADS_V
                    o_$r_$i *= by_$r;
                    //$ end
                }
                //$ end
            }
            //$ for r in 0..ROWS
            //$ for c in 0..KEYS
            let p_$r_$c = exp2((s_$r_$c - base_$r) * LOG2_E);
            sum_$r += p_$r_$c + s_$r_$c * nought;
            s_$r_$c = 0.0;
            //$ end
            //$ end
            // SIDE keys at a time: as many as a processor's vector registers have room for the sums of.
            //$ for side in 0..SIDES
            //$ for i in 0..QUADS
            {
                //$ for c in SIDE*$side..SIDE*$side+SIDE
                let k4_$c = quad_k(k_$c, $iu);
                //$ end
                //$ for c in SIDE*$side..SIDE*$side+SIDE
                //$ for r in 0..ROWS
                s_$r_$c += q_$r_$i.x * k4_$c.x;
                //$ end
                //$ end
                //$ for c in SIDE*$side..SIDE*$side+SIDE
                //$ for r in 0..ROWS
                s_$r_$c += q_$r_$i.y * k4_$c.y;
                //$ end
                //$ end
                //$ for c in SIDE*$side..SIDE*$side+SIDE
                //$ for r in 0..ROWS
                s_$r_$c += q_$r_$i.z * k4_$c.z;
                //$ end
                //$ end
                //$ for c in SIDE*$side..SIDE*$side+SIDE
                //$ for r in 0..ROWS
                s_$r_$c += q_$r_$i.w * k4_$c.w;
                //$ end
                //$ end
            }
            //$ end
            //$ end
            // Here a block of text ends.
            if never {
                // With a loop inside, this one is not innermost. In innermost loops LLVM makes branches of the
                // conditional moves of bounds checks, if its model of the processor says so: all loads of q and
                // k then come before the sums, by way of the stack. (1.2 to 2 times as fast where that was so.)
                for (var i = 0u; i < params.row_count; i += 1u) {
                    m_0 += s_0_0;
                }
            }
            //$ for i in 0..QUADS_V
            {
                //$ for c in 0..KEYS
                let v4_$c = quad_v(v_$c, $iu);
                //$ end
                //$ for r in 0..ROWS
                {
                    var part = p_$r_0 * v4_0;
                    //$ for c in 1..KEYS
                    part += p_$r_$c * v4_$c;
                    //$ end
                    o_$r_$i += part;
                }
                //$ end
            }
            //$ end
        }
        //$ for once in 0..MAPPED
        }
        //$ end
        //$ for r in 0..ROWS
        l_$r = l_$r * shrink_$r + sum_$r;
        // Without a key, it has no values.
        if m_$r != DROPPED {
            //$ for i in 0..QUADS_V
            total_$r_$i = total_$r_$i * shrink_$r + o_$r_$i;
            //$ end
        }
        //$ end
    }

    // Once a row, so its text is written once: drivers take their time over long texts.
    for (var r = 0u; r < ROWS; r += 1u) {
        let own = first_row + r * LANES + lane;
        if own >= owned_rows() || surplus {
            break;
        }
        let head = head_of(owner, own);
        let row = row_of(own);
        if !is_query(bh.x, params.row_first + row) {
            continue;
        }
        let h = batch_head(head).y;
        var start = start_0;
        var m = m_0;
        var l = l_0;
        //$ for i in 0..QUADS_V
        var total_$i = total_0_$i;
        //$ end
        //$ for r in 1..ROWS
        if r == $ru {
            start = start_$r;
            m = m_$r;
            l = l_$r;
            //$ for i in 0..QUADS_V
            total_$i = total_$r_$i;
            //$ end
        }
        //$ end
        // A score was not finite, perhaps only too low for an f32: the second look sums l anew, too.
        let sums = is_nan(l);
        var finite = true;
        // (No &&, which is a branch: SwiftShader tries each way through so many.)
        //$ for i in 0..QUADS_V
        finite &= is_finite4(total_$i);
        //$ end
        if !finite || sums {
            // A second look: 0 * NaN is NaN, so a NaN or an infinity in a value whose key is dropped must
            // be stepped over, while one whose key is kept must spread.
            // (Unrolled, since lavapipe counts a thread's iterations, nested ones too, up to 65535.)
            //$ for i in 0..QUADS_V
            var sum_$i = vec4<f32>();
            //$ end
            var weight = 0.0;
            //$ for i in 0..QUADS
            var q_$i = q_0_$i;
            //$ end
            //$ for r in 1..ROWS
            if r == $ru {
                //$ for i in 0..QUADS
                q_$i = q_$r_$i;
                //$ end
            }
            //$ end
            let range = own_part(kv_range(bh.x, params.row_first + row, len_k), part);
            for (var j = seen.x; j < seen.y; j += 1u) {
                let k = row_k(bh.x, kv_head, j);
                var s = 0.0;
                //$ for i in 0..QUADS
                s += dot(q_$i, load4_k(k, 4u * $iu));
                //$ end
                s = finish_kept(s, bh.x, h, params.row_first + row, j, len_k, TILE_MIXED);
                let kept = bitcast<u32>(s) != bitcast<u32>(DROPPED);
                if kept && j >= range.x && j < range.y {
                    m = max(m, LOWEST_KEPT);
                    let p = exp_of_one((s - m) * LOG2_E);
                    weight += p;
                    let v = row_v(bh.x, kv_head, j);
                    //$ for i in 0..QUADS_V
                    sum_$i += p * load4_v(v, 4u * $iu);
                    //$ end
                }
            }
            l = select(l, weight, sums);
            //$ for i in 0..QUADS_V
            total_$i = sum_$i;
            //$ end
        }
        let index = head * params.row_count + row;
        let end = end_of(index, h, start, m, l, true, split);
        let at = row_o(bh.x, h, params.row_first + row);
        for (var turn = 0u; turn < div_ceil(params.head_dim_v, 16u); turn += 1u) {
            var four: array<vec4<f32>, 4>;
            //$ for i in 0..QUADS_V
            four[$iu % 4u] = select(four[$iu % 4u], total_$i, turn == $iu / 4u);
            //$ end
            for (var i = 0u; i < 4u; i += 1u) {
                if 4u * turn + i < QUADS_V {
                    end_quad(index, at, 16u * turn + 4u * i, four[i], end, split);
                }
            }
        }
    }
}
