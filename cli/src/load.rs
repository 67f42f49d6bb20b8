//! From the tensors of a file and the flags to a problem and its data.

use clap::ValueEnum;
use wgpu_attention::{AttentionProblem, Bias, Dtype, Layout};

use crate::archive::Archive;
use crate::data::Data;
use crate::failure::{Failure, Result};
use crate::options::{ContractArgs, SimilarityArg};

/// The widest value rows. Without any key, no data vouches for a width, and o has it in every row.
const MAX_WIDTH: usize = 1 << 16;

/// Order of the dimensions of q, k, v and o in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum LayoutArg {
    /// Batch, head, sequence, width
    #[default]
    Bhsd,
    /// Batch, sequence, head, width
    Bshd,
}

impl LayoutArg {
    fn layout(self, [_, heads, seq, dim]: [usize; 4]) -> Layout {
        match self {
            Self::Bhsd => Layout::bhsd(heads, seq, dim),
            Self::Bshd => Layout::bshd(heads, seq, dim),
        }
    }

    /// A shape of the file as `[batch, heads, seq, dim]`; missing leading ones are 1.
    fn logical(self, shape: &[usize]) -> Option<[usize; 4]> {
        Some(match (self, shape) {
            (Self::Bhsd, &[b, h, s, d]) | (Self::Bshd, &[b, s, h, d]) => [b, h, s, d],
            (Self::Bhsd, &[h, s, d]) | (Self::Bshd, &[s, h, d]) => [1, h, s, d],
            (_, &[s, d]) => [1, 1, s, d],
            _ => return None,
        })
    }

    /// The shape of o in the file, of the rank that q has there.
    fn stored(self, rank: usize, [b, h, s, d]: [usize; 4]) -> Vec<usize> {
        let all = match self {
            Self::Bhsd => [b, h, s, d],
            Self::Bshd => [b, s, h, d],
        };
        // Rank 2 has neither batch nor head, wherever the head stands.
        if rank == 2 { vec![s, d] } else { all[4 - rank..].to_vec() }
    }
}

/// A problem made of a file.
pub(crate) struct Loaded {
    pub(crate) problem: AttentionProblem,
    pub(crate) data: Data,
    /// Shape of o as q's file has it.
    pub(crate) o_shape: Vec<usize>,
}

/// Reads every tensor that attention knows; others are left alone.
pub(crate) fn load(
    archive: &mut Archive,
    contract: &ContractArgs,
    layout: LayoutArg,
    out_dtype: Option<Dtype>,
) -> Result<Loaded> {
    let problem = problem(archive, contract, layout, out_dtype)?;
    let rank = archive.need("q")?.shape.len();
    let o_shape = layout.stored(rank, problem.shape(wgpu_attention::Operand::O));
    let optional = |name: &str, archive: &Archive| archive.info(name).is_some();
    let floats = |name: &str, archive: &mut Archive| {
        optional(name, archive).then(|| archive.floats_f32(name)).transpose()
    };
    let data = Data {
        q: archive.floats("q")?,
        k: archive.floats("k")?,
        v: archive.floats("v")?,
        w: floats("w", archive)?,
        bias: optional("bias", archive).then(|| archive.floats("bias")).transpose()?,
        mask: optional("mask", archive).then(|| archive.booleans("mask")).transpose()?,
        alibi_slopes: floats("alibi_slopes", archive)?,
        sinks: floats("sinks", archive)?,
        kv_lens: optional("kv_lens", archive).then(|| kv_lens(archive, problem.seq_kv)).transpose()?,
    };
    data.inputs().check(&problem).map_err(|error| archive.fail(error))?;
    Ok(Loaded { problem, data, o_shape })
}

fn problem(
    archive: &Archive,
    contract: &ContractArgs,
    layout: LayoutArg,
    out_dtype: Option<Dtype>,
) -> Result<AttentionProblem> {
    let dtype = archive.float_dtype("q")?;
    let shape = |name: &str| {
        let got = archive.float_dtype(name)?;
        if got != dtype {
            return Err(archive.fail(format!("{name}: need {dtype} as q, got {got}")));
        }
        let shape = &archive.need(name)?.shape;
        layout
            .logical(shape)
            .ok_or_else(|| archive.fail(format!("{name}: need rank 2, 3 or 4, got shape {shape:?}")))
    };
    let (q, k, v) = (shape("q")?, shape("k")?, shape("v")?);
    let bilinear = similarity_fits(archive, contract)?;
    let agree = |name: &str, what: &str, need: usize, of: &str, got: usize| {
        if need == got {
            return Ok(());
        }
        let shape = &archive.need(name)?.shape;
        Err(archive.fail(format!("{name}: need {what} {need} as {of}, got {got} in shape {shape:?}")))
    };
    agree("k", "batch", q[0], "q", k[0])?;
    agree("v", "batch", q[0], "q", v[0])?;
    agree("v", "heads", k[1], "k", v[1])?;
    agree("v", "length", k[2], "k", v[2])?;
    if !bilinear {
        agree("k", "width", q[3], "q", k[3])?;
    }
    if v[3] > MAX_WIDTH {
        let shape = &archive.need("v")?.shape;
        return Err(
            archive.fail(format!("v: need width {MAX_WIDTH} at most, got {} in shape {shape:?}", v[3]))
        );
    }
    let base = AttentionProblem::new(q[0], q[1], k[1], q[2], k[2], k[3], v[3]).with_dtype(dtype);
    let per_head = if bilinear { w_is_per_head(archive, q, k)? } else { false };
    let pairs = [q[0], q[1], q[2], k[2]];
    let (bias, mask) = (broadcast(archive, "bias", pairs)?, broadcast(archive, "mask", pairs)?);
    let bias = match bias {
        Some(layout) => Some(Bias { dtype: archive.float_dtype("bias")?, layout }),
        None => None,
    };
    let problem = AttentionProblem {
        out_dtype: out_dtype.unwrap_or(dtype),
        similarity: contract.similarity(q[3], per_head),
        bias,
        mask,
        alibi: vector(archive, "alibi_slopes", "query heads", q[1])?,
        sinks: vector(archive, "sinks", "query heads", q[1])?,
        kv_lens: vector(archive, "kv_lens", "batch entries", q[0])?,
        q: layout.layout(q),
        k: layout.layout(k),
        v: layout.layout(v),
        o: layout.layout([q[0], q[1], q[2], v[3]]),
        ..contract.apply(base)
    };
    problem.validate().map_err(|error| archive.fail(error))?;
    Ok(problem)
}

/// A matrix that is silently ignored, or one that is missing, would give wrong numbers.
fn similarity_fits(archive: &Archive, contract: &ContractArgs) -> Result<bool> {
    let bilinear = contract.similarity == Some(SimilarityArg::Bilinear);
    match (bilinear, archive.info("w").is_some()) {
        (true, false) => Err(archive.fail("w: --similarity bilinear needs it, the file does not have it")),
        (false, true) => {
            Err(archive.fail("w: the file has it, only --similarity bilinear uses it; say so or remove it"))
        }
        _ => Ok(bilinear),
    }
}

fn w_is_per_head(archive: &Archive, q: [usize; 4], k: [usize; 4]) -> Result<bool> {
    archive.float_dtype("w")?;
    let (one, each) = ([q[3], k[3]], [q[1], q[3], k[3]]);
    let got = archive.need("w")?.shape.as_slice();
    if got != one && got != each {
        return Err(archive.fail(format!("w: need {one:?} or {each:?}, got {got:?}")));
    }
    Ok(got.len() == 3)
}

/// The layout of a tensor that is repeated along dimensions of size 1, as numpy does.
fn broadcast(archive: &Archive, name: &str, full: [usize; 4]) -> Result<Option<Layout>> {
    let Some(info) = archive.info(name) else { return Ok(None) };
    let got = &info.shape;
    let mut dims = [1; 4];
    if !(2..=4).contains(&got.len()) {
        return Err(archive.fail(format!("{name}: need rank 2, 3 or 4, got shape {got:?}")));
    }
    dims[4 - got.len()..].copy_from_slice(got);
    if dims.iter().zip(full).any(|(&got, full)| got != 1 && got != full) {
        let why = format!("{name}: need a shape that broadcasts to {full:?}, got {got:?}");
        return Err(archive.fail(why));
    }
    Ok(Some(Layout::broadcast(dims)))
}

/// Whether the file has this vector, and it has the right length.
fn vector(archive: &Archive, name: &str, what: &str, need: usize) -> Result<bool> {
    match archive.info(name) {
        Some(info) if info.shape != [need] => {
            let got = &info.shape;
            Err(archive.fail(format!("{name}: need shape [{need}] ({what}), got {got:?}")))
        }
        info => Ok(info.is_some()),
    }
}

fn kv_lens(archive: &mut Archive, seq_kv: usize) -> Result<Vec<u32>> {
    let lens = archive.integers("kv_lens")?;
    let fits = |(batch, got): (usize, i64)| match u32::try_from(got) {
        Ok(len) if len as usize <= seq_kv => Ok(len),
        _ => Err(archive.fail(format!("kv_lens[{batch}]: need 0 to {seq_kv}, got {got}"))),
    };
    lens.into_iter().enumerate().map(fits).collect::<Result<_, Failure>>()
}
