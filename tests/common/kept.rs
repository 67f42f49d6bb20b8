//! Cases moved into caches and ragged batches: the same keys, kept in another way, and poison in every row
//! and page that no key is in.

use std::sync::Arc;

use wgpu_attention::{
    Align, AttentionProblem, Cache, Dtype, Layout, Operand, Tensor, quantize, row_elements,
};

use super::case::{Case, indices};
use super::rng::Rng;

/// How keys are kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kept {
    Plain,
    /// As few rows as the window allows, and so many more.
    Ring(usize),
    /// Pages of so many rows.
    Paged(usize),
    Ragged,
}

/// What else is moved.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Move {
    pub kept: Kept,
    /// Storage of k and v.
    pub kv_dtype: Option<Dtype>,
    /// Batch entries have their own numbers of queries.
    pub ragged_q: bool,
    /// Heads before rows, as in `[.., heads, rows, dim]`; else after them.
    pub heads_first: bool,
}

impl Default for Move {
    fn default() -> Self {
        Self { kept: Kept::Plain, kv_dtype: None, ragged_q: false, heads_first: false }
    }
}

impl Move {
    pub fn draw(rng: &mut Rng) -> Self {
        let kept = [Kept::Plain, Kept::Ring(0), Kept::Ring(3), Kept::Paged(1), Kept::Paged(16), Kept::Ragged];
        Self {
            kept: rng.pick(&kept),
            kv_dtype: rng.chance(0.7).then(|| rng.pick(Dtype::ALL)),
            ragged_q: rng.chance(0.5),
            heads_first: rng.chance(0.5),
        }
    }
}

/// Where keys lie now: entry and row of `[entries, heads, rows, dim]`.
type Place = Box<dyn Fn(usize, usize) -> [usize; 2]>;

impl Case {
    /// Valid keys of an entry.
    pub fn len_k(&self, b: usize) -> usize {
        self.data.kv_lens.as_ref().map_or(self.problem.seq_kv, |lens| lens[b] as usize)
    }

    /// The case in a cache. Its k and v are plain.
    pub fn moved(&self, to: Move, seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x6b65_7074);
        let mut case = self.clone();
        case.name = format!("{to:?} of {}", self.name);
        let lens: Vec<usize> = (0..self.problem.batch).map(|b| self.len_k(b)).collect();
        let place = case.keep(to, &lens, &mut rng);
        let p = &mut case.problem;
        p.kv_dtype = to.kv_dtype;
        let stored = p.stored_kv();
        let dims = [p.head_dim, p.head_dim_v];
        let [entries, heads, rows, _] = p.shape(Operand::K);
        [p.k, p.v] = dims.map(|dim| {
            let row = row_elements(stored, dim);
            if to.heads_first { Layout::bhsd(heads, rows, row) } else { Layout::bshd(heads, rows, row) }
        });
        let old = &self.problem;
        for (from, layout, new, dim, into) in [
            (&self.data.k, old.k, p.k, dims[0], &mut case.data.k),
            (&self.data.v, old.v, p.v, dims[1], &mut case.data.v),
        ] {
            let row = row_elements(stored, dim);
            let mut tensor = poisoned(stored, new.extent([entries, heads, rows, row]) as usize + 3);
            for (b, &len) in lens.iter().enumerate() {
                let first =
                    if let Cache::Ring { capacity } = p.cache { len.saturating_sub(capacity) } else { 0 };
                for (h, j) in (0..heads).flat_map(|h| (first..len).map(move |j| (h, j))) {
                    let numbers: Vec<f32> =
                        (0..dim).map(|d| from.as_ref().as_ref().get(layout.index([b, h, j, d]))).collect();
                    let [entry, at] = place(b, j);
                    put(&mut tensor, new.index([entry, h, at, 0]), &quantize(stored, &numbers, dim));
                }
            }
            *into = Arc::new(tensor);
        }
        if to.ragged_q { case.with_ragged_queries(self, &mut rng) } else { case }
    }

    /// The cache, its lists, and where keys go.
    fn keep(&mut self, to: Move, lens: &[usize], rng: &mut Rng) -> Place {
        let p = &mut self.problem;
        match to.kept {
            Kept::Plain => Box::new(|b, j| [b, j]),
            Kept::Ring(more) => {
                let left = p
                    .window
                    .and_then(|window| window.left)
                    .filter(|_| p.positions_align() == Align::BottomRight);
                let need = left.map_or(p.seq_kv, |left| left.saturating_add(p.seq_q)).min(p.seq_kv);
                let capacity = need.max(1) + more;
                p.cache = Cache::Ring { capacity };
                Box::new(move |b, j| [b, j % capacity])
            }
            Kept::Paged(page_size) => {
                let blocks = |len: usize| len.div_ceil(page_size);
                let used: usize = lens.iter().map(|&len| blocks(len)).sum();
                let (pages, max_blocks) = (used + 1 + rng.below(4), blocks(p.seq_kv) + rng.below(3));
                // Any permutation, and no sense in what no key needs.
                let mut free: Vec<u32> = (0..pages as u32).collect();
                let mut table: Vec<u32> =
                    (0..p.batch * max_blocks).map(|_| rng.pick(&[0, 7, u32::MAX, pages as u32])).collect();
                for (b, &len) in lens.iter().enumerate() {
                    for block in 0..blocks(len) {
                        table[b * max_blocks + block] = free.swap_remove(rng.below(free.len()));
                    }
                }
                p.cache = Cache::Paged { pages, page_size, max_blocks };
                self.data.block_table = Some(table.clone());
                Box::new(move |b, j| [table[b * max_blocks + j / page_size] as usize, j % page_size])
            }
            Kept::Ragged => {
                let mut list = vec![0];
                for len in lens {
                    list.push(list[list.len() - 1] + *len as u32);
                }
                p.cache = Cache::Ragged { total: list[lens.len()] as usize };
                p.kv_lens = false;
                self.data.kv_lens = None;
                self.data.cu_seqlens_k = Some(list.clone());
                Box::new(move |b, j| [0, list[b] as usize + j])
            }
        }
    }

    /// The case with fewer queries in some entries, none in others, and no padding between them.
    fn with_ragged_queries(mut self, from: &Self, rng: &mut Rng) -> Self {
        let p = from.problem.clone();
        let counts: Vec<usize> = (0..p.batch)
            .map(|_| {
                let any = rng.below(p.seq_q + 1);
                rng.pick(&[p.seq_q, p.seq_q, 1.min(p.seq_q), 0, any])
            })
            .collect();
        let total = counts.iter().sum();
        self.problem = AttentionProblem { ..self.problem }.with_ragged_queries(total);
        let (layout, shape) = (self.problem.q, self.problem.shape(Operand::Q));
        let mut q = poisoned(p.dtype, layout.extent(shape) as usize + 3);
        let mut list = vec![0];
        for (b, &count) in counts.iter().enumerate() {
            let first = list[b] as usize;
            for [h, i, d, _] in indices([p.heads_q, count, p.query_dim(), 1]) {
                q.set(
                    layout.index([0, h, first + i, d]),
                    from.data.q.as_ref().as_ref().get(p.q.index([b, h, i, d])),
                );
            }
            list.push((first + count) as u32);
        }
        self.data.q = Arc::new(q);
        self.data.cu_seqlens_q = Some(list);
        self
    }

    /// One entry of a case in a cache or a ragged batch, as a plain problem of its own whose keys are those
    /// of `plain`: the same case before it was moved.
    pub fn alone(&self, plain: &Self, b: usize) -> Self {
        let count = self
            .data
            .cu_seqlens_q
            .as_ref()
            .map_or(plain.problem.seq_q, |list| (list[b + 1] - list[b]) as usize);
        let mut case = plain.clone();
        case.name = format!("entry {b} of {}", self.name);
        let p = &mut case.problem;
        (p.batch, p.seq_q) = (1, count);
        p.lse = self.problem.lse;
        for layout in [&mut p.q, &mut p.k, &mut p.v].into_iter().chain(p.mask.iter_mut()) {
            layout.offset += b * layout.strides[0];
        }
        if let Some(bias) = &mut p.bias {
            bias.layout.offset += b * bias.layout.strides[0];
        }
        p.o = Layout::bhsd(p.heads_q, count, p.head_dim_v);
        case.data.kv_lens = case.data.kv_lens.map(|lens| vec![lens[b]]);
        case
    }
}

/// Elements that make a NaN of everything.
fn poisoned(dtype: Dtype, len: usize) -> Tensor {
    match dtype {
        Dtype::Int8 => Tensor::Int8(vec![0x7fc0_7fc0; len]),
        Dtype::Int4 => Tensor::Int4(vec![0x7fc0_7fc0; len]),
        _ => Tensor::from_f32(dtype, &vec![f32::NAN; len]),
    }
}

/// Copies a row's stored elements.
fn put(to: &mut Tensor, at: usize, row: &Tensor) {
    match (to, row) {
        (Tensor::Int8(to), Tensor::Int8(row)) | (Tensor::Int4(to), Tensor::Int4(row)) => {
            to[at..][..row.len()].copy_from_slice(row);
        }
        (to, row) => {
            let row = row.as_ref();
            (0..row.len()).for_each(|d| to.set(at + d, row.get(d)));
        }
    }
}
