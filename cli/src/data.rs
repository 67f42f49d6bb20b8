//! Operands that this program owns: read from a file or made up.

use wgpu_attention::{AttentionProblem, Inputs, Operand, Similarity, Tensor};

use crate::prng::Prng;

/// The inputs of one call.
#[derive(Clone, Debug)]
pub(crate) struct Data {
    pub(crate) q: Tensor,
    pub(crate) k: Tensor,
    pub(crate) v: Tensor,
    pub(crate) w: Option<Vec<f32>>,
    pub(crate) bias: Option<Tensor>,
    pub(crate) mask: Option<Vec<u8>>,
    pub(crate) alibi_slopes: Option<Vec<f32>>,
    pub(crate) sinks: Option<Vec<f32>>,
    pub(crate) kv_lens: Option<Vec<u32>>,
}

impl Data {
    /// The library's view.
    pub(crate) fn inputs(&self) -> Inputs<'_> {
        Inputs {
            w: self.w.as_deref(),
            bias: self.bias.as_ref().map(Tensor::as_ref),
            mask: self.mask.as_deref(),
            alibi_slopes: self.alibi_slopes.as_deref(),
            sinks: self.sinks.as_deref(),
            kv_lens: self.kv_lens.as_deref(),
            ..Inputs::new(self.q.as_ref(), self.k.as_ref(), self.v.as_ref())
        }
    }

    /// Made-up values for every operand that `problem` has, the same for the same generator.
    pub(crate) fn random(problem: &AttentionProblem, prng: &mut Prng) -> Self {
        let p = problem;
        let extent = |operand| p.extent(operand) as usize;
        let normals =
            |n: usize, scale: f32, prng: &mut Prng| (0..n).map(|_| scale * prng.normal()).collect::<Vec<_>>();
        // Widths of q at which scores have the spread that trained models have.
        let w_scale = match p.similarity {
            Similarity::Bilinear { query_dim, .. } => 1.0 / ((query_dim * p.head_dim) as f32).sqrt(),
            _ => 1.0,
        };
        let q_scale = if p.similarity == Similarity::Dot { 1.0 / (p.head_dim as f32).sqrt() } else { 1.0 };
        let q = Tensor::from_f32(p.dtype, &normals(extent(Operand::Q), q_scale, prng));
        let k = Tensor::from_f32(p.dtype, &normals(extent(Operand::K), 1.0, prng));
        let v = Tensor::from_f32(p.dtype, &normals(extent(Operand::V), 1.0, prng));
        let has_w = matches!(p.similarity, Similarity::Bilinear { .. });
        let w = has_w.then(|| normals(extent(Operand::W), w_scale, prng));
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
        Self { q, k, v, w, bias, mask, alibi_slopes, sinks, kv_lens }
    }
}
