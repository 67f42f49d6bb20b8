// The online softmax's bookkeeping (Milakov & Gimelshein 2018), in natural logarithms.

// O and l are rescaled only when the maximum rises by more than this: exp(5.5) is no danger to a sum
// in f32, and most steps then rescale nothing (FlashAttention 4).
const LAZY: f32 = 5.5;

// exp(from - to) for maxima from < to, and 0 where no key was seen before.
fn shrinking(from_max: f32, to_max: f32) -> f32 {
    return select(exp2((from_max - to_max) * LOG2_E), 0.0, from_max == DROPPED);
}

// What a finished row's sums are multiplied by, once its sink (the logit that joins the denominator
// alone) has been added. Stores lse if `stores`. `row` is the chunk's.
fn close_row(index: u32, h: u32, m: f32, l: f32, stores: bool) -> f32 {
    let row_max = max(m, sink(h));
    let shrink = shrinking(m, row_max);
    let row_sum = l * shrink + sink_weight(h, row_max);
    // A row without a key (and without a sink) has a sum of zero, whatever its factor.
    let empty = row_sum == 0.0;
    if stores {
        // Some software adapters lose a NaN in log2.
        let lse = select(row_max + log2(row_sum) * LN_2, row_sum, is_nan(row_sum));
        let b = batch_head(index / params.row_count).x;
        let i = params.row_first + index % params.row_count;
        store_lse(lse_at(b, h, i), select(bitcast<u32>(lse), neg_inf_bits(), empty));
    }
    return select(shrink / row_sum, 0.0, empty);
}

// Where a band of rows begins whose number among an owner's is `band`. Under a causal mask the last rows, which
// see the most keys, come first: what is left at the end, when some of a device has nothing more to do, is short.
fn band_row(band: u32, bands: u32, rows: u32) -> u32 {
    return select(band, bands - 1u - band, params.causal != 0u) * rows;
}
