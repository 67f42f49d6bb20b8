// The gradients of kernel/backward_tile.wgsl for adapters on a CPU: a thread owns one row (of queries, or of keys:
// shaders/backward/own_*.wgsl), which it holds with its sums, each under a name of its own (src/unroll.rs), and steps
// over OTHERS others at a time, whose rows lie at the same address for all threads. No workgroup memory, no barriers.

fn is_finite_sum(x: vec4<f32>) -> bool {
    return is_finite((x.x + x.y) + (x.z + x.w));
}

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let tiles = div_ceil(params.row_count, LANES);
    let tile = linear_group(group, groups);
    if tile >= tiles * params.head_count {
        return;
    }
    let owner = owner_of(tile / tiles);
    let b = owner.x;
    let len_k = key_length(b);
    let row = params.row_first + tile % tiles * LANES;
    let row_end = min(row + LANES, params.row_first + params.row_count);
    let met = met_by(b, row, row_end, len_k);
    // Rows past the end repeat the last one, and are not stored.
    let own = min(row + lane, row_end - 1u);
    //$ for i in 0..OUT_QUADS
    var acc_$i = vec4<f32>();
    //$ end

    if met.x < met.y {
        let exists = own_that_exists(b, own, len_k);
        // Those that this row meets: a part of what the workgroup does.
        let mine = met_by(b, own, own + 1u, len_k);
        let at_a = own_a(b, owner.y, exists);
        //$ for i in 0..A_QUADS
        let a_$i = load_own_a(at_a, 4u * $iu);
        //$ end
        //$ for n in 0..OF_SCORES
        let at_b = own_b(b, owner.y, exists);
        //$ for i in 0..B_QUADS
        let b_$i = load_own_b(at_b, 4u * $iu);
        //$ end
        //$ end
        for (var meeting = 0u; meeting < met_heads(); meeting += 1u) {
            let head = owner.y + meeting;
            let part = part_of(meeting, met);
            let own_term = own_terms(b, head, exists);
            var first = part.x;
            while first < part.y {
                // Sums of NEAR others join the row's: rounding errors grow with the terms of a chain.
                let end = min(first + NEAR, part.y);
                //$ for i in 0..OUT_QUADS
                var near_$i = vec4<f32>();
                //$ end
                for (; first < end; first += OTHERS) {
                    //$ for o in 0..OTHERS
                    // The last one again where there is no other.
                    let other_$o = min(first + $ou, part.y - 1u);
                    let kept_$o = first + $ou < part.y && other_$o >= mine.x && other_$o < mine.y;
                    let row_a_$o = other_row_a(b, head, other_$o);
                    let row_b_$o = other_row_b(b, head, other_$o);
                    var sum_a_$o = vec4<f32>();
                    var sum_b_$o = vec4<f32>();
                    var all_$o = vec4<f32>();
                    //$ end
                    //$ for i in 0..A_QUADS
                    //$ for o in 0..OTHERS
                    let xa_$o_$i = load_other_a(row_a_$o, 4u * $iu);
                    sum_a_$o = fma(a_$i, xa_$o_$i, sum_a_$o);
                    //$ for n in 0..OF_SCORES
                    all_$o += xa_$o_$i;
                    //$ end
                    //$ end
                    //$ end
                    //$ for i in 0..B_QUADS
                    //$ for o in 0..OTHERS
                    let xb_$o_$i = load_other_b(row_b_$o, 4u * $iu);
                    //$ for n in 0..OF_SCORES
                    sum_b_$o = fma(b_$i, xb_$o_$i, sum_b_$o);
                    //$ end
                    //$ for n in OF_SCORES..1
                    all_$o += xb_$o_$i;
                    //$ end
                    //$ end
                    //$ end
                    //$ for o in 0..OTHERS
                    let dot_$o = (sum_a_$o.x + sum_a_$o.y) + (sum_a_$o.z + sum_a_$o.w);
                    var weight_$o = 0.0;
                    if kept_$o {
                        let pair = pair_of(own, other_$o);
                        let s = finish_kept(dot_$o, b, head, pair.x, pair.y, len_k, TILE_MIXED);
                        // As bits: a NaN is no number that differs, on some adapters.
                        if bitcast<u32>(s) != bitcast<u32>(DROPPED) {
                            let terms = terms_of(b, head, own_term, other_$o);
                            weight_$o = exp_of_one((s - terms.x) * LOG2_E);
                            //$ for n in 0..OF_SCORES
                            let dp = (sum_b_$o.x + sum_b_$o.y) + (sum_b_$o.z + sum_b_$o.w);
                            weight_$o *= (dp - terms.y) * slope_of(dot_$o);
                            //$ end
                        }
                    }
                    // A weight of zero adds nothing, whatever lies there: 0 * NaN is NaN.
                    if is_finite_sum(all_$o) {
                        //$ for i in 0..OUT_QUADS
                        near_$i = fma(vec4<f32>(weight_$o), X_$o_$i, near_$i);
                        //$ end
                    } else if (bitcast<u32>(weight_$o) << 1u) != 0u {
                        //$ for i in 0..OUT_QUADS
                        near_$i = fma(vec4<f32>(weight_$o), X_$o_$i, near_$i);
                        //$ end
                    }
                    //$ end
                }
                //$ for i in 0..OUT_QUADS
                acc_$i += near_$i;
                //$ end
            }
        }
    }

    let at = row + lane;
    if at < row_end && is_stored(b, at, len_k) {
        let head = head_of_gradient(owner.y);
        let factor = select(1.0, params.scale, OF_SCORES == 1u);
        //$ for i in 0..OUT_QUADS
        end_quad((tile * LANES + lane) * OUT_QUADS + $iu, b, head, at, $iu, acc_$i, factor);
        //$ end
    }
}
