//! [`Append`]: new rows of k and v into a cache, on the GPU, at positions that only the GPU knows.

mod norm;
mod step;

pub use norm::QkNorm;
pub(crate) use step::{APPEND_ROPE, AppendStep, Holds, Norm, Stand, Turn};

use crate::attention::Attention;
use crate::blueprint::{Io, Keys};
use crate::cache::Cache;
use crate::caps::Caps;
use crate::dtype::Dtype;
use crate::encode::{Bound, Prepared, check_window, clash, one_dispatch};
use crate::error::{Error, Operand, Result};
use crate::layout::Layout;
use crate::mask::Align;
use crate::params::{ParamLayout, Params};
use crate::pipeline::Recipe;
use crate::plan::Window;
use crate::problem::{AttentionProblem, whole_words};
use crate::rope::Rope;

/// What a step of generation does before it attends: the new tokens' k and v go into the cache, turned by
/// their positions and converted to its element type on the way, and their queries are turned, too.
///
/// All of it is said in terms of the [`AttentionProblem`] that will read the cache: each of its queries
/// (`seq_q` of each entry, or ragged ones) is a new token with a key and a value of its own, in the same
/// element type. Token `t` of an entry's `n` stands at position `kv_lens - n + t`, where `kv_lens` counts the
/// new ones already: as the attention call counts them.
///
/// ```no_run
/// use wgpu_attention::{Align, Append, AppendOperands, Attention, AttentionProblem, Cache, Dtype, Operands, Rope};
/// # fn f(attention: &Attention, b: [wgpu::BufferSlice<'_>; 9]) -> wgpu_attention::Result<()> {
/// // One token a step for one sequence of at most 4096, 9 query heads over 3, an f16 cache.
/// let problem = AttentionProblem {
///     causal: Some(Align::BottomRight),
///     kv_lens: true,
///     ..AttentionProblem::new(1, 9, 3, 1, 4096, 64, 64)
/// }
/// .with_cache(Cache::Contiguous, Dtype::F16);
/// let append = Append {
///     rope: Some(Rope { positions: 4096, ..Rope::new(64) }),
///     q_new: Some(problem.q),
///     advance: true,
///     ..Append::new(&problem)
/// };
/// # let [q_new, k_new, v_new, q, k, v, o, kv_lens, rope] = b;
/// let plan = attention.plan(&problem)?;
/// let operands = AppendOperands { q_new: Some(q_new), q: Some(q), rope: Some(rope), ..AppendOperands::new(k_new, v_new, k, v, kv_lens) };
/// let attend = Operands { kv_lens: Some(kv_lens), ..Operands::new(q, k, v, o) };
/// // Everything of a step, to be encoded again and again.
/// let step = attention.prepare_append(&append, &operands)?.then(attention.prepare(&plan, &attend)?);
/// # let _ = step;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Append {
    /// The call that reads the cache. It needs `kv_lens`; its cache is not ragged.
    pub problem: AttentionProblem,
    /// Where new keys lie: `[batch, heads_kv, seq_q, head_dim]`, or `[1, heads_kv, total_q, head_dim]`.
    pub k_new: Layout,
    /// Where new values lie, likewise.
    pub v_new: Layout,
    /// Normalises keys (and queries, where they are moved) first, head by head.
    pub norm: Option<QkNorm>,
    /// Turns keys (and queries) by their positions; its table has at least `seq_kv` positions.
    pub rope: Option<Rope>,
    /// Where queries lie before they are turned, likewise; the turned go to where the problem says, which may be the
    /// same place. `None` leaves queries alone.
    pub q_new: Option<Layout>,
    /// First add each entry's new tokens to its `kv_lens`. Otherwise the caller has counted them: also where
    /// layers share one `kv_lens`, which the first layer's append alone may advance.
    pub advance: bool,
}

/// The buffers of an append, or pieces of buffers, as [`Operands`](crate::Operands) has them.
///
/// What is written (k, v, q, kv_lens, status) lies where nothing else lies, but for two things. k and v may lie in one
/// buffer by turns, in any layouts that have no place in common: `[2, pages, ...]` as well as `[pages, 2, ...]`. And
/// queries may be turned in place (not in a browser): q is q_new, in the same layout.
#[derive(Clone, Copy, Debug)]
pub struct AppendOperands<'a> {
    /// New keys.
    pub k_new: wgpu::BufferSlice<'a>,
    /// New values.
    pub v_new: wgpu::BufferSlice<'a>,
    /// The cache's keys.
    pub k: wgpu::BufferSlice<'a>,
    /// The cache's values.
    pub v: wgpu::BufferSlice<'a>,
    /// Keys of each entry, u32. A new key beyond `seq_kv` has no place and is left out ([`Status::FULL`]).
    ///
    /// [`Status::FULL`]: crate::Status::FULL
    pub kv_lens: wgpu::BufferSlice<'a>,
    /// Pages of each entry's keys, u32. A new key whose page does not exist is left out.
    pub block_table: Option<wgpu::BufferSlice<'a>>,
    /// Where each entry's ragged tokens begin, and the last end, u32.
    pub cu_seqlens_q: Option<wgpu::BufferSlice<'a>>,
    /// Cosines and sines, f32, `[positions, width / 2, 2]`.
    pub rope: Option<wgpu::BufferSlice<'a>>,
    /// Gains of the queries' norm, f32.
    pub q_gain: Option<wgpu::BufferSlice<'a>>,
    /// Gains of the keys' norm, f32.
    pub k_gain: Option<wgpu::BufferSlice<'a>>,
    /// Queries before they are turned.
    pub q_new: Option<wgpu::BufferSlice<'a>>,
    /// Receives the turned queries.
    pub q: Option<wgpu::BufferSlice<'a>>,
    /// Gains the bits of [`Status`](crate::Status), a u32.
    pub status: Option<wgpu::BufferSlice<'a>>,
}

impl<'a> AppendOperands<'a> {
    /// Those that every append has; fill in the rest with `..`.
    pub fn new(
        k_new: wgpu::BufferSlice<'a>,
        v_new: wgpu::BufferSlice<'a>,
        k: wgpu::BufferSlice<'a>,
        v: wgpu::BufferSlice<'a>,
        kv_lens: wgpu::BufferSlice<'a>,
    ) -> Self {
        Self {
            k_new,
            v_new,
            k,
            v,
            kv_lens,
            block_table: None,
            cu_seqlens_q: None,
            rope: None,
            q_gain: None,
            k_gain: None,
            q_new: None,
            q: None,
            status: None,
        }
    }

    fn get(&self, operand: Operand) -> Option<wgpu::BufferSlice<'a>> {
        match operand {
            Operand::KNew => Some(self.k_new),
            Operand::VNew => Some(self.v_new),
            Operand::K => Some(self.k),
            Operand::V => Some(self.v),
            Operand::KvLens => Some(self.kv_lens),
            Operand::BlockTable => self.block_table,
            Operand::CuSeqlensQ => self.cu_seqlens_q,
            Operand::Rope => self.rope,
            Operand::QGain => self.q_gain,
            Operand::KGain => self.k_gain,
            Operand::QNew => self.q_new,
            Operand::Q => self.q,
            Operand::Status => self.status,
            _ => None,
        }
    }
}

/// Every operand of an append.
const OPERANDS: [Operand; 13] = [
    Operand::KNew,
    Operand::VNew,
    Operand::K,
    Operand::V,
    Operand::KvLens,
    Operand::BlockTable,
    Operand::CuSeqlensQ,
    Operand::Rope,
    Operand::QGain,
    Operand::KGain,
    Operand::QNew,
    Operand::Q,
    Operand::Status,
];

/// A tensor on its way.
struct Move {
    from: Operand,
    to: Operand,
    heads: usize,
    turns: bool,
}

impl Append {
    /// New rows in `[batch, seq_q, heads_kv, dim]` (or `[total_q, heads_kv, dim]`), as a projection writes them (and
    /// not as [`AttentionProblem::new`] has q), nothing turned, lengths counted by the caller.
    pub fn new(problem: &AttentionProblem) -> Self {
        let p = problem;
        let rows = p.total_q.unwrap_or(p.seq_q);
        Self {
            k_new: Layout::bshd(p.heads_kv, rows, p.head_dim),
            v_new: Layout::bshd(p.heads_kv, rows, p.head_dim_v),
            problem: problem.clone(),
            norm: None,
            rope: None,
            q_new: None,
            advance: false,
        }
    }

    /// Logical shape of an operand.
    fn shape(&self, operand: Operand) -> [usize; 4] {
        let p = &self.problem;
        let new = |heads, dim| match p.total_q {
            Some(total) => [1, heads, total, dim],
            None => [p.batch, heads, p.seq_q, dim],
        };
        match operand {
            Operand::KNew => new(p.heads_kv, p.head_dim),
            Operand::VNew => new(p.heads_kv, p.head_dim_v),
            Operand::QNew => new(p.heads_q, p.query_dim()),
            Operand::QGain => [1, 1, 1, p.query_dim()],
            Operand::KGain => [1, 1, 1, p.head_dim],
            Operand::Rope => [1, 1, 1, self.rope.map_or(0, |rope| rope.elements())],
            _ => p.shape(operand),
        }
    }

    /// Where an operand lies; `None` where there is none.
    fn layout(&self, operand: Operand) -> Option<Layout> {
        match operand {
            Operand::KNew => Some(self.k_new),
            Operand::VNew => Some(self.v_new),
            Operand::QNew => self.q_new,
            Operand::Q => self.q_new.map(|_| self.problem.q),
            Operand::Rope => self.rope.map(|_| Layout::broadcast(self.shape(operand))),
            Operand::QGain if self.q_new.is_none() => None,
            Operand::QGain | Operand::KGain => match self.norm {
                Some(QkNorm::Rms { .. }) => Some(Layout::broadcast(self.shape(operand))),
                _ => None,
            },
            _ => self.problem.layout(operand),
        }
    }

    /// Bytes that a buffer for this operand needs, or a piece of one: whole words up to its last element. 0 when the append
    /// has no such operand or it is empty; `u64::MAX` where no buffer could be so large.
    pub fn buffer_bytes(&self, operand: Operand) -> u64 {
        let layout = OPERANDS.contains(&operand).then(|| self.layout(operand)).flatten();
        let extent = layout.map_or(0, |layout| layout.extent(self.shape(operand)));
        whole_words(extent, self.element_bytes(operand))
    }

    fn element_bytes(&self, operand: Operand) -> usize {
        match operand {
            Operand::KNew | Operand::VNew | Operand::QNew => self.problem.dtype.bytes(),
            _ => self.problem.element_bytes(operand),
        }
    }

    /// Checks every rule that does not depend on data or device.
    ///
    /// # Errors
    /// Those of [`AttentionProblem::validate`]; [`Error::MissingOperand`] where the problem has no `kv_lens`,
    /// [`Error::ZeroSize`] where it has no `seq_kv`; [`Error::BadNumber`] for a norm's epsilon;
    /// [`Error::Cache`] for a ragged cache, for a rotation that does not fit, and for a causal mask, a window or
    /// ALiBi that is [top-left](Align::TopLeft) aligned; [`Error::Overlaps`] and [`Error::TooLarge`].
    pub fn validate(&self) -> Result<()> {
        let p = &self.problem;
        p.validate()?;
        if matches!(p.cache, Cache::Ragged { .. }) {
            return Err(Error::Cache { why: "ragged keys leave no place for new ones".into() });
        }
        if !p.kv_lens {
            return Err(Error::MissingOperand { operand: Operand::KvLens });
        }
        if p.seq_kv == 0 {
            return Err(Error::ZeroSize { what: "seq_kv" });
        }
        let by_position = p.causal.is_some() || p.window.is_some() || p.alibi;
        if by_position && p.positions_align() == Align::TopLeft {
            let why =
                "new keys come last, and so stand their queries: positions must be bottom-right aligned";
            return Err(Error::Cache { why: why.into() });
        }
        self.norm.map_or(Ok(()), QkNorm::validate)?;
        if let Some(rope) = self.rope {
            let widest = if self.q_new.is_some() { p.head_dim.min(p.query_dim()) } else { p.head_dim };
            if let Some(why) = rope.unfit(widest, p.seq_kv) {
                return Err(Error::Cache { why });
            }
        }
        for operand in OPERANDS {
            let Some(layout) = self.layout(operand) else { continue };
            let (shape, got) = (self.shape(operand), layout.extent(self.shape(operand)));
            if got > u32::MAX as u128 {
                let what = format!("{operand}'s last element index");
                return Err(Error::TooLarge { what, got, max: u32::MAX as u64 });
            }
            let writes = matches!(operand, Operand::K | Operand::V | Operand::Q);
            if writes && !layout.is_injective(shape) {
                return Err(Error::Overlaps { operand, shape, strides: layout.strides });
            }
        }
        Ok(())
    }

    fn moves(&self) -> Vec<Move> {
        let p = &self.problem;
        let mut moves = vec![
            Move { from: Operand::KNew, to: Operand::K, heads: p.heads_kv, turns: true },
            Move { from: Operand::VNew, to: Operand::V, heads: p.heads_kv, turns: false },
        ];
        if self.q_new.is_some() {
            moves.push(Move { from: Operand::QNew, to: Operand::Q, heads: p.heads_q, turns: true });
        }
        moves
    }

    /// The step of one tensor, its uniform block, and its workgroups.
    fn step(&self, of: &Move, caps: &Caps) -> Result<(AppendStep, Params, u64)> {
        let p = &self.problem;
        let is_query = of.to == Operand::Q;
        let stored = if is_query { p.dtype } else { p.stored_kv() };
        let width = self.shape(of.from)[3];
        let layout = |operand| self.layout(operand).unwrap_or(Layout { offset: 0, strides: [0; 4] });
        let native = |dtype: Dtype| dtype == Dtype::F16 && caps.shader_f16;
        let vec4 = stored.is_float() && layout(of.to).is_vec4(width);
        let step = AppendStep {
            from: Some(Io { dtype: p.dtype, vec4: false, native: native(p.dtype) }),
            to: Some(Io { dtype: stored, vec4, native: native(stored) }),
            is_query,
            stand: Stand::Tail,
            width: width as u32,
            keys: match p.cache {
                Cache::Ring { capacity } if !is_query => Keys::Ring(capacity as u32),
                Cache::Paged { page_size, .. } if !is_query => Keys::Paged(page_size as u32),
                _ => Keys::Contiguous,
            },
            ragged: p.total_q.is_some(),
            norm: self
                .norm
                .filter(|_| of.turns)
                .map(|norm| Norm::of(norm, if is_query { Operand::QGain } else { Operand::KGain })),
            rope: self.rope.filter(|_| of.turns).map(Turn::of),
            status: p.status && !is_query,
        };
        step.fits(caps)?;
        let params = Params {
            heads_q: of.heads as u32,
            head_dim: width as u32,
            norm_epsilon: self.norm.map_or(0.0, QkNorm::epsilon),
            q: self.params_of(of.from, caps),
            k: self.params_of(of.to, caps),
            ..self.params()
        };
        Ok((step, params, (p.batch * of.heads * p.seq_q) as u64))
    }

    /// The step that counts the new tokens.
    fn advance_step(&self) -> AppendStep {
        AppendStep {
            from: None,
            to: None,
            is_query: false,
            stand: Stand::Tail,
            width: 0,
            keys: Keys::Contiguous,
            ragged: self.problem.total_q.is_some(),
            norm: None,
            rope: None,
            status: false,
        }
    }

    fn params_of(&self, operand: Operand, caps: &Caps) -> ParamLayout {
        let Some(layout) = self.layout(operand) else { return ParamLayout::default() };
        let first = self.window(operand, caps).start as usize / self.element_bytes(operand);
        ParamLayout::new(layout, self.shape(operand), first)
    }

    fn window(&self, operand: Operand, caps: &Caps) -> Window {
        let bytes = self.element_bytes(operand);
        self.layout(operand)
            .map_or(Window::NONE, |layout| Window::of(layout, self.shape(operand), bytes, caps))
    }

    fn params(&self) -> Params {
        let p = &self.problem;
        let [pages, max_blocks] = match p.cache {
            Cache::Paged { pages, max_blocks, .. } => [pages, max_blocks],
            _ => [0; 2],
        };
        Params {
            batch: p.batch as u32,
            seq_q: p.seq_q as u32,
            seq_kv: p.seq_kv as u32,
            total_q: p.total_q.unwrap_or(0) as u32,
            pages: pages as u32,
            max_blocks: max_blocks as u32,
            ..Params::default()
        }
    }

    /// Whether queries are turned where they lie. The kernel reads the whole of a row before it writes to it, but a
    /// browser binds nothing twice that is written.
    fn turns_in_place(&self, operands: &AppendOperands<'_>) -> bool {
        let same = operands.q == operands.q_new && self.q_new == Some(self.problem.q);
        same && !cfg!(target_arch = "wasm32")
    }

    /// Whether an element of the cache's k lies where one of its v does, in one buffer.
    fn cache_meets(&self, operands: &AppendOperands<'_>) -> bool {
        let p = &self.problem;
        let element = p.stored_kv().bytes();
        let place = |slice: wgpu::BufferSlice<'_>, layout: Layout| {
            layout.at(layout.offset + slice.offset() as usize / element)
        };
        let (k, v) = (place(operands.k, p.k), place(operands.v, p.v));
        k.meets(p.shape(Operand::K), &v, p.shape(Operand::V))
    }

    /// Every rule about the caller's buffers.
    fn check(&self, operands: &AppendOperands<'_>, caps: &Caps) -> Result<()> {
        for operand in OPERANDS {
            let wanted = self.layout(operand).is_some();
            if let Some(buffer) = operand.brought(wanted, operands.get(operand))? {
                check_window(operand, buffer, self.window(operand, caps), caps)?;
            }
        }
        // What is written lies where nothing else lies.
        let used = |operand| operands.get(operand).map(|slice| (slice, self.window(operand, caps)));
        for written in [Operand::K, Operand::V, Operand::Q, Operand::Status, Operand::KvLens] {
            for other in OPERANDS.into_iter().filter(|&other| other != written) {
                let (Some(a), Some(b)) = (used(written), used(other)) else { continue };
                let fine = !clash(a, b)
                    || match (written, other) {
                        // They are moved one after the other, and may lie by turns.
                        (Operand::K, Operand::V) | (Operand::V, Operand::K) => !self.cache_meets(operands),
                        (Operand::Q, Operand::QNew) => self.turns_in_place(operands),
                        _ => false,
                    };
                if !fine {
                    return Err(Error::Aliased { operand: written, with: other });
                }
            }
        }
        Ok(())
    }
}

impl Attention {
    /// Records an append, in a compute pass of its own. Submits nothing.
    ///
    /// # Errors
    /// Those of [`Append::validate`]; [`Error::KernelUnfit`], [`Error::MissingOperand`],
    /// [`Error::UnexpectedOperand`], [`Error::BufferUsage`], [`Error::OutOfBounds`], [`Error::Misaligned`],
    /// [`Error::Aliased`], [`Error::LimitExceeded`], [`Error::OutOfMemory`], [`Error::Driver`] and [`Error::DeviceLost`] (as
    /// [`Attention::encode`] has it); then nothing has been recorded.
    pub fn encode_append(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        append: &Append,
        operands: &AppendOperands<'_>,
    ) -> Result<()> {
        self.prepare_append(append, operands)?.encode(encoder);
        Ok(())
    }

    /// All of [`Attention::encode_append`] but the recording.
    ///
    /// # Errors
    /// Those of [`Attention::encode_append`].
    pub fn prepare_append(&self, append: &Append, operands: &AppendOperands<'_>) -> Result<Prepared> {
        let (p, caps) = (&append.problem, self.caps());
        append.validate()?;
        append.check(operands, caps)?;
        if p.batch == 0 || p.seq_q == 0 || p.total_q == Some(0) {
            return Ok(Prepared::default());
        }
        let mut steps = Vec::new();
        if append.advance {
            let step = append.advance_step();
            steps.push((step, append.params(), (p.batch as u64).div_ceil(u64::from(step.lanes())), None));
        }
        for of in append.moves() {
            let (step, params, groups) = append.step(&of, caps)?;
            steps.push((step, params, groups, Some((of.from, of.to))));
        }
        let mut ready = Vec::new();
        for (step, params, groups, tensors) in steps {
            let mut bound = Vec::new();
            for (number, holds, _) in step.bindings() {
                let operand = match (holds, tensors) {
                    (Holds::From, Some((from, _))) => from,
                    (Holds::To, Some((_, to))) => to,
                    (Holds::Operand(operand), _) => operand,
                    (_, None) => unreachable!("a step that moves nothing binds no tensor"),
                };
                let Some(slice) = operands.get(operand) else { continue };
                bound.push(Bound::new(number, slice, append.window(operand, caps)));
            }
            ready.push(one_dispatch(
                &self.shared,
                Recipe::Append(step),
                bytemuck::bytes_of(&params),
                bound,
                groups,
            )?);
        }
        Ok(Prepared::new(ready))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::pipeline::reflection;

    /// Steps over every kind of cache, storage, norm and rotation, aligned or not.
    fn every_step() -> HashSet<(AppendStep, bool)> {
        let mut all = HashSet::new();
        let caches = [
            Cache::Contiguous,
            Cache::Ring { capacity: 64 },
            Cache::Paged { pages: 9, page_size: 16, max_blocks: 4 },
        ];
        for (i, shader_f16) in [false, true].into_iter().enumerate() {
            let caps = Caps { shader_f16, ..Caps::minimal() };
            for (j, cache) in caches.into_iter().enumerate() {
                for (k, kv_dtype) in Dtype::ALL.iter().copied().enumerate() {
                    for (l, dtype) in Dtype::FLOATS.into_iter().enumerate() {
                        let turn = i + j + k + l;
                        let dim = if turn.is_multiple_of(2) { 64 } else { 30 };
                        let problem = AttentionProblem {
                            kv_lens: true,
                            status: turn.is_multiple_of(3),
                            ..AttentionProblem::new(2, 4, 2, 3, 64, dim, dim).with_dtype(dtype)
                        };
                        let mut problem = problem.with_cache(cache, kv_dtype);
                        if turn.is_multiple_of(2) {
                            problem = problem.with_ragged_queries(5);
                        }
                        let norms =
                            [None, Some(QkNorm::Rms { epsilon: 1e-6 }), Some(QkNorm::L2 { epsilon: 1e-6 })];
                        let append = Append {
                            norm: norms[turn % 3],
                            rope: (turn % 4 > 0).then_some(Rope { positions: 64, ..Rope::new(16) }),
                            q_new: Some(problem.q),
                            ..Append::new(&problem)
                        };
                        append.validate().unwrap();
                        for of in append.moves() {
                            let step = append.step(&of, &caps).unwrap().0;
                            all.insert((step, shader_f16));
                            // Queries of layers stay where they are.
                            for stand in [Stand::Rows, Stand::Given] {
                                let step =
                                    AppendStep { stand, is_query: true, keys: Keys::Contiguous, ..step };
                                let float = step.to.is_some_and(|to| to.dtype.is_float());
                                if float && !step.status && (stand == Stand::Rows || step.rope.is_some()) {
                                    all.insert((step, shader_f16));
                                }
                            }
                        }
                        all.insert((append.advance_step(), shader_f16));
                    }
                }
            }
        }
        all
    }

    #[test]
    fn every_step_is_valid_wgsl_with_the_bindings_that_it_says() {
        let all = every_step();
        assert!(all.len() > 100, "{}", all.len());
        for (step, shader_f16) in all {
            reflection::check(Recipe::Append(step), shader_f16);
        }
    }
}
