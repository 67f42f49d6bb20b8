//! The uniform block that every kernel reads. `shaders/params.wgsl` is the twin.

use crate::cache::Cache;
use crate::layout::Layout;
use crate::mask::Align;
use crate::problem::{AttentionProblem, MAX_SEQ};

/// Runtime parameters; see the WGSL twin for what each means.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Params {
    pub(crate) batch: u32,
    pub(crate) heads_q: u32,
    pub(crate) group_size: u32,
    pub(crate) seq_q: u32,
    pub(crate) seq_kv: u32,
    pub(crate) head_dim: u32,
    pub(crate) head_dim_v: u32,
    pub(crate) query_dim: u32,
    pub(crate) head_first: u32,
    pub(crate) head_count: u32,
    pub(crate) row_first: u32,
    pub(crate) row_count: u32,
    pub(crate) score_stride: u32,
    pub(crate) projected_stride: u32,
    pub(crate) key_term_group: u32,
    pub(crate) key_first: u32,
    pub(crate) key_end: u32,
    pub(crate) splits: u32,
    pub(crate) split_step: u32,
    pub(crate) split_least: u32,
    pub(crate) split_tiles: u32,
    pub(crate) most_groups: u32,
    pub(crate) total_q: u32,
    pub(crate) total_kv: u32,
    pub(crate) pages: u32,
    pub(crate) max_blocks: u32,
    pub(crate) scale: f32,
    pub(crate) softcap: f32,
    pub(crate) norm_epsilon: f32,
    pub(crate) hidden: u32,
    pub(crate) w_head_stride: u32,
    pub(crate) wk_head_stride: u32,
    pub(crate) score_v_head_stride: u32,
    pub(crate) causal: u32,
    pub(crate) align: u32,
    pub(crate) window_left: i32,
    pub(crate) window_right: i32,
    pub(crate) q: ParamLayout,
    pub(crate) k: ParamLayout,
    pub(crate) v: ParamLayout,
    pub(crate) o: ParamLayout,
    pub(crate) bias: ParamLayout,
    pub(crate) mask: ParamLayout,
    pub(crate) dout: ParamLayout,
    pub(crate) grad: ParamLayout,
}

impl Params {
    /// What a problem says; chunks, scratch and layouts are left to the caller.
    pub(crate) fn of(p: &AttentionProblem) -> Self {
        // Beyond both lengths a window bounds nothing, and positions stay far inside an i32.
        let side = |side: Option<usize>| side.map_or(2 * MAX_SEQ, |n| n.min(2 * MAX_SEQ)) as i32;
        let window = p.window.unwrap_or_default();
        let of_head = |elements: usize| if p.has_own_matrices() { elements as u32 } else { 0 };
        let [pages, max_blocks, total_kv] = match p.cache {
            Cache::Paged { pages, max_blocks, .. } => [pages, max_blocks, 0],
            Cache::Ragged { total } => [0, 0, total],
            _ => [0; 3],
        };
        Self {
            batch: p.batch as u32,
            heads_q: p.heads_q as u32,
            group_size: p.group_size() as u32,
            seq_q: p.seq_q as u32,
            seq_kv: p.seq_kv as u32,
            head_dim: p.head_dim as u32,
            head_dim_v: p.head_dim_v as u32,
            query_dim: p.query_dim() as u32,
            key_term_group: p.key_term_group() as u32,
            total_q: p.total_q.unwrap_or(0) as u32,
            total_kv: total_kv as u32,
            pages: pages as u32,
            max_blocks: max_blocks as u32,
            scale: p.effective_scale() as f32,
            softcap: p.softcap.unwrap_or(1.0),
            hidden: p.compared_dim() as u32,
            w_head_stride: of_head(p.query_dim() * p.compared_dim()),
            wk_head_stride: of_head(p.compared_dim() * p.head_dim),
            score_v_head_stride: of_head(p.compared_dim()),
            causal: u32::from(p.causal.is_some()),
            align: match p.positions_align() {
                Align::TopLeft => 1,
                Align::BottomRight => 2,
            },
            window_left: side(window.left),
            window_right: if p.causal.is_some() { 0 } else { side(window.right) },
            ..Self::default()
        }
    }
}

/// A [`Layout`] relative to the start of its binding.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct ParamLayout {
    pub(crate) offset: u32,
    pub(crate) stride_b: u32,
    pub(crate) stride_h: u32,
    pub(crate) stride_s: u32,
    pub(crate) stride_d: u32,
}

impl ParamLayout {
    /// `layout` as seen by a binding that starts `first` elements into the buffer. A stride that no
    /// index multiplies (its dimension has at most one element) may be too wide for a u32: it
    /// becomes 0.
    pub(crate) fn new(layout: Layout, shape: [usize; 4], first: usize) -> Self {
        let stride = |i: usize| if shape[i] > 1 { layout.strides[i] as u32 } else { 0 };
        Self {
            offset: (layout.offset - first) as u32,
            stride_b: stride(0),
            stride_h: stride(1),
            stride_s: stride(2),
            stride_d: stride(3),
        }
    }
}

/// What tests hold a uniform block to its WGSL twin by.
#[cfg(test)]
pub(crate) mod twin {
    use super::ParamLayout;

    /// The members of the WGSL's `Params`, and which word each is; there are as many bytes as in `T`.
    pub(crate) fn members<T>(wgsl: &str) -> Vec<(String, u32)> {
        let module = naga::front::wgsl::parse_str(wgsl).unwrap();
        let (_, ty) = module.types.iter().find(|(_, ty)| ty.name.as_deref() == Some("Params")).unwrap();
        let naga::TypeInner::Struct { members, span } = &ty.inner else { panic!("not a struct") };
        assert_eq!(*span as usize, size_of::<T>());
        assert!(members.iter().all(|member| member.offset % 4 == 0));
        members.iter().map(|member| (member.name.clone().unwrap(), member.offset / 4)).collect()
    }

    /// A block each word of which says its own number: what a WGSL member reads is where it lies.
    pub(crate) fn numbered<T: bytemuck::Pod>() -> T {
        let words: Vec<u32> = (0..size_of::<T>() as u32 / 4).collect();
        *bytemuck::from_bytes(bytemuck::cast_slice(&words))
    }

    /// The members of a layout.
    pub(crate) fn layout(name: &str, l: ParamLayout) -> Vec<(String, u32)> {
        [("offset", l.offset), ("stride_b", l.stride_b), ("stride_h", l.stride_h)]
            .into_iter()
            .chain([("stride_s", l.stride_s), ("stride_d", l.stride_d)])
            .map(|(field, at)| (format!("{name}_{field}"), at))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wgsl_twin_has_the_same_members_in_the_same_places() {
        let members = twin::members::<Params>(include_str!("../shaders/params.wgsl"));
        // Debug prints the Rust fields in order of declaration, and repr(C) keeps that order.
        let printed = format!("{:?}", Params::default());
        let mut names = Vec::new();
        let mut prefix = String::new();
        for word in printed.split(['{', ',', '}']).map(str::trim) {
            if let Some(owner) = word.strip_suffix(": ParamLayout") {
                prefix = format!("{owner}_");
            } else if let Some((name, _)) = word.split_once(':') {
                names.push(format!("{prefix}{name}"));
            }
        }
        assert_eq!(names.into_iter().zip(0..).collect::<Vec<_>>(), members);
    }
}
