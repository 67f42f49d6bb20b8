//! Linear maps: the projections around attention. Here is what one is; `kernel` has the shaders, of `sizes`
//! and with `params`, `encode` the way to them, and `oracle` what both are held to.

mod encode;
pub(crate) mod kernel;
pub(crate) mod oracle;
pub(crate) mod params;
mod sizes;

pub use encode::LinearOperands;
pub use oracle::LinearInputs;

use crate::caps::Caps;
use crate::dtype::Dtype;
use crate::error::{Error, Operand, Result};
use crate::fused_matrix;
use crate::layout::Layout;
use crate::problem::{Bias, MAX_SEQ, whole_words};

/// Most inputs. A thread takes them four at a time, and lavapipe cuts it off after 65535 iterations, nested
/// loops together.
pub(crate) const MOST_INPUTS: usize = 1 << 17;

/// Most rows that the kernel for few of them takes on.
const FEW_ROWS: usize = 8;

/// How a linear map is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum LinearKernel {
    /// By tiles through workgroup memory: for GPUs.
    Tile,
    /// By products of cooperative matrices, f16 x and W alone: for GPUs with matrix units. See
    /// [`Attention::self_test`](crate::Attention::self_test).
    Matrix,
    /// With the inputs split over the threads: for few rows on a GPU, where reading W is all the work.
    Few,
    /// The same with subgroup operations in the place of most of the workgroup memory.
    FewSubgroup,
    /// Straight from storage, without workgroup memory: for adapters on a CPU.
    Direct,
}

impl LinearKernel {
    /// Every kernel.
    pub const ALL: &'static [Self] = &[Self::Tile, Self::Matrix, Self::Few, Self::FewSubgroup, Self::Direct];

    const fn name(self) -> &'static str {
        match self {
            Self::Tile => "linear_tile",
            Self::Matrix => "linear_matrix",
            Self::Few => "linear_few",
            Self::FewSubgroup => "linear_few_subgroup",
            Self::Direct => "linear_direct",
        }
    }

    /// What a device lacks for this kernel whatever the problem; `None` where it lacks nothing.
    ///
    /// ```
    /// use wgpu_attention::{Caps, LinearKernel};
    /// let least = Caps::minimal();
    /// assert!(LinearKernel::Tile.lacks(&least).is_none() && LinearKernel::Matrix.lacks(&least).is_some());
    /// ```
    pub fn lacks(self, caps: &Caps) -> Option<String> {
        match self {
            Self::Matrix => fused_matrix::lacks(caps),
            Self::FewSubgroup => sizes::lacks_subgroups(caps),
            Self::Tile | Self::Few | Self::Direct => None,
        }
    }
}

impl std::fmt::Display for LinearKernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl Layout {
    /// A matrix whose rows are contiguous and begin `stride` elements apart, for [`LinearProblem`].
    pub const fn rows(stride: usize) -> Self {
        Self { offset: 0, strides: [0, 0, stride, 1] }
    }

    /// A matrix whose columns are contiguous and begin `stride` elements apart: the transposed of
    /// [`Layout::rows`].
    pub const fn columns(stride: usize) -> Self {
        Self { offset: 0, strides: [0, 0, 1, stride] }
    }
}

/// One linear map `y = x W^T + b`: sizes, element types and layouts, but no data.
///
/// x is `[rows, inputs]`, W `[outputs, inputs]` (as PyTorch stores it) and y `[rows, outputs]`. All are
/// matrices: the last two strides of their [`Layout`]s, any at all. So the transposed W is another layout,
/// and a projection may write into its slice of wider rows:
///
/// ```
/// use wgpu_attention::{AttentionProblem, Layout, LinearProblem};
///
/// // 128 tokens of width 1024; 16 query heads and 4 key-value heads of width 64.
/// let (tokens, width, heads_q, heads_kv, dim) = (128, 1024, 16, 4, 64);
/// // q, k and v of a token lie side by side.
/// let packed = (heads_q + 2 * heads_kv) * dim;
/// let slice = |outputs, offset| LinearProblem {
///     y: Layout::rows(packed).at(offset),
///     ..LinearProblem::new(tokens, width, outputs)
/// };
/// let to_q = slice(heads_q * dim, 0);
/// let to_k = slice(heads_kv * dim, heads_q * dim);
/// assert!(to_q.validate().and(to_k.validate()).is_ok());
///
/// // What they write is what attention reads.
/// let heads = |offset| Layout { offset, strides: [tokens * packed, dim, packed, 1] };
/// let attention = AttentionProblem {
///     q: heads(0),
///     k: heads(heads_q * dim),
///     v: heads((heads_q + heads_kv) * dim),
///     ..AttentionProblem::new(1, heads_q, heads_kv, tokens, tokens, dim, dim)
/// };
/// assert!(attention.validate().is_ok());
/// ```
///
/// Sums are f32 whatever the storage, in levels, so that errors do not grow with the inputs: an f32 y is held to
/// `8 * 2^-24 * (sum |x| |w| + |b|)` for up to 2^17 inputs, also where all products have one sign. A NaN or infinity in a row of x reaches that row of y and no other, one in a row
/// of W that column.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LinearProblem {
    /// Rows of x and y: tokens.
    pub rows: usize,
    /// Width of x.
    pub inputs: usize,
    /// Width of y.
    pub outputs: usize,
    /// Storage of x.
    pub dtype: Dtype,
    /// Storage of W.
    pub weight_dtype: Dtype,
    /// Storage of y.
    pub out_dtype: Dtype,
    /// Where x's elements lie.
    pub x: Layout,
    /// Where W's elements lie: [`Layout::rows`]`(inputs)` for `[outputs, inputs]`,
    /// [`Layout::columns`]`(outputs)` for `[inputs, outputs]`.
    pub w: Layout,
    /// Where y's elements lie. No stride of 0.
    pub y: Layout,
    /// What is added, `[rows, outputs]`: a row stride of 0 makes it a bias ([`LinearProblem::with_bias`]),
    /// another one a residual.
    pub bias: Option<Bias>,
    /// Forces a kernel; `None` takes [the device's](Self::kernel_on).
    pub kernel: Option<LinearKernel>,
}

impl LinearProblem {
    /// A contiguous f32 `x [rows, inputs]` by a contiguous `W [outputs, inputs]`, without a bias.
    pub const fn new(rows: usize, inputs: usize, outputs: usize) -> Self {
        Self {
            rows,
            inputs,
            outputs,
            dtype: Dtype::F32,
            weight_dtype: Dtype::F32,
            out_dtype: Dtype::F32,
            x: Layout::rows(inputs),
            w: Layout::rows(inputs),
            y: Layout::rows(outputs),
            bias: None,
            kernel: None,
        }
    }

    /// The same with x, W and y of one element type.
    #[must_use]
    pub const fn with_dtype(mut self, dtype: Dtype) -> Self {
        (self.dtype, self.weight_dtype, self.out_dtype) = (dtype, dtype, dtype);
        self
    }

    /// The same with a bias `[outputs]`, added to every row.
    #[must_use]
    pub const fn with_bias(mut self, dtype: Dtype) -> Self {
        self.bias = Some(Bias { dtype, layout: Layout::rows(0) });
        self
    }

    /// The same with W stored as a contiguous `[inputs, outputs]`.
    #[must_use]
    pub const fn with_transposed_weights(mut self) -> Self {
        self.w = Layout::columns(self.outputs);
        self
    }

    /// The kernel that serves this on a device, where none is forced.
    ///
    /// A GPU shares what it reads between threads, through workgroup memory; where rows are too few for
    /// tiles, it splits the inputs instead, so that there are threads enough to read W with. On a processor
    /// both cost more than they save. Matrix units multiply f16 where a test has found them right.
    pub fn kernel_on(&self, caps: &Caps) -> LinearKernel {
        let wanted: &[LinearKernel] = match self.rows {
            _ if caps.on_cpu() => &[],
            0..=FEW_ROWS => &[LinearKernel::FewSubgroup, LinearKernel::Few],
            _ => &[LinearKernel::Matrix, LinearKernel::Tile],
        };
        let trusted = caps.matrix.as_ref().is_some_and(|matrix| matrix.tested == Some(Ok(())));
        let suits = |kernel: &&LinearKernel| {
            (trusted || **kernel != LinearKernel::Matrix)
                && kernel::Linear::of(self, **kernel, caps).unfit(caps).is_none()
        };
        // Without the threads or the memory for any of them, what needs neither.
        wanted.iter().find(suits).copied().unwrap_or(LinearKernel::Direct)
    }

    /// An operand's matrix, as the last two of four dimensions.
    pub(crate) fn shape(&self, operand: Operand) -> [usize; 4] {
        match operand {
            Operand::X => [1, 1, self.rows, self.inputs],
            Operand::W => [1, 1, self.outputs, self.inputs],
            Operand::Bias | Operand::Y => [1, 1, self.rows, self.outputs],
            _ => [0; 4],
        }
    }

    /// An operand's layout and element type; `None` for those that this problem does not have.
    pub(crate) fn layout(&self, operand: Operand) -> Option<(Layout, Dtype)> {
        match operand {
            Operand::X => Some((self.x, self.dtype)),
            Operand::W => Some((self.w, self.weight_dtype)),
            Operand::Bias => self.bias.map(|bias| (bias.layout, bias.dtype)),
            Operand::Y => Some((self.y, self.out_dtype)),
            _ => None,
        }
    }

    /// Bytes that a buffer for x, w, bias or y needs, or a piece of one: whole words up to its last element. 0 when the
    /// map has no such operand or it is empty; `u64::MAX` where no buffer could be so large.
    pub fn buffer_bytes(&self, operand: Operand) -> u64 {
        let bytes = self.layout(operand).map_or(0, |(_, dtype)| dtype.bytes());
        whole_words(self.extent(operand), bytes)
    }

    /// One past the largest index of an operand's elements; 0 where there are none.
    pub(crate) fn extent(&self, operand: Operand) -> u128 {
        self.layout(operand).map_or(0, |(layout, _)| layout.extent(self.shape(operand)))
    }

    /// Checks all of this by itself.
    ///
    /// # Errors
    /// [`Error::ZeroSize`] (no rows are fine), [`Error::TooLarge`], [`Error::DtypeUnfit`] for quantised
    /// types, and [`Error::Overlaps`].
    pub fn validate(&self) -> Result<()> {
        for (what, size) in [("inputs", self.inputs), ("outputs", self.outputs)] {
            if size == 0 {
                return Err(Error::ZeroSize { what });
            }
        }
        let too_large = |what: String, got, max| Err(Error::TooLarge { what, got, max });
        for (what, size, max) in [
            ("rows", self.rows, MAX_SEQ),
            ("inputs", self.inputs, MOST_INPUTS),
            ("outputs", self.outputs, MAX_SEQ),
        ] {
            if size > max {
                return too_large(what.into(), size as u128, max as u64);
            }
        }
        for operand in OPERANDS {
            let Some((_, dtype)) = self.layout(operand) else { continue };
            if !dtype.is_float() {
                return Err(Error::DtypeUnfit { operand, got: dtype, need: "f32, f16, bf16" });
            }
            // The kernels index elements by u32.
            let extent = self.extent(operand);
            if extent > u128::from(u32::MAX) {
                let what = format!("{operand}'s last element index");
                return too_large(what, extent, u32::MAX.into());
            }
        }
        let (operand, shape) = (Operand::Y, self.shape(Operand::Y));
        if !self.y.is_injective(shape) {
            return Err(Error::Overlaps { operand, shape, strides: self.y.strides });
        }
        Ok(())
    }

    /// Multiplications and additions.
    pub fn flops(&self) -> f64 {
        2.0 * self.rows as f64 * self.inputs as f64 * self.outputs as f64
    }
}

/// The operands, inputs first.
pub(crate) const OPERANDS: [Operand; 4] = [Operand::X, Operand::W, Operand::Bias, Operand::Y];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caps::MatrixUnits;

    #[test]
    fn each_device_its_kernel() {
        let gpu = Caps::minimal();
        let cpu = Caps { device_type: wgpu::DeviceType::Cpu, ..Caps::minimal() };
        let small = Caps { max_invocations: 32, ..Caps::minimal() };
        let subgroups = Caps { subgroup: Some((32, 32)), ..Caps::minimal() };
        let card = |tested| Caps {
            shader_f16: true,
            matrix: Some(MatrixUnits { edge: 16, subgroup: 32, scalars: false, tested }),
            ..subgroups.clone()
        };
        let (trusted, untested) = (card(Some(Ok(()))), card(None));
        for (caps, rows, want) in [
            (&gpu, 1, LinearKernel::Few),
            (&gpu, 8, LinearKernel::Few),
            (&gpu, 9, LinearKernel::Tile),
            (&gpu, 4096, LinearKernel::Tile),
            (&cpu, 1, LinearKernel::Direct),
            (&cpu, 4096, LinearKernel::Direct),
            (&small, 1, LinearKernel::Direct),
            (&small, 64, LinearKernel::Direct),
        ] {
            assert_eq!(LinearProblem::new(rows, 512, 512).kernel_on(caps), want, "{rows}");
        }
        for (caps, dtype, rows, want) in [
            (&subgroups, Dtype::F32, 1, LinearKernel::FewSubgroup),
            (&subgroups, Dtype::F16, 64, LinearKernel::Tile),
            (&untested, Dtype::F16, 64, LinearKernel::Tile),
            (&trusted, Dtype::F16, 64, LinearKernel::Matrix),
            (&trusted, Dtype::F32, 64, LinearKernel::Tile),
            (&trusted, Dtype::F16, 8, LinearKernel::FewSubgroup),
        ] {
            let problem = LinearProblem::new(rows, 512, 512).with_dtype(dtype);
            assert_eq!(problem.kernel_on(caps), want, "{rows} {dtype}");
        }
    }

    #[test]
    fn extents() {
        let p = LinearProblem::new(3, 5, 7).with_bias(Dtype::F32);
        let extents = |p: &LinearProblem| OPERANDS.map(|operand| p.extent(operand));
        assert_eq!(extents(&p), [15, 35, 7, 21]);
        assert_eq!(extents(&p.with_transposed_weights()), [15, 35, 7, 21]);
        let slice = LinearProblem { y: Layout::rows(20).at(4), ..p };
        assert_eq!(slice.extent(Operand::Y), 4 + 2 * 20 + 7);
        assert_eq!(extents(&LinearProblem { rows: 0, ..p }), [0, 35, 0, 0]);
        assert_eq!(p.extent(Operand::Q), 0);
    }
}
