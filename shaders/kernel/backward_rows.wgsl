// What the gradients' kernels need of each query (FlashAttention 2, Dao 2023, algorithm 2, line 4), and every list,
// in one buffer: a device that binds eight has room for every option beside it.
//
//   delta = sum of dO o O over head_dim_v     so that dS = P o (dP - delta)
//
// lse stands beside it. (A query that has kept no key has one of -inf, and no pair that would look at it.) A thread owns
// one query, and one word of the lists. No workgroup memory, no barriers.

@group(0) @binding(BINDING) var<storage, read_write> gathered: array<u32>;

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) count: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = linear_group(id, count);
    // Folding adds workgroups, whose threads' numbers might not fit a u32.
    let rows = params.head_count * params.row_count;
    if group > (max(rows, terms_first()) - 1u) / LANES {
        return;
    }
    let index = group * LANES + lane;
    let heads = params.heads_q;
    let entries = params.batch;
    if index < heads {
        gathered[index] = read_alibi_slopes(index);
    } else if index >= 2u * heads && index < 2u * heads + entries {
        gathered[index] = read_kv_lens(index - 2u * heads);
    } else if index >= 2u * heads + entries && index < 2u * heads + 2u * entries + 1u {
        gathered[index] = read_cu_seqlens_q(index - 2u * heads - entries);
    } else if index >= 2u * heads + 2u * entries + 1u && index < 2u * heads + 3u * entries + 2u {
        gathered[index] = read_cu_seqlens_k(index - 2u * heads - 2u * entries - 1u);
    }
    // Ragged queries are rows of one entry here.
    if index >= rows {
        return;
    }
    let head = index / params.row_count;
    let row = vec3<u32>(head / heads, head % heads, index % params.row_count);
    let o = row_o(row.x, row.y, row.z);
    let dout = row_dout(row.x, row.y, row.z);
    var delta = 0.0;
    for (var d = 0u; d < params.head_dim_v; d += 4u) {
        delta += dot(load4_o(o, d), load4_dout(dout, d));
    }
    let at = terms_first() + 2u * index;
    gathered[at] = read_lse(index);
    gathered[at + 1u] = bitcast<u32>(delta);
}
