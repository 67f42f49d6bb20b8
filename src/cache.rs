//! Where keys and values lie: [`Cache`], and the twin of the shaders' `row_k` and `row_v`.

use crate::error::Operand;
use crate::host::Inputs;
use crate::layout::Layout;
use crate::problem::AttentionProblem;

/// How k and v keep the keys of the batch entries. The layouts [`AttentionProblem::k`] and
/// [`AttentionProblem::v`] are those of the shapes given here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Cache {
    /// `[batch, heads_kv, seq_kv, dim]`: key `j` of an entry is its row `j`. `seq_kv` is the capacity.
    #[default]
    Contiguous,
    /// `[batch, heads_kv, capacity, dim]`: key `j` of an entry is its row `j % capacity`. Of a sequence of
    /// any length the last `capacity` keys are there, which a window must not reach beyond.
    Ring {
        /// Rows of each entry.
        capacity: usize,
    },
    /// `[pages, heads_kv, page_size, dim]`: key `j` of an entry is row `j % page_size` of page
    /// `block_table[entry][j / page_size]` (PagedAttention, Kwon 2023). Entries may share pages.
    Paged {
        /// Pages of the pool.
        pages: usize,
        /// Keys of a page.
        page_size: usize,
        /// Entries of a row of the block table, `[batch, max_blocks]`.
        max_blocks: usize,
    },
    /// `[1, heads_kv, total, dim]`: the keys of one entry after those of another, entry `b` from row
    /// `cu_seqlens_k[b]` to `cu_seqlens_k[b + 1]`. `seq_kv` is the length of the longest.
    Ragged {
        /// Rows of all entries.
        total: usize,
    },
}

impl Cache {
    /// Sizes of the dimensions of k and v but the innermost.
    pub(crate) fn dims(self, problem: &AttentionProblem) -> [usize; 3] {
        let heads = problem.heads_kv;
        match self {
            Self::Contiguous => [problem.batch, heads, problem.seq_kv],
            Self::Ring { capacity } => [problem.batch, heads, capacity],
            Self::Paged { pages, page_size, .. } => [pages, heads, page_size],
            Self::Ragged { total } => [1, heads, total],
        }
    }
}

impl std::fmt::Display for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Contiguous => f.write_str("contiguous"),
            Self::Ring { capacity } => write!(f, "a ring of {capacity} rows"),
            Self::Paged { pages, page_size, .. } => write!(f, "{pages} pages of {page_size} rows"),
            Self::Ragged { total } => write!(f, "ragged, {total} rows in all"),
        }
    }
}

/// Finds the rows of k or v in a slice.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KvRows<'a> {
    layout: Layout,
    cache: Cache,
    block_table: &'a [u32],
    cu_seqlens_k: &'a [u32],
}

impl<'a> KvRows<'a> {
    /// Of `operand`, k or v, in inputs that have been checked.
    pub(crate) fn new(problem: &AttentionProblem, inputs: &Inputs<'a>, operand: Operand) -> Self {
        Self {
            layout: if operand == Operand::K { problem.k } else { problem.v },
            cache: problem.cache,
            block_table: inputs.block_table.unwrap_or_default(),
            cu_seqlens_k: inputs.cu_seqlens_k.unwrap_or_default(),
        }
    }

    /// Index of the first element of key `j`, below the entry's length.
    #[inline]
    pub(crate) fn index(&self, [batch, head, j]: [usize; 3]) -> usize {
        let [entry, row] = match self.cache {
            Cache::Contiguous => [batch, j],
            Cache::Ring { capacity } => [batch, j % capacity],
            Cache::Paged { page_size, max_blocks, .. } => {
                [self.block_table[batch * max_blocks + j / page_size] as usize, j % page_size]
            }
            Cache::Ragged { .. } => [0, self.cu_seqlens_k[batch] as usize + j],
        };
        self.layout.index([entry, head, row, 0])
    }

    /// Elements from one row to the next, if all of an entry's are so far apart.
    #[cfg(all(feature = "cpu", not(target_arch = "wasm32")))]
    pub(crate) fn stride(&self) -> Option<usize> {
        matches!(self.cache, Cache::Contiguous | Cache::Ragged { .. }).then_some(self.layout.strides[2])
    }

    /// Elements from one of a row's to the next.
    pub(crate) fn step(&self) -> usize {
        self.layout.strides[3]
    }
}
