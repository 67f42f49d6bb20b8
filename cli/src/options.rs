//! The contract's options as flags, shared by every command that takes a problem.

use std::fmt;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use wgpu_attention::{Align, AttentionProblem, Cache, Dtype, Similarity, Window};

use crate::data::Data;
use crate::failure::{Failure, Result};
use crate::prng::Prng;

/// How a query and a key are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SimilarityArg {
    /// q . k
    Dot,
    /// scale * (q . k), scale 1/sqrt(D) unless given
    ScaledDot,
    /// qT W k
    Bilinear,
    /// scale * (q . k) / (|q| |k|), scale 1 unless given
    Cosine,
    /// scale * vT tanh(Wq q + Wk k), scale 1 unless given; no fused kernel has it
    Additive,
}

/// Where query 0 stands among the keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum AlignArg {
    /// Query i stands at key i
    TopLeft,
    /// The last query stands at the last key
    BottomRight,
}

impl From<AlignArg> for Align {
    fn from(align: AlignArg) -> Self {
        match align {
            AlignArg::TopLeft => Self::TopLeft,
            AlignArg::BottomRight => Self::BottomRight,
        }
    }
}

/// Element type of q, k and v.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DtypeArg {
    /// IEEE binary32
    F32,
    /// IEEE binary16
    F16,
    /// bfloat16
    Bf16,
}

impl From<DtypeArg> for Dtype {
    fn from(dtype: DtypeArg) -> Self {
        match dtype {
            DtypeArg::F32 => Self::F32,
            DtypeArg::F16 => Self::F16,
            DtypeArg::Bf16 => Self::Bf16,
        }
    }
}

/// Element type of k and v.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum KvDtypeArg {
    /// IEEE binary32
    F32,
    /// IEEE binary16
    F16,
    /// bfloat16
    Bf16,
    /// 8-bit codes, a scale and a lowest value for each row
    Int8,
    /// 4-bit codes, a scale and a lowest value for each 16 elements
    Int4,
}

impl From<KvDtypeArg> for Dtype {
    fn from(dtype: KvDtypeArg) -> Self {
        match dtype {
            KvDtypeArg::F32 => Self::F32,
            KvDtypeArg::F16 => Self::F16,
            KvDtypeArg::Bf16 => Self::Bf16,
            KvDtypeArg::Int8 => Self::Int8,
            KvDtypeArg::Int4 => Self::Int4,
        }
    }
}

/// `ring:ROWS` or `paged:KEYS`: a cache whose other sizes are those of a shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CacheArg {
    Ring(usize),
    Paged(usize),
}

impl CacheArg {
    /// The cache of so many batch entries, each with pages of its own.
    fn cache(self, batch: usize, seq_kv: usize) -> Cache {
        match self {
            Self::Ring(capacity) => Cache::Ring { capacity },
            Self::Paged(page_size) => {
                let max_blocks = seq_kv.div_ceil(page_size);
                Cache::Paged { pages: batch.saturating_mul(max_blocks), page_size, max_blocks }
            }
        }
    }
}

impl FromStr for CacheArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str = "want ring:ROWS or paged:KEYS, for instance ring:4096 or paged:16";
        let (kind, size) = text.split_once(':').ok_or(FORM)?;
        let size = size.trim().parse().ok().filter(|&size| size > 0);
        let size = size.ok_or_else(|| format!("'{text}' has no size of 1 or more; {FORM}"))?;
        match kind.trim() {
            "ring" => Ok(Self::Ring(size)),
            "paged" => Ok(Self::Paged(size)),
            _ => Err(format!("no cache '{kind}'; {FORM}")),
        }
    }
}

/// `L,R`, where `-` is unbounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WindowArg(pub(crate) Window);

impl FromStr for WindowArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let side = |text: &str| match text.trim() {
            "-" => Ok(None),
            number => number.parse().map(Some).map_err(|_| {
                format!("'{number}' is neither a number of keys nor -; want L,R, for instance 128,0 or -,16")
            }),
        };
        let (left, right) = text.split_once(',').ok_or("want two sides, L,R, for instance 128,0 or -,16")?;
        Ok(Self(Window { left: side(left)?, right: side(right)? }))
    }
}

impl fmt::Display for WindowArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = |side: Option<usize>| side.map_or("-".to_string(), |n| n.to_string());
        write!(f, "{},{}", side(self.0.left), side(self.0.right))
    }
}

/// The contract's options.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Attention")]
pub(crate) struct ContractArgs {
    /// How a query and a key are compared [default: scaled-dot]
    #[arg(long, value_enum, value_name = "KIND")]
    pub(crate) similarity: Option<SimilarityArg>,
    /// Factor on the similarity
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub(crate) scale: Option<f32>,
    /// Soft cap: cap * tanh(score / cap)
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub(crate) softcap: Option<f32>,
    /// Drop keys after the query's position
    #[arg(long, value_enum, value_name = "ALIGN")]
    pub(crate) causal: Option<AlignArg>,
    /// Keep L keys before the query's position and R after it; - is unbounded
    #[arg(long, value_name = "L,R", allow_hyphen_values = true)]
    pub(crate) window: Option<WindowArg>,
    /// Where query 0 stands, for window and ALiBi, unless --causal says it
    #[arg(long, value_enum, value_name = "ALIGN", default_value = "bottom-right")]
    pub(crate) align: AlignArg,
}

impl ContractArgs {
    /// Sets everything but the similarity, whose sizes come from elsewhere.
    pub(crate) fn apply(&self, problem: AttentionProblem) -> AttentionProblem {
        AttentionProblem {
            scale: self.scale,
            softcap: self.softcap,
            causal: self.causal.map(Align::from),
            window: self.window.map(|window| window.0),
            align: self.align.into(),
            ..problem
        }
    }

    /// The similarity for a width of q, and one of what both are made into where it is additive.
    pub(crate) fn similarity(&self, query_dim: usize, hidden: usize, per_head: bool) -> Similarity {
        match self.similarity {
            Some(SimilarityArg::Dot) => Similarity::Dot,
            Some(SimilarityArg::Bilinear) => Similarity::Bilinear { query_dim, per_head },
            Some(SimilarityArg::Additive) => Similarity::Additive { query_dim, hidden, per_head },
            Some(SimilarityArg::Cosine) => Similarity::Cosine,
            Some(SimilarityArg::ScaledDot) | None => Similarity::ScaledDot,
        }
    }
}

/// Operands that `bench` and `explain` make up themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Extra {
    /// An additive bias for each head, query and key
    Bias,
    /// A boolean mask that drops one pair in eight
    Mask,
    /// A boolean mask for all heads that drops every other block of 128 x 128 pairs
    BlockMask,
    /// ALiBi slopes
    Alibi,
    /// Sink logits
    Sinks,
    /// Key lengths
    KvLens,
}

/// A problem made of a shape and flags.
#[derive(Args, Clone, Debug)]
pub(crate) struct SyntheticArgs {
    #[command(flatten)]
    pub(crate) contract: ContractArgs,
    /// Add operands with made-up values
    #[arg(long, value_enum, value_delimiter = ',', value_name = "LIST", help_heading = "Attention")]
    pub(crate) with: Vec<Extra>,
    /// Keep keys and values in a cache: ring:ROWS, or paged:KEYS for pages of so many in no order
    #[arg(long, value_name = "KIND", help_heading = "Attention")]
    pub(crate) cache: Option<CacheArg>,
    /// Element type of k and v, which then lie [B,Sk,Hkv,D] as in a cache [default: that of q, [B,Hkv,Sk,D]]
    #[arg(long, value_enum, value_name = "TYPE", help_heading = "Attention")]
    pub(crate) kv_dtype: Option<KvDtypeArg>,
}

impl SyntheticArgs {
    /// The problem for a shape; extra operands are contiguous.
    pub(crate) fn problem(&self, shape: &crate::shapes::Shape, dtype: Dtype) -> Result<AttentionProblem> {
        use wgpu_attention::{Bias, Layout};
        let has = |extra| self.with.contains(&extra);
        if has(Extra::Mask) && has(Extra::BlockMask) {
            return Err(Failure::input("--with mask,block-mask: a problem has one mask"));
        }
        let pairs = [1, shape.heads_q, shape.seq_q, shape.seq_kv];
        let problem = AttentionProblem {
            similarity: self.contract.similarity(shape.head_dim, shape.head_dim, false),
            bias: has(Extra::Bias).then(|| Bias { dtype, layout: Layout::broadcast(pairs) }),
            mask: if has(Extra::BlockMask) {
                Some(Layout::broadcast([1, 1, shape.seq_q, shape.seq_kv]))
            } else {
                has(Extra::Mask).then(|| Layout::broadcast(pairs))
            },
            alibi: has(Extra::Alibi),
            sinks: has(Extra::Sinks),
            kv_lens: has(Extra::KvLens),
            ..self.contract.apply(shape.problem().with_dtype(dtype))
        };
        let problem = match (self.cache, self.kv_dtype) {
            (None, None) => problem,
            (cache, kv_dtype) => {
                let cache = cache.map_or(Cache::Contiguous, |of| of.cache(shape.batch, shape.seq_kv));
                problem.with_cache(cache, kv_dtype.map_or(dtype, Dtype::from))
            }
        };
        problem.validate().map_err(|error| Failure::from(error).about(shape))?;
        Ok(problem)
    }

    /// The operands that a problem of [`Self::problem`] is given.
    pub(crate) fn data(&self, problem: &AttentionProblem) -> Data {
        let mut data = Data::random(problem, &mut Prng::new(1));
        if self.with.contains(&Extra::BlockMask) {
            let block = |at: usize| at / problem.seq_kv / 128 + at % problem.seq_kv / 128;
            let kept = |at| block(at).is_multiple_of(2);
            data.mask = Some((0..problem.seq_q * problem.seq_kv).map(|at| u8::from(kept(at))).collect());
        }
        data
    }

    /// Its options in a few words.
    pub(crate) fn describe(&self, problem: &AttentionProblem) -> String {
        let blocks = self.with.contains(&Extra::BlockMask);
        describe(problem).replace("mask", if blocks { "block-mask" } else { "mask" })
    }
}

/// The options of a problem in a few words, `plain` when there are none.
pub(crate) fn describe(p: &AttentionProblem) -> String {
    let mut words = Vec::new();
    match p.similarity {
        Similarity::Dot => words.push("dot".to_string()),
        Similarity::Cosine => words.push("cosine".to_string()),
        Similarity::Bilinear { per_head, .. } => {
            words.push(if per_head { "bilinear-per-head" } else { "bilinear" }.to_string());
        }
        Similarity::Additive { per_head, .. } => {
            words.push(if per_head { "additive-per-head" } else { "additive" }.to_string());
        }
        _ => {}
    }
    words.extend(p.scale.map(|scale| format!("scale={scale}")));
    words.extend(p.softcap.map(|cap| format!("softcap={cap}")));
    words.extend(p.causal.map(|align| format!("causal={align}")));
    words.extend(p.window.map(|window| format!("window={}", WindowArg(window))));
    if (p.window.is_some() || p.alibi) && p.causal.is_none() && p.align == Align::TopLeft {
        words.push("align=top-left".into());
    }
    for (present, word) in [
        (p.bias.is_some(), "bias"),
        (p.mask.is_some(), "mask"),
        (p.alibi, "alibi"),
        (p.sinks, "sinks"),
        (p.kv_lens, "kv-lens"),
    ] {
        words.extend(present.then(|| word.to_string()));
    }
    match p.cache {
        Cache::Ring { capacity } => words.push(format!("cache=ring:{capacity}")),
        Cache::Paged { page_size, .. } => words.push(format!("cache=paged:{page_size}")),
        Cache::Ragged { .. } => words.push("ragged-k".into()),
        _ => {}
    }
    words.extend(p.total_q.map(|_| "ragged-q".to_string()));
    words.extend(p.kv_dtype.map(|dtype| format!("kv={dtype}")));
    if words.is_empty() { "plain".into() } else { words.join(" ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_two_sides() {
        let window = |text: &str| text.parse::<WindowArg>().map(|w| (w.0.left, w.0.right));
        assert_eq!(window("3,0"), Ok((Some(3), Some(0))));
        assert_eq!(window("-, 7"), Ok((None, Some(7))));
        for text in ["", "3", "3,", "a,b", "-1,2", "1,2,3", "--,1"] {
            assert!(window(text).is_err(), "{text}");
        }
    }

    #[test]
    fn caches_are_a_kind_and_a_size() {
        assert_eq!("ring:128".parse(), Ok(CacheArg::Ring(128)));
        assert_eq!("paged: 16".parse(), Ok(CacheArg::Paged(16)));
        for text in
            ["", "paged", "paged:", "paged:0", "ring:-1", "ring:x", "heap:3", "ring:99999999999999999999"]
        {
            assert!(text.parse::<CacheArg>().is_err(), "{text}");
        }
    }
}
