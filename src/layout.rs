//! Where a four-dimensional operand's elements lie.

/// Offset and strides of an operand, all in **elements**.
///
/// The four dimensions are batch, head, sequence and the innermost one (`head_dim`; for a bias or
/// mask: batch, head, query, key). A stride of 0 repeats an input along that dimension, so that
/// broadcasting, `[B, H, S, D]`, `[B, S, H, D]` and packed QKV are all the same code.
///
/// ```
/// use wgpu_attention::Layout;
/// // One packed [batch, seq, 3, heads, dim] projection: q, k and v are three offsets into it.
/// let (seq, heads, dim) = (16, 4, 32);
/// let q = Layout { offset: 0, strides: [seq * 3 * heads * dim, dim, 3 * heads * dim, 1] };
/// let k = q.at(heads * dim);
/// assert_eq!(k.index([0, 1, 2, 3]), heads * dim + dim + 2 * 3 * heads * dim + 3);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    /// Index of element `[0, 0, 0, 0]`.
    pub offset: usize,
    /// Step from one element to the next along each dimension.
    pub strides: [usize; 4],
}

impl Layout {
    /// Contiguous `[batch, heads, seq, dim]`: PyTorch's and ONNX's order.
    pub const fn bhsd(heads: usize, seq: usize, dim: usize) -> Self {
        let row = seq.saturating_mul(dim);
        Self { offset: 0, strides: [heads.saturating_mul(row), row, dim, 1] }
    }

    /// Contiguous `[batch, seq, heads, dim]`: what a projection writes, FlashAttention's order.
    pub const fn bshd(heads: usize, seq: usize, dim: usize) -> Self {
        let token = heads.saturating_mul(dim);
        Self { offset: 0, strides: [seq.saturating_mul(token), dim, token, 1] }
    }

    /// Contiguous storage of `dims`, repeated along every dimension whose size is 1.
    pub const fn broadcast(dims: [usize; 4]) -> Self {
        let mut strides = [0; 4];
        let mut step: usize = 1;
        let mut i = 4;
        while i > 0 {
            i -= 1;
            if dims[i] != 1 {
                strides[i] = step;
            }
            step = step.saturating_mul(dims[i]);
        }
        Self { offset: 0, strides }
    }

    /// The same strides from another first element.
    pub const fn at(self, offset: usize) -> Self {
        Self { offset, strides: self.strides }
    }

    /// The index of one element.
    pub const fn index(&self, at: [usize; 4]) -> usize {
        let s = &self.strides;
        self.offset + at[0] * s[0] + at[1] * s[1] + at[2] * s[2] + at[3] * s[3]
    }

    /// One past the largest index of `shape`, in elements from the container's start; 0 when the
    /// shape is empty. Wide enough never to overflow.
    pub fn extent(&self, shape: [usize; 4]) -> u128 {
        if shape.contains(&0) {
            return 0;
        }
        shape.iter().zip(self.strides).fold(self.offset as u128 + 1, |sum, (&n, stride)| {
            sum.saturating_add((n as u128 - 1) * stride as u128)
        })
    }

    /// Whether no two elements of `shape` share a place (a sufficient test: each dimension steps
    /// over all that the finer ones span, which every layout made by nesting fulfils).
    pub(crate) fn is_injective(&self, shape: [usize; 4]) -> bool {
        if shape.contains(&0) {
            return true;
        }
        let mut dims: Vec<(u128, u128)> =
            (0..4).filter(|&i| shape[i] > 1).map(|i| (self.strides[i] as u128, shape[i] as u128)).collect();
        dims.sort_unstable();
        let mut span = 0;
        dims.into_iter().all(|(stride, n)| {
            let fits = stride > span;
            span = span.saturating_add(stride * (n - 1));
            fits
        })
    }

    /// Whether every group of four neighbours along the innermost dimension is contiguous and
    /// starts at a multiple of four elements, so that a kernel may read it as one vector.
    pub(crate) fn is_vec4(&self, dim: usize) -> bool {
        self.is_vec(4, dim)
    }

    /// The same of every group of `n` neighbours.
    pub(crate) fn is_vec(&self, n: usize, dim: usize) -> bool {
        let [b, h, s, d] = self.strides;
        d == 1 && [dim, self.offset, b, h, s].iter().all(|x| x.is_multiple_of(n))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_want_every_step_to_be_theirs() {
        let layout = Layout::bhsd(2, 3, 24);
        assert!(layout.is_vec(8, 24) && layout.at(16).is_vec(8, 24));
        assert!(layout.at(4).is_vec4(24) && !layout.at(4).is_vec(8, 24));
        assert!(!Layout::bhsd(2, 3, 12).is_vec(8, 12) && !layout.is_vec(8, 20));
    }

    #[test]
    fn extents_and_broadcasts() {
        assert_eq!(Layout::bhsd(2, 3, 4).extent([2, 2, 3, 4]), 48);
        assert_eq!(Layout::bshd(2, 3, 4).at(5).extent([2, 2, 3, 4]), 53);
        assert_eq!(Layout::broadcast([1, 2, 1, 5]).strides, [0, 5, 0, 1]);
        assert_eq!(Layout::bhsd(2, 3, 4).extent([0, 2, 3, 4]), 0);
        let huge = Layout { offset: usize::MAX, strides: [usize::MAX; 4] };
        assert!(huge.extent([usize::MAX; 4]) > u64::MAX as u128);
    }

    #[test]
    fn injectivity() {
        assert!(Layout::bshd(2, 3, 4).is_injective([2, 2, 3, 4]));
        assert!(!Layout::broadcast([1, 2, 3, 4]).is_injective([2, 2, 3, 4]));
        assert!(!Layout { offset: 0, strides: [24, 12, 3, 1] }.is_injective([2, 2, 3, 4]));
        // A dimension of one element may have any stride.
        assert!(Layout { offset: 0, strides: [0, 0, 4, 1] }.is_injective([1, 1, 3, 4]));
    }
}
