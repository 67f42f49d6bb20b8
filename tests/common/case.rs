//! One problem with its data: named axes, drawn or chosen, become an [`AttentionProblem`] and
//! operands in which every element that no kept key needs is poison.

use std::sync::Arc;

use wgpu_attention::{
    Align, AttentionProblem, Bias, Dtype, Inputs, Layout, Operand, Similarity, Tensor, Window,
};

use super::rng::Rng;

/// The similarity, with W's shape.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sim {
    Dot,
    ScaledDot,
    /// `extra` more query dimensions than key dimensions (fewer where negative and possible).
    Bilinear {
        extra: isize,
        per_head: bool,
    },
    /// A given scale is one of the spread that scores then have. Some vectors are zeros.
    Cosine,
    /// `extra` as in the bilinear one.
    Additive {
        extra: isize,
        hidden: usize,
        per_head: bool,
    },
}

/// Along which dimensions a bias or mask has elements of its own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Spread {
    Full,
    /// One `[seq_q, seq_kv]` for all.
    Shared,
    PerHead,
    PerBatch,
    /// `[batch, 1, 1, seq_kv]`: padding masks.
    Keys,
    /// `[1, heads, 1, seq_kv]`.
    HeadKeys,
    /// `[batch, heads, seq_q, 1]`.
    Queries,
    One,
}

impl Spread {
    pub const ALL: [Self; 8] = [
        Self::Full,
        Self::Shared,
        Self::PerHead,
        Self::PerBatch,
        Self::Keys,
        Self::HeadKeys,
        Self::Queries,
        Self::One,
    ];

    pub fn dims(self, [b, h, q, k]: [usize; 4]) -> [usize; 4] {
        match self {
            Self::Full => [b, h, q, k],
            Self::Shared => [1, 1, q, k],
            Self::PerHead => [1, h, q, k],
            Self::PerBatch => [b, 1, q, k],
            Self::Keys => [b, 1, 1, k],
            Self::HeadKeys => [1, h, 1, k],
            Self::Queries => [b, h, q, 1],
            Self::One => [1, 1, 1, 1],
        }
    }
}

/// How q, k, v and o lie in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Storage {
    Bhsd,
    Bshd,
    /// k and v (and q, where it is as long) in one array, as a packed projection writes them.
    Packed,
    /// Gaps that keep every row at a multiple of four elements.
    Padded,
    /// Odd gaps and odd offsets: nothing is aligned.
    Odd,
    /// The width is the slowest of the last two dimensions: no row is contiguous.
    DimMajor,
    /// k and v are shared by all batch entries (stride 0).
    SharedKv,
}

/// Valid keys of each batch entry.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Lens {
    None,
    Full,
    /// Anything from 0 to all.
    Partial,
    /// The first entry has no key at all.
    FirstEmpty,
}

/// Everything that makes one problem.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Axes {
    pub dtype: Dtype,
    pub out_dtype: Dtype,
    pub batch: usize,
    /// Query heads and key-value heads.
    pub heads: (usize, usize),
    pub seq_q: usize,
    pub seq_kv: usize,
    pub head_dim: usize,
    pub head_dim_v: usize,
    pub similarity: Sim,
    pub scale: Option<f32>,
    pub softcap: Option<f32>,
    /// Element type, spread, and whether some entries are -inf.
    pub bias: Option<(Dtype, Spread, bool)>,
    pub alibi: bool,
    pub mask: Option<Spread>,
    pub causal: Option<Align>,
    pub window: Option<Window>,
    pub align: Align,
    pub lens: Lens,
    pub sinks: bool,
    pub storage: Storage,
    pub lse: bool,
    pub weights: bool,
    /// Standard deviation that the scores come out with.
    pub spread: f32,
}

impl Default for Axes {
    fn default() -> Self {
        Self {
            dtype: Dtype::F32,
            out_dtype: Dtype::F32,
            batch: 1,
            heads: (2, 2),
            seq_q: 17,
            seq_kv: 33,
            head_dim: 16,
            head_dim_v: 16,
            similarity: Sim::ScaledDot,
            scale: None,
            softcap: None,
            bias: None,
            alibi: false,
            mask: None,
            causal: None,
            window: None,
            align: Align::BottomRight,
            lens: Lens::None,
            sinks: false,
            storage: Storage::Bhsd,
            lse: true,
            weights: false,
            spread: 2.0,
        }
    }
}

/// Owned operands. Operands that share one `Arc` share one array (and one buffer on a device).
#[derive(Clone, Debug)]
pub struct Data {
    pub q: Arc<Tensor>,
    pub k: Arc<Tensor>,
    pub v: Arc<Tensor>,
    pub w: Option<Vec<f32>>,
    pub wq: Option<Vec<f32>>,
    pub wk: Option<Vec<f32>>,
    pub score_v: Option<Vec<f32>>,
    pub bias: Option<Tensor>,
    pub mask: Option<Vec<u8>>,
    pub alibi_slopes: Option<Vec<f32>>,
    pub sinks: Option<Vec<f32>>,
    pub kv_lens: Option<Vec<u32>>,
    pub block_table: Option<Vec<u32>>,
    pub cu_seqlens_q: Option<Vec<u32>>,
    pub cu_seqlens_k: Option<Vec<u32>>,
}

impl Data {
    pub fn new(q: Tensor, k: Tensor, v: Tensor) -> Self {
        Self {
            q: q.into(),
            k: k.into(),
            v: v.into(),
            w: None,
            wq: None,
            wk: None,
            score_v: None,
            bias: None,
            mask: None,
            alibi_slopes: None,
            sinks: None,
            kv_lens: None,
            block_table: None,
            cu_seqlens_q: None,
            cu_seqlens_k: None,
        }
    }

    pub fn inputs(&self) -> Inputs<'_> {
        Inputs {
            q: self.q.as_ref().as_ref(),
            k: self.k.as_ref().as_ref(),
            v: self.v.as_ref().as_ref(),
            w: self.w.as_deref(),
            wq: self.wq.as_deref(),
            wk: self.wk.as_deref(),
            score_v: self.score_v.as_deref(),
            bias: self.bias.as_ref().map(Tensor::as_ref),
            mask: self.mask.as_deref(),
            alibi_slopes: self.alibi_slopes.as_deref(),
            sinks: self.sinks.as_deref(),
            kv_lens: self.kv_lens.as_deref(),
            block_table: self.block_table.as_deref(),
            cu_seqlens_q: self.cu_seqlens_q.as_deref(),
            cu_seqlens_k: self.cu_seqlens_k.as_deref(),
        }
    }
}

/// A problem, its data, and what to print when it fails.
#[derive(Clone, Debug)]
pub struct Case {
    pub name: String,
    pub problem: AttentionProblem,
    pub data: Data,
    /// What an infinity in the operands makes of a result is not said beyond "not finite": adapters
    /// read and multiply infinities in their own ways.
    pub has_infinity: bool,
}

impl Case {
    pub fn new(name: impl Into<String>, problem: AttentionProblem, data: Data) -> Self {
        Self { name: name.into(), problem, data, has_infinity: false }
    }

    /// The same case with q, k and v in f16; what is too large for that becomes infinite.
    pub fn in_f16(&self) -> Self {
        let mut case = self.clone();
        case.problem.dtype = Dtype::F16;
        let kv_dtype = &mut case.problem.kv_dtype;
        *kv_dtype = kv_dtype.filter(|dtype| !dtype.is_float());
        let mut done = Vec::<(Arc<Tensor>, Arc<Tensor>)>::new();
        let mut overflows = false;
        for x in [&mut case.data.q, &mut case.data.k, &mut case.data.v] {
            // Operands that are one array stay one.
            if let Some((_, of)) = done.iter().find(|(from, _)| Arc::ptr_eq(from, x)) {
                *x = of.clone();
                continue;
            }
            if !x.as_ref().as_ref().dtype().is_float() {
                continue;
            }
            let numbers = x.to_f32();
            let narrow = Arc::new(Tensor::from_f32(Dtype::F16, &numbers));
            overflows |= narrow.to_f32().iter().zip(&numbers).any(|(a, b)| a.is_infinite() && b.is_finite());
            done.push((x.clone(), narrow.clone()));
            *x = narrow;
        }
        case.has_infinity |= overflows;
        case
    }
}

/// All index tuples of a shape, in order.
pub fn indices(shape: [usize; 4]) -> impl Iterator<Item = [usize; 4]> {
    let [b, h, s, d] = shape;
    (0..b * h * s * d).map(move |at| [at / d / s / h, at / d / s % h, at / d % s, at % d])
}

/// A tensor with `value(index)` at the places of `layout` and NaN everywhere else; `None` leaves
/// NaN there too. `tail` more elements follow the last one that the layout reaches.
pub fn fill(
    dtype: Dtype,
    layout: Layout,
    shape: [usize; 4],
    tail: usize,
    mut value: impl FnMut([usize; 4]) -> Option<f32>,
) -> Tensor {
    let len = layout.extent(shape) as usize + tail;
    let mut tensor = Tensor::from_f32(dtype, &vec![f32::NAN; len]);
    for at in indices(shape) {
        if let Some(x) = value(at) {
            tensor.set(layout.index(at), x);
        }
    }
    tensor
}

impl Axes {
    /// The cost that tests budget: multiplications of the two products.
    pub fn work(&self) -> usize {
        self.batch * self.heads.0 * self.seq_q * self.seq_kv * (self.head_dim + self.head_dim_v)
    }

    /// Fewer batch entries and heads (and, if that does not do, shorter rows), until the oracle
    /// is quick.
    pub fn shrunk_to(mut self, work: usize) -> Self {
        while self.work() > work {
            let (q, kv) = self.heads;
            if self.batch > 1 {
                self.batch -= 1;
            } else if kv > 1 {
                self.heads = (q / kv, 1);
            } else if q > 1 {
                self.heads = (1, 1);
            } else if self.head_dim_v > self.head_dim {
                self.head_dim_v /= 2;
            } else {
                self.head_dim /= 2;
            }
        }
        self
    }

    pub fn query_dim(&self) -> usize {
        match self.similarity {
            Sim::Bilinear { extra, .. } | Sim::Additive { extra, .. } => {
                self.head_dim.saturating_add_signed(extra).max(1)
            }
            _ => self.head_dim,
        }
    }

    /// The problem and seeded data for it.
    pub fn build(&self, seed: u64) -> Case {
        let mut rng = Rng::new(seed);
        let mut problem = self.problem(&mut rng);
        let data = self.data(&mut problem, &mut rng);
        Case::new(format!("{self:?} built from seed {seed:#x}"), problem, data)
    }

    fn problem(&self, rng: &mut Rng) -> AttentionProblem {
        let (heads_q, heads_kv) = self.heads;
        let (dq, d, dv) = (self.query_dim(), self.head_dim, self.head_dim_v);
        let mut p = AttentionProblem {
            dtype: self.dtype,
            out_dtype: self.out_dtype,
            similarity: match self.similarity {
                Sim::Dot => Similarity::Dot,
                Sim::ScaledDot => Similarity::ScaledDot,
                Sim::Bilinear { per_head, .. } => Similarity::Bilinear { query_dim: dq, per_head },
                Sim::Cosine => Similarity::Cosine,
                Sim::Additive { hidden, per_head, .. } => {
                    Similarity::Additive { query_dim: dq, hidden, per_head }
                }
            },
            scale: self.scale.map(|scale| match self.similarity {
                Sim::Cosine => scale * self.spread * (d as f32).sqrt(),
                _ => scale,
            }),
            softcap: self.softcap,
            alibi: self.alibi,
            causal: self.causal,
            window: self.window,
            align: self.align,
            kv_lens: self.lens != Lens::None,
            sinks: self.sinks,
            lse: self.lse,
            weights: self.weights,
            ..AttentionProblem::new(self.batch, heads_q, heads_kv, self.seq_q, self.seq_kv, d, dv)
        };
        let storage = self.storage;
        p.q = lay_out(storage, heads_q, self.seq_q, dq, rng);
        p.k = lay_out(storage, heads_kv, self.seq_kv, d, rng);
        p.v = lay_out(storage, heads_kv, self.seq_kv, dv, rng);
        p.o = lay_out(storage, heads_q, self.seq_q, dv, rng);
        if storage == Storage::Packed {
            // [batch, seq, (q heads | k heads | v heads)], q only where it is as long.
            let with_q = if self.seq_q == self.seq_kv { heads_q * dq } else { 0 };
            let token = with_q + heads_kv * (d + dv);
            let part = |offset, dim| Layout { offset, strides: [self.seq_kv * token, dim, token, 1] };
            if with_q > 0 {
                p.q = part(0, dq);
            }
            p.k = part(with_q, d);
            p.v = part(with_q + heads_kv * d, dv);
        }
        if storage == Storage::SharedKv {
            p.k.strides[0] = 0;
            p.v.strides[0] = 0;
        }
        let shape = p.shape(Operand::Bias);
        p.bias = self.bias.map(|(dtype, spread, _)| Bias {
            dtype,
            layout: lay_out_spread(storage, spread.dims(shape), rng),
        });
        p.mask = self.mask.map(|spread| lay_out_spread(storage, spread.dims(shape), rng));
        p
    }

    fn data(&self, p: &mut AttentionProblem, rng: &mut Rng) -> Data {
        let kv_lens: Option<Vec<u32>> = (self.lens != Lens::None).then(|| {
            let len = |b| match self.lens {
                Lens::None | Lens::Full => p.seq_kv,
                Lens::FirstEmpty if b == 0 => 0,
                Lens::Partial | Lens::FirstEmpty => rng.below(p.seq_kv + 1),
            };
            (0..p.batch).map(len).map(|len| len as u32).collect()
        });
        let exists = |b: usize, j: usize| kv_lens.as_ref().is_none_or(|lens| j < lens[b] as usize);

        // Products of two normals summed over the width have a deviation of sqrt(width).
        let scale = (p.effective_scale().abs() as f32).max(1e-6);
        let amplitude = match self.similarity {
            Sim::Additive { .. } => 1.0,
            _ => (self.spread / (scale * (p.head_dim as f32).sqrt())).sqrt(),
        };
        let tail = rng.below(4);
        let (q_shape, k_shape, v_shape) = (p.shape(Operand::Q), p.shape(Operand::K), p.shape(Operand::V));
        let zeros =
            |[b, h, i, _]: [usize; 4]| self.similarity == Sim::Cosine && (7 * b + 3 * h + i) % 16 == 5;
        let mut number = |at| if zeros(at) { 0.0 } else { amplitude * rng.normal() };
        let q = fill(p.dtype, p.q, q_shape, tail, |at| Some(number(at)));
        // Rows that do not exist stay poison: nothing may come of them.
        let k = fill(p.dtype, p.k, k_shape, tail, |at| exists(at[0], at[2]).then(|| number(at)));
        let v = fill(p.dtype, p.v, v_shape, tail, |[b, _, j, _]| exists(b, j).then(|| rng.normal() + 0.25));
        let mut data = Data::new(q, k, v);
        if self.storage == Storage::Packed {
            pack(p, &mut data);
        }

        if let Similarity::Bilinear { query_dim, per_head } = p.similarity {
            let heads = if per_head { p.heads_q } else { 1 };
            let scale = 1.0 / (query_dim as f32).sqrt();
            data.w = Some((0..heads * query_dim * p.head_dim).map(|_| scale * rng.normal()).collect());
        }
        if let Similarity::Additive { query_dim, hidden, per_head } = p.similarity {
            let heads = if per_head { p.heads_q } else { 1 };
            let mut normals = |rows: usize, dim: usize, scale: f32| {
                Some((0..heads * rows * dim).map(|_| scale / (dim as f32).sqrt() * rng.normal()).collect())
            };
            data.wq = normals(hidden, query_dim, 1.0);
            data.wk = normals(hidden, p.head_dim, 1.0);
            // tanh of such sums has a deviation of two thirds.
            data.score_v = normals(1, hidden, 1.5 * self.spread / scale);
        }
        if let (Some(bias), Some((dtype, spread, excludes))) = (p.bias, self.bias) {
            let dims = spread.dims(p.shape(Operand::Bias));
            // Whole rows are excluded as well as single keys.
            let empty_row = rng.below(5);
            data.bias = Some(fill(dtype, bias.layout, dims, tail, |[b, _, i, j]| {
                let excluded = excludes && (rng.chance(0.15) || (dims[2] > 1 && i % 5 == empty_row));
                let x = if excluded { f32::NEG_INFINITY } else { 2.0 * rng.normal() };
                // A bias at a key that does not exist may be anything, too.
                let read = dims[0] != p.batch || dims[3] != p.seq_kv || exists(b, j);
                read.then_some(x)
            }));
        }
        if let (Some(layout), Some(spread)) = (p.mask, self.mask) {
            let dims = spread.dims(p.shape(Operand::Mask));
            let mut mask = vec![0x55; layout.extent(dims) as usize + tail];
            let empty_row = rng.below(7);
            let density = rng.pick(&[0.15, 0.7, 0.97]);
            for at in indices(dims) {
                let keep = rng.chance(density) && !(dims[2] > 1 && at[2] % 7 == empty_row);
                // Any byte but zero keeps.
                mask[layout.index(at)] = if keep { rng.pick(&[1, 2, 0x80, 0xff]) } else { 0 };
            }
            data.mask = Some(mask);
        }
        if p.alibi {
            // ALiBi's own slopes, with one of the other sign: nothing forbids it.
            let slope =
                |h: usize| if h == 2 { -0.05 } else { 2f32.powf(-8.0 * (h + 1) as f32 / p.heads_q as f32) };
            data.alibi_slopes = Some((0..p.heads_q).map(slope).collect());
        }
        if p.sinks {
            data.sinks = Some((0..p.heads_q).map(|_| 2.0 * rng.normal()).collect());
        }
        data.kv_lens = kv_lens;
        data
    }
}

fn lay_out(storage: Storage, heads: usize, seq: usize, dim: usize, rng: &mut Rng) -> Layout {
    match storage {
        Storage::Bhsd | Storage::SharedKv => Layout::bhsd(heads, seq, dim),
        Storage::Bshd | Storage::Packed => Layout::bshd(heads, seq, dim),
        Storage::Padded => {
            let row = dim.next_multiple_of(4) + 4 * rng.below(3);
            let head = seq * row + 4 * rng.below(3);
            Layout { offset: 4 * rng.below(4), strides: [heads * head + 8, head, row, 1] }
        }
        Storage::Odd => {
            let row = dim + 1 + rng.below(3);
            let head = seq * row + rng.below(4);
            Layout { offset: 1 + 2 * rng.below(4), strides: [heads * head + rng.below(4), head, row, 1] }
        }
        Storage::DimMajor => Layout { offset: 0, strides: [heads * dim * seq, dim * seq, 1, seq] },
    }
}

/// A broadcast layout with the same kind of gaps as the other operands.
fn lay_out_spread(storage: Storage, dims: [usize; 4], rng: &mut Rng) -> Layout {
    let (gap, offset) = match storage {
        Storage::Padded => (4 * rng.below(3), 4 * rng.below(3)),
        Storage::Odd => (1 + rng.below(3), 1 + 2 * rng.below(3)),
        _ => (0, 0),
    };
    let stored = [dims[0], dims[1], dims[2], dims[3] + gap];
    let mut layout = Layout::broadcast(stored).at(offset);
    for (stride, n) in layout.strides.iter_mut().zip(dims) {
        if n == 1 {
            *stride = 0;
        }
    }
    layout
}

/// Moves k and v (and q) into the one array that their packed layouts describe.
fn pack(p: &AttentionProblem, data: &mut Data) {
    let with_q = p.seq_q == p.seq_kv;
    let mut parts = vec![(Operand::K, p.k, &data.k), (Operand::V, p.v, &data.v)];
    if with_q {
        parts.push((Operand::Q, p.q, &data.q));
    }
    let len = parts.iter().map(|(operand, ..)| p.extent(*operand) as usize).max().unwrap_or(0);
    let mut packed = Tensor::from_f32(p.dtype, &vec![f32::NAN; len]);
    for (operand, layout, from) in parts {
        for at in indices(p.shape(operand)) {
            let index = layout.index(at);
            packed.set(index, from.as_ref().as_ref().get(index));
        }
    }
    let packed = Arc::new(packed);
    if with_q {
        data.q = packed.clone();
    }
    data.k = packed.clone();
    data.v = packed;
}

/// The values that the axes take, and seeded draws from them.
pub mod values {
    use super::*;

    /// Around every tile edge up to 128, and past the largest workgroup.
    pub const SEQ: [usize; 17] = [0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257];
    pub const DIM: [usize; 17] = [1, 2, 3, 4, 5, 8, 15, 16, 20, 32, 33, 64, 65, 80, 128, 129, 256];
    /// Widths that vector loads serve, and widths that they do not.
    pub const DIM_VEC4: [usize; 9] = [4, 8, 16, 20, 32, 64, 80, 128, 256];
    pub const DIM_ANY: [usize; 9] = [1, 2, 3, 7, 15, 33, 65, 129, 255];
    /// Pairs of value widths (of either kind) between two powers of two.
    pub const DIM_V_VEC4: [[usize; 2]; 7] =
        [[4, 4], [8, 8], [12, 16], [20, 32], [36, 64], [80, 128], [132, 256]];
    pub const DIM_V_ANY: [[usize; 2]; 7] =
        [[1, 3], [5, 7], [9, 15], [17, 31], [33, 63], [65, 127], [129, 255]];
    pub const HEADS: [(usize, usize); 6] = [(1, 1), (2, 2), (4, 2), (3, 1), (6, 2), (5, 5)];
    /// The three with a W first, then the two of q and k alone; three at the end for the staged kernels alone.
    pub const SIMILARITY: [Sim; 9] = [
        Sim::Bilinear { extra: 0, per_head: true },
        Sim::Bilinear { extra: 3, per_head: false },
        Sim::Bilinear { extra: -4, per_head: true },
        Sim::ScaledDot,
        Sim::Dot,
        Sim::Cosine,
        Sim::Additive { extra: 0, hidden: 16, per_head: false },
        Sim::Additive { extra: 3, hidden: 5, per_head: true },
        Sim::Additive { extra: -4, hidden: 33, per_head: false },
    ];
    pub const SCALE: [Option<f32>; 4] = [None, Some(0.25), Some(-0.7), Some(1.5)];
    pub const SOFTCAP: [f32; 3] = [0.5, 30.0, 50.0];
    pub const CAUSAL: [Option<Align>; 3] = [None, Some(Align::TopLeft), Some(Align::BottomRight)];
    pub const ALIGN: [Align; 2] = [Align::TopLeft, Align::BottomRight];
    pub const LENS: [Lens; 4] = [Lens::None, Lens::Full, Lens::Partial, Lens::FirstEmpty];
    pub const WINDOW: [Option<Window>; 8] = [
        None,
        Some(Window { left: None, right: None }),
        Some(Window { left: Some(0), right: Some(0) }),
        Some(Window { left: Some(3), right: None }),
        Some(Window { left: None, right: Some(5) }),
        Some(Window { left: Some(7), right: Some(2) }),
        Some(Window { left: Some(40), right: Some(0) }),
        Some(Window { left: Some(usize::MAX), right: Some(usize::MAX) }),
    ];
    pub const STORAGE: [Storage; 7] = [
        Storage::Bhsd,
        Storage::Bshd,
        Storage::Packed,
        Storage::Padded,
        Storage::Odd,
        Storage::DimMajor,
        Storage::SharedKv,
    ];

    /// Anything goes: sizes are uniform rather than at edges, options independent.
    pub fn draw(rng: &mut Rng) -> Axes {
        let seq = |rng: &mut Rng| if rng.chance(0.5) { rng.pick(&SEQ) } else { rng.below(160) };
        let dim = |rng: &mut Rng| if rng.chance(0.5) { rng.pick(&DIM) } else { 1 + rng.below(130) };
        let dtype = rng.pick(&Dtype::FLOATS);
        Axes {
            dtype,
            out_dtype: if rng.chance(0.2) { rng.pick(&Dtype::FLOATS) } else { dtype },
            batch: rng.below(4),
            heads: rng.pick(&HEADS),
            seq_q: seq(rng),
            seq_kv: seq(rng),
            head_dim: dim(rng),
            head_dim_v: dim(rng),
            similarity: rng.pick(&SIMILARITY),
            scale: rng.pick(&SCALE),
            softcap: rng.chance(0.5).then(|| rng.pick(&SOFTCAP)),
            bias: rng
                .chance(0.5)
                .then(|| (rng.pick(&Dtype::FLOATS), rng.pick(&Spread::ALL), rng.chance(0.6))),
            alibi: rng.chance(0.3),
            mask: rng.chance(0.5).then(|| rng.pick(&Spread::ALL)),
            causal: rng.pick(&CAUSAL),
            window: if rng.chance(0.5) { None } else { rng.pick(&WINDOW) },
            align: rng.pick(&ALIGN),
            lens: rng.pick(&LENS),
            sinks: rng.chance(0.3),
            storage: rng.pick(&STORAGE),
            lse: rng.chance(0.6),
            weights: rng.chance(0.3),
            spread: rng.pick(&[1.0, 3.0, 8.0]),
        }
    }
}
