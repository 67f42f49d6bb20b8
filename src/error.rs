//! The one error type: every variant carries the operand, what was needed and what was got.

use crate::dtype::Dtype;

/// A tensor or buffer that takes part in one attention call.
///
/// Its `Display` form is the name that the rest of the crate, the shaders and the program use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Operand {
    /// Queries, `[batch, heads_q, seq_q, query_dim]`; `query_dim` is `head_dim` but where the similarity gives
    /// queries a width of their own.
    Q,
    /// Keys, `[batch, heads_kv, seq_kv, head_dim]`.
    K,
    /// Values, `[batch, heads_kv, seq_kv, head_dim_v]`.
    V,
    /// The output, `[batch, heads_q, seq_q, head_dim_v]`.
    O,
    /// The bilinear matrix, `[query_dim, head_dim]` or one of those per query head; or a linear map's weights,
    /// `[outputs, inputs]`.
    W,
    /// The additive similarity's matrix on queries, `[hidden, query_dim]` or one of those per query head.
    Wq,
    /// The additive similarity's matrix on keys, `[hidden, head_dim]` or one of those per query head.
    Wk,
    /// The additive similarity's weights, `[hidden]` or one of those per query head.
    ScoreV,
    /// The additive bias, broadcastable to `[batch, heads_q, seq_q, seq_kv]`; or a linear map's, to
    /// `[rows, outputs]`.
    Bias,
    /// The boolean mask (one byte an element, non-zero keeps), broadcastable like the bias.
    Mask,
    /// ALiBi slopes, `[heads_q]`.
    AlibiSlopes,
    /// Sink logits, `[heads_q]`.
    Sinks,
    /// Valid keys of each batch entry, `[batch]`.
    KvLens,
    /// Pages of each batch entry's keys, `[batch, max_blocks]`.
    BlockTable,
    /// Where each batch entry's ragged queries begin, and the last end, `[batch + 1]`.
    CuSeqlensQ,
    /// Where each batch entry's ragged keys begin, and the last end, `[batch + 1]`.
    CuSeqlensK,
    /// The word that reports what was wrong with numbers on the GPU.
    Status,
    /// New keys, on their way into a cache: `[batch, heads_kv, seq_q, head_dim]`.
    KNew,
    /// New values, on their way into a cache: `[batch, heads_kv, seq_q, head_dim_v]`.
    VNew,
    /// Queries before their rotation, `[batch, heads_q, seq_q, query_dim]`.
    QNew,
    /// What a linear map takes, `[rows, inputs]`.
    X,
    /// What a linear map gives, `[rows, outputs]`.
    Y,
    /// Cosines and sines of rotary positions, `[positions, width / 2, 2]`.
    Rope,
    /// Positions of a layer's tokens, `[tokens]`.
    Positions,
    /// Gains of the queries' norm, `[query_dim]`.
    QGain,
    /// Gains of the keys' norm, `[head_dim]`.
    KGain,
    /// The natural logarithm of each row's denominator, `[batch, heads_q, seq_q]`.
    Lse,
    /// The attention weights, `[batch, heads_q, seq_q, seq_kv]`.
    Weights,
    /// The gradient of a loss by o, as o.
    Dout,
    /// Its gradient by q, as q.
    Dq,
    /// Its gradient by k, as k.
    Dk,
    /// Its gradient by v, as v.
    Dv,
    /// Its gradient by bias, as bias.
    Dbias,
    /// Its gradient by the sinks, `[heads_q]`.
    Dsinks,
}

impl Operand {
    /// Every operand of an attention call, inputs before outputs.
    pub const ALL: &'static [Self] = &[
        Self::Q,
        Self::K,
        Self::V,
        Self::W,
        Self::Wq,
        Self::Wk,
        Self::ScoreV,
        Self::Bias,
        Self::Mask,
        Self::AlibiSlopes,
        Self::Sinks,
        Self::KvLens,
        Self::BlockTable,
        Self::CuSeqlensQ,
        Self::CuSeqlensK,
        Self::O,
        Self::Lse,
        Self::Weights,
        Self::Status,
    ];

    /// Every gradient of a backward pass.
    pub const GRADIENTS: [Self; 5] = [Self::Dq, Self::Dk, Self::Dv, Self::Dbias, Self::Dsinks];

    /// What a call brings of an operand that its problem wants, or does not want.
    pub(crate) fn brought<T>(self, wanted: bool, got: Option<T>) -> Result<Option<T>> {
        match (wanted, &got) {
            (true, None) => Err(Error::MissingOperand { operand: self }),
            (false, Some(_)) => Err(Error::UnexpectedOperand { operand: self }),
            _ => Ok(got),
        }
    }
}

impl std::fmt::Display for Operand {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Q => "q",
            Self::K => "k",
            Self::V => "v",
            Self::O => "o",
            Self::W => "w",
            Self::Wq => "wq",
            Self::Wk => "wk",
            Self::ScoreV => "score_v",
            Self::Bias => "bias",
            Self::Mask => "mask",
            Self::AlibiSlopes => "alibi_slopes",
            Self::Sinks => "sinks",
            Self::KvLens => "kv_lens",
            Self::BlockTable => "block_table",
            Self::CuSeqlensQ => "cu_seqlens_q",
            Self::CuSeqlensK => "cu_seqlens_k",
            Self::Status => "status",
            Self::KNew => "k_new",
            Self::VNew => "v_new",
            Self::QNew => "q_new",
            Self::X => "x",
            Self::Y => "y",
            Self::Rope => "rope",
            Self::Positions => "positions",
            Self::QGain => "q_gain",
            Self::KGain => "k_gain",
            Self::Lse => "lse",
            Self::Weights => "weights",
            Self::Dout => "dout",
            Self::Dq => "dq",
            Self::Dk => "dk",
            Self::Dv => "dv",
            Self::Dbias => "dbias",
            Self::Dsinks => "dsinks",
        })
    }
}

/// Everything that can go wrong, found before anything is encoded unless its text says otherwise.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A size that must be at least one is zero.
    #[error("{what} must be at least 1")]
    ZeroSize {
        /// The size's name in [`AttentionProblem`](crate::AttentionProblem).
        what: &'static str,
    },
    /// A size is beyond what 32-bit indexing on the device can address.
    #[error("{what} is {got}, the largest possible is {max}")]
    TooLarge {
        /// The size's name, or the operand whose element indices overflow.
        what: String,
        /// The size that was asked for.
        got: u128,
        /// The largest size that is served.
        max: u64,
    },
    /// Query heads do not divide evenly over key-value heads.
    #[error("heads_q = {heads_q} is not a multiple of heads_kv = {heads_kv}")]
    HeadGroups {
        /// Query heads.
        heads_q: usize,
        /// Key-value heads.
        heads_kv: usize,
    },
    /// A numeric option is not a number that the mathematics allows.
    #[error("{what} = {got} is not {need}")]
    BadNumber {
        /// The option's name.
        what: &'static str,
        /// What the option was set to.
        got: f32,
        /// What it has to be.
        need: &'static str,
    },
    /// Strides make two elements share a place: any two of an output, or two of one entry's heads of q, k or v whose
    /// strides are not 0 (as when a size has changed and the layout has not).
    #[error("{operand}: strides {strides:?} map two elements of shape {shape:?} to one place")]
    Overlaps {
        /// The operand.
        operand: Operand,
        /// Its logical shape.
        shape: [usize; 4],
        /// The strides, in elements.
        strides: [usize; 4],
    },
    /// A slice or buffer ends before the last element that the layout reaches.
    #[error("{operand}: the layout reaches {need} {unit}, the {container} holds {got}")]
    OutOfBounds {
        /// The operand.
        operand: Operand,
        /// Elements (slices) or bytes (buffers) needed, from the start of the container.
        need: u64,
        /// What there is.
        got: u64,
        /// `"elements"` or `"bytes"`.
        unit: &'static str,
        /// `"slice"` or `"buffer"`.
        container: &'static str,
    },
    /// The problem asks for an operand that the call did not bring.
    #[error("{operand}: the problem asks for it, the call did not bring it")]
    MissingOperand {
        /// The operand.
        operand: Operand,
    },
    /// The call brings an operand that the problem does not mention.
    #[error("{operand}: the call brings it, the problem does not mention it")]
    UnexpectedOperand {
        /// The operand.
        operand: Operand,
    },
    /// An operand has another element type than the problem states.
    #[error("{operand}: the problem states {need}, the call brings {got}")]
    DtypeMismatch {
        /// The operand.
        operand: Operand,
        /// The problem's type.
        need: Dtype,
        /// The call's type.
        got: Dtype,
    },
    /// An operand cannot have the element type that the problem gives it.
    #[error("{operand}: {got} is not one of its element types: {need}")]
    DtypeUnfit {
        /// The operand.
        operand: Operand,
        /// The type given.
        got: Dtype,
        /// The types that it may have.
        need: &'static str,
    },
    /// There are no kernels for the gradient of such attention.
    #[error("no gradient of attention with {of}")]
    NoGradient {
        /// What it is that has none.
        of: String,
    },
    /// A cache's sizes do not hold what the problem asks of it.
    #[error("cache: {why}")]
    Cache {
        /// What does not fit.
        why: String,
    },
    /// The block table names a page that does not exist.
    #[error("block_table[{batch}][{block}] = {got} is none of the {pages} pages")]
    BlockTable {
        /// The batch entry.
        batch: usize,
        /// The block of its keys.
        block: usize,
        /// The page given.
        got: u32,
        /// Pages that exist.
        pages: usize,
    },
    /// Offsets of ragged sequences do not rise from 0 to all rows, or an entry is longer than stated.
    #[error("{operand}[{index}] = {got} must be between {least} and {most}")]
    CuSeqlens {
        /// Which of the two lists.
        operand: Operand,
        /// The place in it.
        index: usize,
        /// The offset given.
        got: u32,
        /// The offset before it; for the last one, all rows.
        least: u32,
        /// The most it may be, by the total and by the longest sequence that the problem states.
        most: u64,
    },
    /// A key length is longer than the keys that exist.
    #[error("kv_lens[{batch}] = {got} is beyond seq_kv = {seq_kv}")]
    KvLen {
        /// The batch entry.
        batch: usize,
        /// The length given.
        got: u32,
        /// Keys that exist.
        seq_kv: usize,
    },
    /// A token stands at a position that the table of angles does not have.
    #[error("positions[{index}] = {got} is none of the {positions} in rope's table")]
    Position {
        /// The token.
        index: usize,
        /// The position given.
        got: u32,
        /// Positions of the table.
        positions: usize,
    },
    /// A caller's buffer lacks a usage flag.
    #[error("{operand}: the buffer needs usage {need:?}, it has {got:?}")]
    BufferUsage {
        /// The operand.
        operand: Operand,
        /// Flags needed.
        need: wgpu::BufferUsages,
        /// Flags that the buffer has.
        got: wgpu::BufferUsages,
    },
    /// A range of a buffer that cannot be read back.
    #[error("bytes {start}..{end} of a buffer of {size} cannot be read: {why}")]
    ReadRange {
        /// The first byte asked for.
        start: u64,
        /// The byte behind the last.
        end: u64,
        /// Bytes of the buffer.
        size: u64,
        /// What is wrong.
        why: &'static str,
    },
    /// An operand begins where no binding can.
    #[error("{operand}: begins at byte {got} of its buffer, not at a multiple of {need}")]
    Misaligned {
        /// The operand.
        operand: Operand,
        /// The device's storage alignment (`min_storage_buffer_offset_alignment`).
        need: u64,
        /// Where its slice begins.
        got: u64,
    },
    /// An output lies where another operand lies, or too near: what is bound of each begins at the last multiple of the
    /// device's storage alignment (256 bytes by default) before its first element. In a browser all of their buffer is
    /// too near.
    #[error("{operand}: lies over {with}, or too near, in one buffer")]
    Aliased {
        /// The output.
        operand: Operand,
        /// The other operand.
        with: Operand,
    },
    /// Something is wrong about the partial results of a merge; its operands are o and lse of that pair.
    #[error("partial results {at}: {error}")]
    Partials {
        /// Which entry of [`MergeProblem::partials`](crate::MergeProblem::partials).
        at: usize,
        /// What is wrong.
        error: Box<Error>,
    },
    /// A paged cache has too few free pages.
    #[error("{need} pages needed, {free} of the cache's are free")]
    OutOfPages {
        /// Pages needed.
        need: u64,
        /// Pages that nobody owns.
        free: u32,
    },
    /// A page was given back or shared that nobody owns: it was freed before, or is another cache's.
    #[error("page {page} is not in use; there are {pages} pages")]
    PageNotInUse {
        /// The page.
        page: u32,
        /// Pages of the cache.
        pages: u32,
    },
    /// A layer that there is not.
    #[error("the layer: {why}")]
    Layer {
        /// What is wrong with it.
        why: String,
    },
    /// Something is wrong with one of a layer's linear maps, whose operands are x, w, bias and y.
    #[error("{part}: {error}")]
    Projection {
        /// Which one.
        part: &'static str,
        /// What is wrong there.
        error: Box<Error>,
    },
    /// A checkpoint lacks a tensor, or has another one than the layer needs.
    #[error("checkpoint: {tensor}: {why}")]
    Checkpoint {
        /// The tensor's name.
        tensor: String,
        /// What is wrong with it.
        why: String,
    },
    /// The device cannot do what every kernel for this problem needs.
    #[error("{what}: {need} needed, the device allows {got}")]
    LimitExceeded {
        /// The limit, with the operand that hits it.
        what: String,
        /// Units needed.
        need: u64,
        /// Units allowed.
        got: u64,
    },
    /// A forced path or kernel cannot serve this problem on this device, or no kernel can (then it is the one that
    /// lacks least): on devices below wgpu's default limits.
    #[error("kernel {kernel} does not fit: {why}")]
    KernelUnfit {
        /// The kernel's name in the table.
        kernel: String,
        /// Why not.
        why: String,
    },
    /// The plan was made for another device (or other options) than the object that encodes it.
    #[error("this plan was made for a device with {plan}, this one has {device}")]
    ForeignPlan {
        /// The first of the capabilities that the plan was made for and the device does not have, as
        /// [`Caps`](crate::Caps) names it.
        plan: String,
        /// The same of the device that was to run it.
        device: String,
    },
    /// Text that is no path, no family or no tile.
    #[error("{got:?} {why}")]
    Name {
        /// The text, or the part of it that is meant.
        got: String,
        /// What is wrong with it, and what there is.
        why: String,
    },
    /// A tuning table has a line that is none.
    #[error("the tuning table's line {line}: {why}")]
    Tuning {
        /// The line's number, from 1.
        line: usize,
        /// What is wrong with it.
        why: String,
    },
    /// Bytes that were to be a kept blob of pipelines.
    #[error("no blob of pipelines: {why}")]
    PipelineBlob {
        /// What is wrong with them.
        why: String,
    },
    /// No adapter answers the request.
    #[error("no adapter: {why}")]
    NoAdapter {
        /// What was asked for and what there is.
        why: String,
    },
    /// The adapter refused to open a device.
    #[error("no device on {adapter}: {why}")]
    NoDevice {
        /// The adapter's name.
        adapter: String,
        /// The driver's words.
        why: String,
    },
    /// The device ran out of memory. Nothing of this call was executed.
    #[error("out of device memory while making {what}")]
    OutOfMemory {
        /// What was being made.
        what: String,
    },
    /// The device is lost; make a new one.
    #[error("the device is lost: {why}")]
    DeviceLost {
        /// The driver's words.
        why: String,
    },
    /// wgpu or the driver rejected a kernel or a command that this crate made: a buffer of another device or one that
    /// has been destroyed, or else a defect of theirs or ours.
    #[error("{what}: {why}")]
    Driver {
        /// What was being made.
        what: String,
        /// The driver's words.
        why: String,
    },
}

/// The one of `all` that is written so.
pub(crate) fn named<T: Copy + std::fmt::Display>(all: &[T], text: &str, what: &str) -> Result<T> {
    all.iter().copied().find(|one| one.to_string() == text).ok_or_else(|| {
        let all: Vec<_> = all.iter().map(T::to_string).collect();
        Error::Name { got: text.into(), why: format!("is no {what}; there are {}", all.join(", ")) }
    })
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
