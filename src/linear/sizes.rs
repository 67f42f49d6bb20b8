//! The sizes of the kernels of linear maps: what a workgroup takes on, and what each of its threads.

use super::{FEW_ROWS, LinearKernel};
use crate::blueprint::Io;
use crate::caps::{Caps, MatrixUnits};
use crate::dtype::Dtype;
use crate::fused::LEAST_SUBGROUP;

/// Threads of the tile kernel along the outputs (a quad each) and along the rows, and quads of inputs that
/// are staged at a time: 128 threads, and 10 KiB of workgroup memory, so that several workgroups share a
/// multiprocessor whose threads can have 128 registers or more.
const SIDE_X: u32 = 16;
const SIDE_Y: u32 = 8;
const STEP: u32 = 4;

/// Threads of the direct kernel: a vector of most processors.
const LANES: u32 = 8;

/// Rows from which on its largest tile pays, which takes twice as long to compile.
const MANY_ROWS: u32 = 8 * LANES;

/// Fewest threads of the kernel for few rows: whole subgroups, of any size up to that.
const FEW_THREADS: u32 = 64;

/// Most registers of a thread that fragments may take; a GPU has 255 or 256.
const MOST_REGISTERS: u32 = 176;

/// Inputs of a chain of products, and inputs of which the outer sums take care before the third level does:
/// the error of a sum grows with the square root of its terms, or with their number where all are alike.
const LEVEL: u32 = 64;
pub(super) const FAR: u32 = 1024;

/// A kernel's own sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Sizes {
    /// Rows of a thread.
    Tile { rows: u32 },
    /// Rows and quads of outputs of a workgroup, and threads that share a quad; how many of them a subgroup
    /// covers, if it is asked to.
    Few { rows: u32, quads: u32, lanes: u32, share: Option<u32> },
    /// On cooperative matrices.
    Matrix(Matrix),
    /// Rows and quads of outputs of a thread; which of the two differ from thread to thread.
    Direct { rows: u32, quads: u32, over_rows: bool },
}

/// Sizes of the kernel on cooperative matrices: subgroups of a workgroup along the rows and along the
/// outputs, and fragments of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Matrix {
    pub(super) edge: u32,
    subgroup: u32,
    down: u32,
    across: u32,
    bands: u32,
    columns: u32,
    /// Inputs that are staged at a time.
    step: u32,
    /// Workgroup memory is of scalars.
    pub(super) scalars: bool,
}

impl Matrix {
    /// Of a device that has none.
    const NONE: Self =
        Self { edge: 0, subgroup: 0, down: 0, across: 0, bands: 0, columns: 0, step: 0, scalars: false };

    /// The most rows that there are, and that registers and workgroup memory take.
    fn of(rows: u32, far: bool, by_outputs: bool, caps: &Caps) -> Self {
        let units = caps.matrix.as_ref().filter(|_| LinearKernel::Matrix.lacks(caps).is_none());
        let Some(&MatrixUnits { edge, subgroup, scalars, .. }) = units else {
            return Self::NONE;
        };
        let sized = |bands| Self { edge, subgroup, down: 2, across: 2, bands, columns: 2, step: 32, scalars };
        let suits = |matrix: &Self| {
            matrix.registers(far) <= MOST_REGISTERS
                && matrix.workgroup_bytes(by_outputs) <= caps.max_workgroup_bytes
        };
        let wanted = rows.div_ceil(2 * edge).next_power_of_two();
        [4, 2].map(sized).into_iter().find(|m| m.bands <= wanted && suits(m)).unwrap_or(sized(1))
    }

    fn subgroups(self) -> u32 {
        self.down * self.across
    }

    fn rows(self) -> u32 {
        self.down * self.bands * self.edge
    }

    fn outputs(self) -> u32 {
        self.across * self.columns * self.edge
    }

    /// Sums of two levels or three, and what is multiplied.
    fn registers(self, far: bool) -> u32 {
        let of_a_fragment = (self.edge * self.edge).div_ceil(self.subgroup.max(1));
        let sums = self.bands * self.columns * (2 + u32::from(far));
        of_a_fragment * (sums + (self.bands + 1).div_ceil(2))
    }

    /// Tiles of x and W as f16 and a fragment of y for each subgroup as f32, rows skewed by 16 bytes.
    fn workgroup_bytes(self, by_outputs: bool) -> u32 {
        let (edge, step) = (self.edge, self.step);
        let w = if by_outputs { step * (self.outputs() + 8) } else { self.outputs() * (step + 8) };
        2 * (self.rows() * (step + 8) + w) + 4 * self.subgroups() * edge * (edge + 4)
    }
}

impl Sizes {
    /// Of a kernel for so many rows of x; `far` and `by_outputs` are of [`Linear`](super::kernel::Linear).
    pub(super) fn of(
        kernel: LinearKernel,
        rows: u32,
        [x, w]: [Io; 2],
        by_outputs: bool,
        far: bool,
        caps: &Caps,
    ) -> Self {
        let few = |subgroup: bool| {
            // The wider the vectors of neighbours the better the reads of W.
            let (quads, lanes) = if by_outputs { (8, 16) } else { (2, FEW_THREADS / 2) };
            let share = subgroup.then(|| {
                let least = caps.subgroup.map_or(LEAST_SUBGROUP, |(least, _)| least);
                let apart = if by_outputs { quads } else { 1 };
                (least / apart).clamp(1, lanes)
            });
            Self::Few { rows: rows.next_power_of_two().min(FEW_ROWS as u32), quads, lanes, share }
        };
        match kernel {
            // No more rows than there are.
            LinearKernel::Tile => Self::Tile { rows: rows.div_ceil(SIDE_Y).next_power_of_two().min(8) },
            LinearKernel::Matrix => Self::Matrix(Matrix::of(rows, far, by_outputs, caps)),
            LinearKernel::Few => few(false),
            LinearKernel::FewSubgroup => few(true),
            LinearKernel::Direct => direct(rows, x, w, by_outputs),
        }
    }

    pub(super) fn kernel(self) -> LinearKernel {
        match self {
            Self::Tile { .. } => LinearKernel::Tile,
            Self::Matrix(_) => LinearKernel::Matrix,
            Self::Few { share: None, .. } => LinearKernel::Few,
            Self::Few { share: Some(_), .. } => LinearKernel::FewSubgroup,
            Self::Direct { .. } => LinearKernel::Direct,
        }
    }

    /// Rows and quads of outputs of a workgroup.
    pub(super) fn tile(self) -> [u32; 2] {
        match self {
            Self::Tile { rows } => [SIDE_Y * rows, SIDE_X],
            Self::Few { rows, quads, .. } => [rows, quads],
            Self::Matrix(matrix) => [matrix.rows().max(1), (matrix.outputs() / 4).max(1)],
            Self::Direct { rows, quads, over_rows: true } => [LANES * rows, quads],
            Self::Direct { rows, quads, over_rows: false } => [rows, LANES * quads],
        }
    }

    /// Threads of a workgroup.
    pub(super) fn threads(self) -> u32 {
        match self {
            Self::Tile { .. } => SIDE_X * SIDE_Y,
            Self::Few { quads, lanes, .. } => quads * lanes,
            Self::Matrix(matrix) => matrix.subgroup * matrix.subgroups(),
            Self::Direct { .. } => LANES,
        }
    }

    /// Bytes of workgroup memory.
    pub(super) fn workgroup_bytes(self, by_outputs: bool) -> u32 {
        match self {
            Self::Tile { rows } => {
                let w = if by_outputs { 4 * SIDE_X * STEP } else { 4 * SIDE_X * (STEP + 1) };
                16 * (SIDE_Y * rows * (STEP + 1) + w)
            }
            Self::Few { rows, quads, lanes, share } => 16 * rows * quads * lanes / share.unwrap_or(1),
            Self::Matrix(matrix) => matrix.workgroup_bytes(by_outputs),
            Self::Direct { .. } => 0,
        }
    }

    /// What the kernel calls its sizes.
    pub(super) fn constants(self, by_outputs: bool, far: bool) -> Vec<(&'static str, u32)> {
        // A level is some steps of a thread.
        let levels =
            |step: u32| [("LEVEL", (LEVEL / step).max(1)), ("FAR_LEVELS", FAR / LEVEL), ("FAR", far.into())];
        let [tile_rows, tile_quads] = self.tile();
        let tile = [("TILE_ROWS", tile_rows), ("TILE_QUADS", tile_quads)];
        match self {
            Self::Tile { rows } => {
                let own = [("SIDE_X", SIDE_X), ("SIDE_Y", SIDE_Y), ("STEP", STEP), ("ROWS", rows)];
                [&own[..], &tile, &levels(4 * STEP)].concat()
            }
            Self::Few { rows, quads, lanes, share } => {
                let own = [
                    ("ROWS", rows),
                    ("QUADS", quads),
                    ("LANES", lanes),
                    ("THREADS", quads * lanes),
                    ("SHARE", share.unwrap_or(1)),
                    ("NEXT", if by_outputs { quads } else { 1 }),
                ];
                [&own[..], &tile, &levels(4)].concat()
            }
            Self::Matrix(m) => {
                let own = [
                    ("EDGE", m.edge),
                    ("THREADS", m.subgroup * m.subgroups()),
                    ("DOWN", m.down),
                    ("ACROSS", m.across),
                    ("BANDS", m.bands),
                    ("COLUMNS", m.columns),
                    ("STEP", m.step),
                    ("CELL", if m.scalars { 4 } else { 1 }),
                ];
                [&own[..], &tile, &levels(1)].concat()
            }
            Self::Direct { rows, quads, over_rows } => {
                let own = [
                    ("LANES", LANES),
                    ("ROWS", rows),
                    ("QUADS", quads),
                    ("LANE_ROWS", if over_rows { rows } else { 0 }),
                    ("LANE_QUADS", if over_rows { 0 } else { quads }),
                ];
                [&own[..], &tile, &levels(1)].concat()
            }
        }
    }
}

/// The direct kernel's sizes. Each row or quad that differs from thread to thread is gathered, lane by lane,
/// which costs as much as some 100 products; the more of the other kind use it the better, until the text
/// leaves a processor's instruction cache (some 1000 products) or its compiler's patience. Found by trial on
/// lavapipe 26.1.
pub(super) fn direct(rows: u32, x: Io, w: Io, by_outputs: bool) -> Sizes {
    let over_rows = |rows, quads| Sizes::Direct { rows, quads, over_rows: true };
    let over_quads = |rows, quads| Sizes::Direct { rows, quads, over_rows: false };
    let vec4 = x.vec4 && w.vec4;
    match rows {
        // Elements that are loaded one by one are text as well, and so is what unpacks them.
        1..=16 if !vec4 => over_quads(rows.next_power_of_two().min(8), 1),
        1..=16 => over_quads(rows.next_power_of_two(), 2),
        _ if !vec4 => over_rows(4, 4),
        // Where W has to be transposed in registers, more rows share that.
        MANY_ROWS.. if [x.dtype, w.dtype] == [Dtype::F32; 2] && !by_outputs => over_rows(8, 8),
        _ => over_rows(4, 8),
    }
}

/// What a device lacks for the kernel that shares sums in subgroups.
pub(crate) fn lacks_subgroups(caps: &Caps) -> Option<String> {
    caps.subgroups_unfit(LEAST_SUBGROUP, FEW_THREADS)
}
