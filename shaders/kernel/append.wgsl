// New rows into their places: of k and v into a cache, in its element type; or queries, rotated. A dispatch
// moves one tensor: in its uniform block q is where the rows come from, k where they go, head_dim their width.
//
// Where row t of an entry stands is a part's matter (io/positions_*.wgsl). A row without a place is left out, and
// reported.
//
// A workgroup moves one row. Its threads load elements by turns, normalised and turned where that is asked
// for (in this order), into workgroup memory (4 WIDTH bytes), and after a barrier each stores some quads or words of the whole.
// So a row may be turned where it lies: no other workgroup uses what it reads of it.

var<workgroup> wg_row: array<f32, WIDTH>;

// Element `d` of the row that begins at `at`, turned with its partner by the position's angle (Su 2021).
fn turned(at: u32, d: u32, position: u32, factor: f32) -> f32 {
    let x = element(at, d, factor);
    if d >= ROPE {
        return x;
    }
    // Neighbours are a pair, or elements half the width apart.
    let half = ROPE / 2u;
    let step = select(half, 1u, INTERLEAVED);
    let second = select(d >= half, (d & 1u) == 1u, INTERLEAVED);
    let first = select(d, d - step, second);
    let turn = angle(position, select(first, first / 2u, INTERLEAVED));
    let other = element(at, select(d + step, first, second), factor);
    return x * turn.x + select(-other, other, second) * turn.y;
}

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let rows = params.batch * params.heads_q * params.seq_q;
    let index = linear_group(group, groups);
    // The surplus of a folded dispatch looks at the last row again, and stores nothing.
    let own = min(index, rows - 1u);
    let t = own % params.seq_q;
    let h = own / params.seq_q % params.heads_q;
    let b = own / params.seq_q / params.heads_q;
    let count = query_count(b);
    let position = position_of(b, t, count);
    let at = row_q(b, h, t);
    let factor = norm_factor(at, lane);
    for (var d = lane; d < WIDTH; d += LANES) {
        wg_row[d] = turned(at, d, min(position, params.seq_kv - 1u), factor);
    }
    workgroupBarrier();
    if index < rows && t < count {
        if has_place(b, count, position) {
            store_row(place_of(b, h, t, position), lane);
        } else if lane == 0u {
            report(STATUS_FULL);
        }
    }
}
