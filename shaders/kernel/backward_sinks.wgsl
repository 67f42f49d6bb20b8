// The gradient of the sinks. A sink takes exp(sink - lse) of each query's weight in its head, and has no value of its own,
// so that o shrinks by that share:
//
//   dsink = - sum over queries of exp(sink - lse) delta
//
// A workgroup owns a head: each thread sums every THREADS-th query, and halves of the threads give theirs to the others.

@group(0) @binding(SINKS) var<storage, read> sinks: array<f32>;
@group(0) @binding(GRAD) var<storage, read_write> grad: array<f32>;

var<workgroup> wg_sums: array<f32, THREADS>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let head = linear_group(group, groups);
    if head >= params.heads_q {
        return;
    }
    let sink = sinks[head];
    var sum = 0.0;
    // One of -inf is none.
    if bitcast<u32>(sink) != neg_inf_bits() {
        for (var b = 0u; b < params.batch; b += 1u) {
            for (var i = thread; i < query_count(b); i += THREADS) {
                let terms = row_terms(b, head, i);
                sum -= exp_of_one((sink - terms.x) * LOG2_E) * terms.y;
            }
        }
    }
    wg_sums[thread] = sum;
    for (var others = THREADS / 2u; others > 0u; others /= 2u) {
        workgroupBarrier();
        if thread < others {
            wg_sums[thread] += wg_sums[thread + others];
        }
    }
    if thread == 0u {
        grad[head] = wg_sums[0];
    }
}
