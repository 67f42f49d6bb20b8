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

    /// Whether an element of `shape` lies where one of `other`'s does: `false` is certain, and `true` is said
    /// of strides so tangled that the search would take long, too. Of layouts whose extent has been checked.
    pub(crate) fn meets(&self, shape: [usize; 4], other: &Self, other_shape: [usize; 4]) -> bool {
        if shape.contains(&0) || other_shape.contains(&0) {
            return false;
        }
        // self.offset + sum a_i s_i = other.offset + sum b_j t_j: with n - 1 - b for b, all terms are sums.
        let mut target = other.offset as i128 - self.offset as i128;
        let mut terms: Vec<(i128, i128)> = Vec::new();
        for (turned, layout, shape) in [(false, self, shape), (true, other, other_shape)] {
            for (stride, n) in
                layout.strides.into_iter().zip(shape).filter(|&(stride, n)| stride > 0 && n > 1)
            {
                let (stride, most) = (stride as i128, n as i128 - 1);
                if turned {
                    target += stride * most;
                }
                match terms.iter_mut().find(|term| term.0 == stride) {
                    Some(term) => term.1 += most,
                    None => terms.push((stride, most)),
                }
            }
        }
        terms.sort_unstable_by(|a, b| b.cmp(a));
        sums_to(&terms, target, &mut 10_000)
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

/// Whether `target` is a sum of multiples of strides, each from 0 to its most, the largest stride first. Where every
/// stride spans the smaller ones, few multiples leave what they can reach.
fn sums_to(terms: &[(i128, i128)], target: i128, steps: &mut u32) -> bool {
    let Some((&(stride, most), rest)) = terms.split_first() else { return target == 0 };
    if *steps == 0 {
        return true;
    }
    *steps -= 1;
    let reach: i128 = rest.iter().map(|(stride, most)| stride * most).sum();
    let least = ((target - reach).max(0) + stride - 1) / stride;
    (least..=most.min(target.div_euclid(stride))).any(|n| sums_to(rest, target - n * stride, steps))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_meet_where_an_element_is_both() {
        let pages = Layout { offset: 0, strides: [2 * 96, 8, 24, 1] };
        let shape = [5, 3, 4, 8];
        // [pages, 2, ...]: keys and values by turns. [2, pages, ...]: one after the other.
        assert!(!pages.meets(shape, &pages.at(96), shape) && !pages.at(96).meets(shape, &pages, shape));
        let whole = Layout::bshd(3, 4, 8);
        assert!(
            !whole.meets(shape, &whole.at(5 * 96), shape) && whole.meets(shape, &whole.at(5 * 96 - 1), shape)
        );
        for layout in [pages, whole] {
            for at in [0, 1, 8, 95] {
                assert!(layout.meets(shape, &layout.at(at), shape), "{layout:?} {at}");
            }
        }
        // Rows of other widths in one row; what is between them is nobody's.
        let (k, v) =
            (Layout { offset: 0, strides: [80, 0, 20, 1] }, Layout { offset: 12, strides: [80, 0, 20, 1] });
        assert!(!k.meets([2, 1, 4, 12], &v, [2, 1, 4, 8]) && k.meets([2, 1, 4, 13], &v, [2, 1, 4, 8]));
        assert!(!k.meets([2, 1, 0, 13], &v, [2, 1, 4, 8]));
        // By every pair of elements.
        let mut prng = 1u32;
        let mut draw = |n: u32| {
            prng = prng.wrapping_mul(1664525).wrapping_add(1013904223);
            (prng >> 16) as usize % n as usize
        };
        let mut met = [0, 0];
        for _ in 0..2000 {
            let [(a, s), (b, t)] = [(); 2].map(|()| {
                let layout = Layout { offset: draw(40), strides: [draw(30), draw(12), draw(5), draw(3)] };
                (layout, [1 + draw(2), 1 + draw(3), 1 + draw(3), 1 + draw(4)])
            });
            let all = |layout: Layout, [b, h, s, d]: [usize; 4]| -> std::collections::HashSet<usize> {
                (0..b * h * s * d)
                    .map(|i| layout.index([i / d / s / h, i / d / s % h, i / d % s, i % d]))
                    .collect()
            };
            let want = !all(a, s).is_disjoint(&all(b, t));
            assert_eq!(a.meets(s, &b, t), want, "{a:?} {s:?} {b:?} {t:?}");
            met[usize::from(want)] += 1;
        }
        assert!(met[0] > 100 && met[1] > 100, "{met:?}");
    }

    #[test]
    fn tangled_strides_end_in_time() {
        let huge = Layout { offset: 1, strides: [usize::MAX >> 8, 6, 10, 15] };
        let shape = [100, 1 << 30, 1 << 30, 1 << 30];
        assert!(huge.meets(shape, &huge.at(0), shape));
    }

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
