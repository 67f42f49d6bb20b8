//! Operands that this program owns: read from a file or made up.

use wgpu_attention::{AttentionProblem, Cache, Inputs, Operand, Similarity, Tensor, quantize, row_elements};

use crate::prng::Prng;

/// The inputs of one call.
#[derive(Clone, Debug)]
pub(crate) struct Data {
    pub(crate) q: Tensor,
    pub(crate) k: Tensor,
    pub(crate) v: Tensor,
    pub(crate) w: Option<Vec<f32>>,
    pub(crate) wq: Option<Vec<f32>>,
    pub(crate) wk: Option<Vec<f32>>,
    pub(crate) score_v: Option<Vec<f32>>,
    pub(crate) bias: Option<Tensor>,
    pub(crate) mask: Option<Vec<u8>>,
    pub(crate) alibi_slopes: Option<Vec<f32>>,
    pub(crate) sinks: Option<Vec<f32>>,
    pub(crate) kv_lens: Option<Vec<u32>>,
    pub(crate) block_table: Option<Vec<u32>>,
    pub(crate) cu_seqlens_q: Option<Vec<u32>>,
    pub(crate) cu_seqlens_k: Option<Vec<u32>>,
}

impl Data {
    /// The library's view.
    pub(crate) fn inputs(&self) -> Inputs<'_> {
        Inputs {
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
            ..Inputs::new(self.q.as_ref(), self.k.as_ref(), self.v.as_ref())
        }
    }

    /// Made-up values for every operand that `problem` has, the same for the same generator. Nothing of it is
    /// ragged, no page is shared, and k and v have no gaps if they are quantised.
    pub(crate) fn random(problem: &AttentionProblem, prng: &mut Prng) -> Self {
        let p = problem;
        let extent = |operand| p.extent(operand) as usize;
        let normals =
            |n: usize, scale: f32, prng: &mut Prng| (0..n).map(|_| scale * prng.normal()).collect::<Vec<_>>();
        // Here and below: widths at which scores have the spread that trained models have.
        let q_scale = if p.similarity == Similarity::Dot { 1.0 / (p.head_dim as f32).sqrt() } else { 1.0 };
        let q = Tensor::from_f32(p.dtype, &normals(extent(Operand::Q), q_scale, prng));
        let rows = |operand: Operand, dim: usize, prng: &mut Prng| {
            let row = row_elements(p.stored_kv(), dim);
            let count = if p.stored_kv().is_float() { extent(operand) } else { extent(operand) / row * dim };
            quantize(p.stored_kv(), &normals(count, 1.0, prng), dim)
        };
        let k = rows(Operand::K, p.head_dim, prng);
        let v = rows(Operand::V, p.head_dim_v, prng);
        let root = |width: usize| 1.0 / (width as f32).sqrt();
        let (mut w, mut wq, mut wk, mut score_v) = (None, None, None, None);
        match p.similarity {
            Similarity::Bilinear { query_dim, .. } => {
                w = Some(normals(extent(Operand::W), root(query_dim * p.head_dim), prng));
            }
            Similarity::Additive { query_dim, hidden, .. } => {
                wq = Some(normals(extent(Operand::Wq), root(query_dim), prng));
                wk = Some(normals(extent(Operand::Wk), root(p.head_dim), prng));
                score_v = Some(normals(extent(Operand::ScoreV), 2.0 * root(hidden), prng));
            }
            _ => {}
        }
        let bias =
            p.bias.map(|bias| Tensor::from_f32(bias.dtype, &normals(extent(Operand::Bias), 1.0, prng)));
        let mask =
            p.mask.map(|_| (0..extent(Operand::Mask)).map(|_| u8::from(!prng.one_in(8))).collect::<Vec<_>>());
        // The geometric slopes of the ALiBi paper.
        let alibi_slopes = p
            .alibi
            .then(|| (0..p.heads_q).map(|h| (-8.0 * (h + 1) as f32 / p.heads_q as f32).exp2()).collect());
        let sinks = p.sinks.then(|| normals(p.heads_q, 1.0, prng));
        let kv_lens = p.kv_lens.then(|| {
            let half = p.seq_kv / 2;
            (0..p.batch).map(|_| (half + prng.below(p.seq_kv - half + 1)) as u32).collect()
        });
        // Pages as they are after a while of serving: of no order.
        let block_table = if let Cache::Paged { pages, max_blocks, .. } = p.cache {
            let mut free: Vec<u32> = (0..pages as u32).collect();
            Some((0..p.batch * max_blocks).map(|_| free.swap_remove(prng.below(free.len()))).collect())
        } else {
            None
        };
        let (cu_seqlens_q, cu_seqlens_k) = (None, None);
        Self {
            q,
            k,
            v,
            w,
            wq,
            wk,
            score_v,
            bias,
            mask,
            alibi_slopes,
            sinks,
            kv_lens,
            block_table,
            cu_seqlens_q,
            cu_seqlens_k,
        }
    }
}
