//! What the kernels of a backward pass share out among their threads: who owns what, in which sizes, and in how many parts
//! the others come that it meets.

use super::BackwardProblem;
use crate::caps::Caps;
use crate::dtype::Dtype;
use crate::error::Operand;
use crate::fused::{self, FusedTile};

/// Threads of the kernel that looks at each query.
pub(super) const LANES: u32 = 64;

/// Threads of the kernel that sums up what queries say of a sink.
pub(super) const SINK_THREADS: u32 = 256;

/// Most queries of a head that it sums up on a processor: see [`part_others`].
pub(super) const SINK_QUERIES: u64 = 32768 * SINK_THREADS as u64;

/// The kernel of the bias's gradient: threads along a side of its workgroup, which owns four times as many queries and
/// keys, and quads of a row that lie in workgroup memory. 9 KiB, and some fifty registers.
pub(super) const BIAS_SIDE: u32 = 8;
pub(super) const BIAS_SLICE: u32 = 8;

/// Others whose products with weights a thread that owns a row adds up before they join the row's.
pub(super) const NEAR: u32 = 128;

/// What a kernel of the backward pass makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Makes {
    /// lse and delta of each query, and all lists, in one buffer.
    Rows,
    Dq,
    Dk,
    Dv,
    Dbias,
    Dsinks,
}

impl Makes {
    /// The gradients.
    pub(crate) const GRADIENTS: [Self; 5] = [Self::Dq, Self::Dk, Self::Dv, Self::Dbias, Self::Dsinks];

    /// The gradient that it makes.
    pub(crate) fn gradient(self) -> Option<Operand> {
        match self {
            Self::Rows => None,
            Self::Dq => Some(Operand::Dq),
            Self::Dk => Some(Operand::Dk),
            Self::Dv => Some(Operand::Dv),
            Self::Dbias => Some(Operand::Dbias),
            Self::Dsinks => Some(Operand::Dsinks),
        }
    }
}

/// How a gradient's kernel shares out its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Form {
    /// A thread looks at a query, for [`Makes::Rows`].
    Gather,
    /// Tiles of own rows and others meet in workgroup memory. With the quads of both kinds of own rows if those are held
    /// there, too; 0 of what the gradient of v has no use for.
    Tile { tile: FusedTile, held: Option<[u32; 2]> },
    /// A thread owns a row, whose quads (of both kinds) have names.
    Row { threads: u32, others: u32, quads: [u32; 2] },
    /// A workgroup owns a tile of pairs, and sums over `[entries, heads]`, for [`Makes::Dbias`].
    Pairs { sums: [bool; 2] },
    /// A workgroup owns a head, for [`Makes::Dsinks`].
    Head,
}

impl Form {
    /// Own rows of a workgroup.
    pub(crate) fn own_rows(self) -> u32 {
        match self {
            Self::Gather => LANES,
            Self::Tile { tile, .. } => tile.tile_q(),
            Self::Row { threads, .. } => threads,
            Self::Pairs { .. } => 4 * BIAS_SIDE,
            Self::Head => 1,
        }
    }
}

/// Own rows of a head, and the others that each may meet, of all heads together.
pub(super) fn own_and_others(makes: Makes, problem: &BackwardProblem) -> [u64; 2] {
    let p = &problem.attention;
    let (queries, keys) = (p.seq_q as u64, p.seq_kv as u64);
    match makes {
        Makes::Rows => [p.total_q.unwrap_or(p.seq_q) as u64, 0],
        Makes::Dq => [queries, keys],
        Makes::Dk | Makes::Dv => [keys, queries * p.group_size() as u64],
        // An element of the bias meets the entries and heads that it is the same of.
        Makes::Dbias => {
            let owners = problem.owners_of_bias();
            let met = [p.batch / owners[0].max(1), p.heads_q / owners[1].max(1)];
            [queries, met[0] as u64 * met[1] as u64]
        }
        Makes::Dsinks => [1, 0],
    }
}

/// Others of a part. On a GPU as many as an f32 sum's rounding errors allow, which grow with its terms: the last rounding of
/// narrower types is larger. A thread on a processor loops fewer than 40000 times for it: lavapipe ends a thread's loops
/// after 65535 iterations in all.
pub(super) fn part_others(form: Form, problem: &BackwardProblem, caps: &Caps) -> u64 {
    let p = &problem.attention;
    if !caps.on_cpu() {
        return match form {
            _ if ![p.dtype, p.stored_kv()].contains(&Dtype::F32) => u64::MAX,
            // Its sums have one term of each other, those of tiles one of a step.
            Form::Pairs { .. } => 1024,
            _ => 4096,
        };
    }
    let widest = p.head_dim.max(p.head_dim_v).next_power_of_two();
    match form {
        Form::Gather | Form::Head => u64::MAX,
        Form::Pairs { .. } => (2048 / (p.head_dim + p.head_dim_v).div_ceil(4).max(32) as u64).max(1),
        Form::Row { .. } => 32768,
        Form::Tile { .. } => 2048 * 64 / widest.clamp(64, 512) as u64,
    }
}

/// Parts that the others come in.
pub(super) fn parts(makes: Makes, form: Form, problem: &BackwardProblem, caps: &Caps) -> u64 {
    let [_, others] = own_and_others(makes, problem);
    others.div_ceil(part_others(form, problem, caps)).max(1)
}

/// A slice of the others' tile (skewed by a vec4, so that rows begin in different banks), the weights (skewed, too), two
/// flags, and the own rows if they are held.
pub(super) fn tile_bytes(of: FusedTile, held: Option<[u32; 2]>) -> u32 {
    let quads = held.unwrap_or_default().into_iter().filter(|&quads| quads > 0);
    let rest = of.tile_kv() * (of.slice + 1) + of.tile_q() * (of.lanes + 1);
    let all = quads.map(|quads| of.held_quads(quads)).fold(rest, u32::saturating_add);
    all.saturating_mul(16).saturating_add(8)
}

/// The fused tile's sizes for own rows and others: its slices serve both products. `whole` says whether all of
/// head_dim, and of head_dim_v, lies in one. Half of the rows of a thread are no loss beside an own quad that comes from
/// storage at each product with four others, since a GPU spends as much on a load's address and bounds as on what it
/// loads: own rows are held where that makes room for them.
pub(super) fn tile(makes: Makes, problem: &BackwardProblem, caps: &Caps) -> Form {
    let p = &problem.attention;
    let [own, _] = own_and_others(makes, problem);
    let widest = p.head_dim.max(p.head_dim_v);
    let out = if makes == Makes::Dv { p.head_dim_v } else { p.head_dim };
    let of = fused::tile(own as usize, widest, out, false, caps);
    let quads = [p.head_dim, p.head_dim_v].map(|width| (width as u32).div_ceil(4));
    let whole = quads.map(|quads| quads <= of.slice);
    let of = FusedTile { held: 0, whole, ..of };
    // V is no factor of the weights that its own gradient sums.
    let quads = if makes == Makes::Dv { [quads[0], 0] } else { quads };
    let room = fused::most_holding_bytes(caps).saturating_sub(8 * of.tile_kv());
    let halved = FusedTile { rows: (of.rows / 2).max(1), ..of };
    let holds = [of, halved].into_iter().find(|&of| tile_bytes(of, Some(quads)) <= room);
    match holds {
        Some(tile) => Form::Tile { tile, held: Some(quads) },
        None => Form::Tile { tile: of, held: None },
    }
}

/// Widest rows that a thread can have names for before a compiler takes many seconds; of those that are read one by one.
const MOST_ROW_WIDTH: [usize; 2] = [128, 40];

/// A row a thread, as many threads as the forward kernel has; `None` where rows are too wide.
pub(super) fn row(makes: Makes, problem: &BackwardProblem, caps: &Caps) -> Option<Form> {
    let p = &problem.attention;
    let all = [Operand::Q, Operand::K, Operand::V, Operand::Dout, Operand::Dq, Operand::Dk, Operand::Dv];
    let vec4 = all.iter().all(|&of| problem.layout(of).is_some_and(|l| l.is_vec4(problem.shape(of)[3])));
    let widest = p.head_dim.max(p.head_dim_v);
    let most = MOST_ROW_WIDTH[usize::from(!vec4)];
    let quads = [p.head_dim, p.head_dim_v].map(|width| (width as u32).div_ceil(4));
    let others = if vec4 && widest <= 64 { 2 } else { 1 };
    let threads = fused::row(p, caps).threads;
    (makes != Makes::Rows && widest <= most).then_some(Form::Row { threads, others, quads })
}
