//! From the tensors of a file and the flags to a problem and its data.

use clap::ValueEnum;
use wgpu_attention::{AttentionProblem, Bias, Cache, Dtype, Layout, Operand, Tensor, quantize, row_elements};

use crate::archive::Archive;
use crate::data::Data;
use crate::failure::Result;
use crate::memory;
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

/// Reads every tensor that attention knows; others are left alone. k and v become `kv_dtype` if that is given.
pub(crate) fn load(
    archive: &mut Archive,
    contract: &ContractArgs,
    layout: LayoutArg,
    out_dtype: Option<Dtype>,
    kv_dtype: Option<Dtype>,
) -> Result<Loaded> {
    let lists = Lists::read(archive)?;
    let problem = problem(archive, contract, layout, [out_dtype, kv_dtype], &lists)?;
    let rank = archive.need("q")?.shape.len();
    let order = if lists.cu_seqlens_q.is_some() { PACKED } else { layout };
    let o_shape = order.stored(rank, problem.shape(Operand::O));
    let block_table = lists.pages(archive, &problem)?;
    let optional = |name: &str, archive: &Archive| archive.info(name).is_some();
    let floats = |name: &str, archive: &mut Archive| {
        optional(name, archive).then(|| archive.floats_f32(name)).transpose()
    };
    let [k, v] = kv_names(archive);
    let data = Data {
        q: archive.floats("q")?,
        k: rows(archive, k, problem.stored_kv(), problem.head_dim)?,
        v: rows(archive, v, problem.stored_kv(), problem.head_dim_v)?,
        w: floats("w", archive)?,
        wq: floats("w_q", archive)?,
        wk: floats("w_k", archive)?,
        score_v: floats("score_v", archive)?,
        bias: optional("bias", archive).then(|| archive.floats("bias")).transpose()?,
        mask: optional("mask", archive).then(|| archive.booleans("mask")).transpose()?,
        alibi_slopes: floats("alibi_slopes", archive)?,
        sinks: floats("sinks", archive)?,
        kv_lens: lists.kv_lens,
        block_table,
        cu_seqlens_q: lists.cu_seqlens_q,
        cu_seqlens_k: lists.cu_seqlens_k,
    };
    data.inputs().check(&problem).map_err(|error| archive.fail(error))?;
    Ok(Loaded { problem, data, o_shape })
}

/// The tensors of a file that attention knows.
const KNOWN: [&str; 17] = [
    "q",
    "k",
    "v",
    "k_pool",
    "v_pool",
    "w",
    "w_q",
    "w_k",
    "score_v",
    "bias",
    "mask",
    "alibi_slopes",
    "sinks",
    "kv_lens",
    "block_table",
    "cu_seqlens_q",
    "cu_seqlens_k",
];

/// Says which tensors of a file were left alone, if any: a mask by another name is one, and whoever wrote it wants to know.
pub(crate) fn unused(archive: &Archive) -> String {
    let mut names = archive.names();
    names.retain(|name| !KNOWN.contains(&name.as_str()));
    names.sort_unstable();
    if names.is_empty() { String::new() } else { format!("; not used: {}", names.join(", ")) }
}

/// Ragged tensors and pages have one order, whatever the others have: all heads of a token together.
const PACKED: LayoutArg = LayoutArg::Bshd;

/// The tensors that hold keys and values.
fn kv_names(archive: &Archive) -> [&'static str; 2] {
    if archive.info("k_pool").is_some() { ["k_pool", "v_pool"] } else { ["k", "v"] }
}

/// The elements of k or v as `dtype` has them: converted, or quantised row by row.
fn rows(archive: &mut Archive, name: &str, dtype: Dtype, width: usize) -> Result<Tensor> {
    let stored = archive.floats(name)?;
    if stored.as_ref().dtype() == dtype {
        return Ok(stored);
    }
    memory::allows(name, 8 * stored.as_ref().len() as u128).map_err(|failure| archive.about(failure))?;
    Ok(quantize(dtype, &stored.to_f32(), width))
}

/// The integers of a file. Problems have sizes from them.
struct Lists {
    kv_lens: Option<Vec<u32>>,
    cu_seqlens_q: Option<Vec<u32>>,
    cu_seqlens_k: Option<Vec<u32>>,
    block_table: Option<Vec<i64>>,
}

impl Lists {
    fn read(archive: &mut Archive) -> Result<Self> {
        tensors_fit_together(archive)?;
        let block_table = match archive.info("block_table") {
            Some(info) if info.shape.len() != 2 => {
                let got = &info.shape;
                return Err(archive.fail(format!("block_table: need shape [batch, blocks], got {got:?}")));
            }
            info => info.is_some().then(|| archive.integers("block_table")).transpose()?,
        };
        Ok(Self {
            kv_lens: words(archive, "kv_lens")?,
            cu_seqlens_q: words(archive, "cu_seqlens_q")?,
            cu_seqlens_k: words(archive, "cu_seqlens_k")?,
            block_table,
        })
    }

    /// The block table in 32 bits. Frameworks fill up what no key needs with -1 or whatever was there.
    fn pages(&self, archive: &Archive, problem: &AttentionProblem) -> Result<Option<Vec<u32>>> {
        let Cache::Paged { pages, page_size, max_blocks } = problem.cache else { return Ok(None) };
        let Some(table) = &self.block_table else { return Ok(None) };
        let page = |(at, &got): (usize, &i64)| {
            let (entry, block) = (at / max_blocks, at % max_blocks);
            let keys = self.kv_lens.as_ref().map_or(problem.seq_kv, |lens| lens[entry] as usize);
            match u32::try_from(got) {
                Ok(page) => Ok(page),
                Err(_) if block >= keys.div_ceil(page_size) => Ok(u32::MAX),
                Err(_) => {
                    let why = format!("block_table[{entry}][{block}] = {got} is none of the {pages} pages");
                    Err(archive.fail(why))
                }
            }
        };
        table.iter().enumerate().map(page).collect::<Result<_>>().map(Some)
    }
}

/// A vector of integers that fit into 32 bits, if the file has it.
fn words(archive: &mut Archive, name: &str) -> Result<Option<Vec<u32>>> {
    let Some(info) = archive.info(name) else { return Ok(None) };
    // Offsets are one more than the entries.
    if info.shape.len() != 1 || (name != "kv_lens" && info.shape == [0]) {
        let (got, need) = (&info.shape, if name == "kv_lens" { "[batch]" } else { "[batch + 1]" });
        return Err(archive.fail(format!("{name}: need shape {need}, got {got:?}")));
    }
    let list = archive.integers(name)?;
    let word = |(at, got): (usize, i64)| {
        let why = || archive.fail(format!("{name}[{at}]: need 0 to {}, got {got}", u32::MAX));
        u32::try_from(got).map_err(|_| why())
    };
    list.into_iter().enumerate().map(word).collect::<Result<_>>().map(Some)
}

/// Keys are kept in one way: a file that says two, or half of one, would be read wrongly.
fn tensors_fit_together(archive: &Archive) -> Result<()> {
    let shape = |name: &str| archive.info(name).map(|info| &info.shape);
    for (name, other, why) in [
        ("k", "k_pool", "keys are in one of them"),
        ("k", "block_table", "pages are in k_pool"),
        ("v", "v_pool", "values are in one of them"),
        ("cu_seqlens_k", "k_pool", "ragged keys are in k"),
        ("kv_lens", "cu_seqlens_k", "ragged keys have their lengths from the latter"),
    ] {
        if let (Some(got), Some(with)) = (shape(name), shape(other)) {
            let why = format!("{name}: shape {got:?} beside {other} of shape {with:?}; {why}");
            return Err(archive.fail(why));
        }
    }
    for (name, need) in
        [("k_pool", "block_table"), ("k_pool", "v_pool"), ("v_pool", "k_pool"), ("block_table", "k_pool")]
    {
        if let (Some(got), None) = (shape(name), shape(need)) {
            return Err(
                archive.fail(format!("{name}: shape {got:?} needs {need}, the file does not have it"))
            );
        }
    }
    Ok(())
}

/// Offsets of ragged sequences: how many there are, and the longest.
fn entries(list: &[u32]) -> [usize; 2] {
    let longest = list.windows(2).map(|pair| pair[1].saturating_sub(pair[0])).max();
    [list.len() - 1, longest.unwrap_or(0) as usize]
}

fn problem(
    archive: &Archive,
    contract: &ContractArgs,
    layout: LayoutArg,
    [out_dtype, kv_dtype]: [Option<Dtype>; 2],
    lists: &Lists,
) -> Result<AttentionProblem> {
    let (dtype, names) = (archive.float_dtype("q")?, kv_names(archive));
    let stored = archive.float_dtype(names[0])?;
    let got = archive.float_dtype(names[1])?;
    if got != stored {
        return Err(archive.fail(format!("{}: need {stored} as {}, got {got}", names[1], names[0])));
    }
    let shape = |name: &str, cu_seqlens: Option<&Vec<u32>>| {
        let shape = &archive.need(name)?.shape;
        let (fits, need) = match (cu_seqlens, name) {
            (Some(_), _) => (shape.len() == 3, "[total, heads, width]"),
            (None, "k_pool" | "v_pool") => (shape.len() == 4, "[pages, keys, heads, width]"),
            (None, _) => (true, "rank 2, 3 or 4"),
        };
        let order = if need.starts_with('[') { PACKED } else { layout };
        let logical = order.logical(shape).filter(|_| fits);
        logical.ok_or_else(|| archive.fail(format!("{name}: need {need}, got shape {shape:?}")))
    };
    let (cu_q, cu_k) = (lists.cu_seqlens_q.as_ref(), lists.cu_seqlens_k.as_ref());
    let (q, k, v) = (shape("q", cu_q)?, shape(names[0], cu_k)?, shape(names[1], cu_k)?);
    similarity_fits(archive, contract)?;
    let agree = |name: &str, what: &str, need: usize, of: &str, got: usize| {
        if need == got {
            return Ok(());
        }
        let shape = &archive.need(name)?.shape;
        Err(archive.fail(format!("{name}: need {what} {need} as {of}, got {got} in shape {shape:?}")))
    };
    let (of_batch, [batch, seq_q]) = match cu_q {
        Some(list) => ("cu_seqlens_q", entries(list)),
        None => ("q", [q[0], q[2]]),
    };
    let (cache, seq_kv) = match (&lists.block_table, cu_k) {
        (Some(_), _) => {
            let table = &archive.need("block_table")?.shape;
            agree("block_table", "batch", batch, of_batch, table[0])?;
            let (pages, page_size, max_blocks) = (k[0], k[2], table[1]);
            // As long as the longest: no more of a bias or mask has to be there.
            let room = page_size.saturating_mul(max_blocks);
            let longest = lists.kv_lens.as_ref().map(|lens| lens.iter().copied().max().unwrap_or(0) as usize);
            kv_lens_fit(archive, lists, room)?;
            (Cache::Paged { pages, page_size, max_blocks }, longest.unwrap_or(room))
        }
        (None, Some(list)) => {
            let [count, longest] = entries(list);
            agree("cu_seqlens_k", "batch", batch, of_batch, count)?;
            (Cache::Ragged { total: k[2] }, longest)
        }
        (None, None) => {
            agree("k", "batch", batch, of_batch, k[0])?;
            kv_lens_fit(archive, lists, k[2])?;
            (Cache::Contiguous, k[2])
        }
    };
    let sizes = if matches!(cache, Cache::Paged { .. }) {
        ["pages", "heads", "keys a page"]
    } else {
        ["batch", "heads", "length"]
    };
    for (dim, what) in sizes.into_iter().enumerate() {
        agree(names[1], what, k[dim], names[0], v[dim])?;
    }
    let matrices = matrices(contract.similarity);
    if matrices.is_empty() {
        agree(names[0], "width", q[3], "q", k[3])?;
    }
    if v[3] > MAX_WIDTH {
        let shape = &archive.need(names[1])?.shape;
        let (name, got) = (names[1], v[3]);
        let why = format!("{name}: need width {MAX_WIDTH} at most, got {got} in shape {shape:?}");
        return Err(archive.fail(why));
    }
    let base = AttentionProblem::new(batch, q[1], k[1], seq_q, seq_kv, k[3], v[3]).with_dtype(dtype);
    let (hidden, per_head) = matrix_sizes(archive, matrices, q, k)?;
    let pairs = [batch, q[1], seq_q, seq_kv];
    let (bias, mask) = (broadcast(archive, "bias", pairs)?, broadcast(archive, "mask", pairs)?);
    let bias = match bias {
        Some(layout) => Some(Bias { dtype: archive.float_dtype("bias")?, layout }),
        None => None,
    };
    let kv_dtype = kv_dtype.unwrap_or(stored);
    let of_q = if cu_q.is_some() { PACKED } else { layout };
    let of_kv = if cache == Cache::Contiguous { layout } else { PACKED };
    let row = |[entries, heads, rows, width]: [usize; 4]| {
        of_kv.layout([entries, heads, rows, row_elements(kv_dtype, width)])
    };
    let problem = AttentionProblem {
        out_dtype: out_dtype.unwrap_or(dtype),
        kv_dtype: (kv_dtype != dtype).then_some(kv_dtype),
        similarity: contract.similarity(q[3], hidden, per_head),
        bias,
        mask,
        alibi: vector(archive, "alibi_slopes", "query heads", q[1])?,
        sinks: vector(archive, "sinks", "query heads", q[1])?,
        kv_lens: vector(archive, "kv_lens", "batch entries", batch)?,
        cache,
        total_q: cu_q.map(|_| q[2]),
        q: of_q.layout(q),
        k: row(k),
        v: row(v),
        o: of_q.layout([q[0], q[1], q[2], v[3]]),
        ..contract.apply(base)
    };
    problem.validate().map_err(|error| archive.fail(error))?;
    Ok(problem)
}

/// The tensors that a similarity has beside q and k.
fn matrices(similarity: Option<SimilarityArg>) -> &'static [&'static str] {
    match similarity {
        Some(SimilarityArg::Bilinear) => &["w"],
        Some(SimilarityArg::Additive) => &["score_v", "w_q", "w_k"],
        _ => &[],
    }
}

/// A matrix that is silently ignored, or one that is missing, would give wrong numbers.
fn similarity_fits(archive: &Archive, contract: &ContractArgs) -> Result<()> {
    for (kind, name) in [(SimilarityArg::Bilinear, "bilinear"), (SimilarityArg::Additive, "additive")] {
        for tensor in matrices(Some(kind)) {
            match (contract.similarity == Some(kind), archive.info(tensor).is_some()) {
                (true, false) => {
                    let why = format!("{tensor}: --similarity {name} needs it, the file does not have it");
                    return Err(archive.fail(why));
                }
                (false, true) => {
                    let why = format!(
                        "{tensor}: the file has it, only --similarity {name} uses it; say so or remove it"
                    );
                    return Err(archive.fail(why));
                }
                _ => {}
            }
        }
    }
    Ok(())
}

/// The width of an additive similarity, and whether each query head has matrices of its own.
fn matrix_sizes(archive: &Archive, names: &[&str], q: [usize; 4], k: [usize; 4]) -> Result<(usize, bool)> {
    let (mut hidden, mut per_head) = (0, None);
    for &name in names {
        archive.float_dtype(name)?;
        let got = archive.need(name)?.shape.as_slice();
        if name == "score_v" {
            hidden = got.last().copied().unwrap_or(0);
        }
        let one = match name {
            "w" => vec![q[3], k[3]],
            "w_q" => vec![hidden, q[3]],
            "w_k" => vec![hidden, k[3]],
            _ => vec![hidden],
        };
        let each = [&[q[1]], &*one].concat();
        let (of_one, of_each) =
            (got == one && per_head != Some(true), got == each && per_head != Some(false));
        if !of_one && !of_each {
            let need = match per_head {
                None => format!("{one:?} or {each:?}"),
                Some(true) => format!("{each:?}"),
                Some(false) => format!("{one:?}"),
            };
            return Err(archive.fail(format!("{name}: need {need}, got {got:?}")));
        }
        per_head = Some(of_each);
    }
    Ok((hidden, per_head.unwrap_or(false)))
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

/// No entry has more keys than there is room for.
fn kv_lens_fit(archive: &Archive, lists: &Lists, room: usize) -> Result<()> {
    match lists.kv_lens.iter().flatten().enumerate().find(|(_, len)| **len as usize > room) {
        Some((batch, got)) => Err(archive.fail(format!("kv_lens[{batch}]: need 0 to {room}, got {got}"))),
        None => Ok(()),
    }
}
