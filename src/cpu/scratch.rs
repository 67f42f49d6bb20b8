//! Memory that a thread keeps from tile to tile.

/// f32 storage that starts at a cache line, so that no vector straddles two.
#[derive(Default)]
pub(super) struct Aligned {
    data: Vec<f32>,
}

impl Aligned {
    /// `len` elements; what they hold is left over from earlier use.
    pub(super) fn get(&mut self, len: usize) -> &mut [f32] {
        const LINE: usize = 16;
        if self.data.len() < len + LINE {
            self.data.resize(len + LINE, 0.0);
        }
        // align_offset may decline (its answer is then huge); alignment is only for speed.
        let skip = self.data.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
        &mut self.data[skip..skip + len]
    }
}

/// Every buffer that computing a tile needs.
#[derive(Default)]
pub(super) struct Scratch {
    /// q transposed: `[head_dim][lanes]`; what it is made into, where that is compared.
    pub(super) q: Aligned,
    /// q transposed before it is multiplied by a matrix: `[query_dim][lanes]`.
    pub(super) q_raw: Aligned,
    /// Scores, then their exponentials: `[tile_kv][lanes]`.
    pub(super) scores: Aligned,
    /// What is added to scores: `[tile_kv][lanes]`.
    pub(super) extra: Aligned,
    /// Sums of the last few key blocks: `[head_dim_v][lanes]`, then row_sum's `[lanes]`.
    pub(super) acc: Aligned,
    /// Sums of all key blocks before those, in the same order.
    pub(super) far: Aligned,
    /// What rounding took from the far sums.
    pub(super) lost: Aligned,
    pub(super) k: Vec<f32>,
    pub(super) v: Vec<f32>,
    /// q as it multiplies k, by rows: `[lanes][head_dim]`.
    pub(super) q_rows: Vec<f32>,
    /// One over the norms of a block's keys.
    pub(super) inverse_norms: Vec<f32>,
    /// A block's keys, projected: `[keys][hidden]`.
    pub(super) projected: Vec<f32>,
    /// q's rows as they are stored: `[lanes][query_dim]`.
    pub(super) rows: Vec<f32>,
}
