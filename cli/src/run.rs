//! `run`: attention on a user's tensors.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use safetensors::Dtype as Stored;
use safetensors::tensor::TensorView;
use wgpu_attention::{AttentionProblem, Dtype, Operand, Outputs, TensorRef};

use crate::archive::Archive;
use crate::backend::{self, AdapterArgs, Choice};
use crate::failure::{Failure, Result};
use crate::load::{self, LayoutArg};
use crate::options::{ContractArgs, KvDtypeArg};
use crate::output::{self, OutputFile};

/// Element type of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum OutDtype {
    /// IEEE binary32, whatever q has
    F32,
}

/// Attention on the tensors of a safetensors file.
///
/// Reads q, k, v (F32, F16 or BF16; [B,H,S,D], rank 3 means B = 1, rank 2 B = H = 1) and, where the
/// file has them, w ([Dq,Dk] or [H,Dq,Dk]), score_v, w_q and
/// w_k ([E], [E,Dq] and [E,Dk], or [H,...] each), bias and mask (broadcast to [B,Hq,Sq,Sk]), alibi_slopes
/// [Hq], sinks [Hq] and kv_lens [B]. Writes o (as q), lse [B,Hq,Sq] and, if asked, weights
/// [B,Hq,Sq,Sk].
///
/// Keys may lie in pages: k_pool and v_pool [pages,keys,Hkv,D] with block_table [B,blocks], whose
/// entries behind kv_lens may be anything. Keys may be ragged: k and v [total,Hkv,D] with
/// cu_seqlens_k [B+1]. So may queries, whatever the keys are: q [total,Hq,D] with cu_seqlens_q [B+1];
/// then o is [total,Hq,Dv], lse [Hq,total]. Sq and Sk are those of the longest. k and v may have
/// another type than q.
#[derive(Args, Debug)]
pub(crate) struct RunArgs {
    /// The inputs
    #[arg(value_name = "IN.safetensors")]
    input: PathBuf,
    /// Where the results go
    #[arg(short, long, value_name = "OUT.safetensors")]
    output: PathBuf,
    /// Order of the dimensions of q, k, v and o; ragged ones and pages have only one
    #[arg(long, value_enum, default_value = "bhsd")]
    layout: LayoutArg,
    /// auto, fused, decode (fused, the keys in splits), staged, cpu or oracle; auto is the adapter if there
    /// is one, else the CPU
    #[arg(long, value_name = "PATH", default_value = "auto")]
    path: Choice,
    /// Force a kernel of the path (fused: row, tile, ...; staged: tile, direct), with sizes if they are to
    /// be forced, too (tile:lanes=8:rows=2)
    #[arg(long, value_name = "NAME")]
    kernel: Option<String>,
    #[command(flatten)]
    adapter: AdapterArgs,
    /// Type of o, unless it is that of q
    #[arg(long, value_enum, value_name = "TYPE")]
    out_dtype: Option<OutDtype>,
    /// Convert k and v before the call, quantise them row by row if need be [default: as stored]
    #[arg(long, value_enum, value_name = "TYPE")]
    kv_dtype: Option<KvDtypeArg>,
    /// Also write the attention weights
    #[arg(long)]
    weights: bool,
    /// Say nothing when all went well
    #[arg(long)]
    quiet: bool,
    #[command(flatten)]
    contract: ContractArgs,
}

/// Computes and writes.
pub(crate) fn run(args: &RunArgs) -> Result<()> {
    let path = args.kernel.as_deref().map_or(Ok(args.path), |name| args.path.with_kernel(name))?;
    let output = OutputFile::new(&args.output)?;
    let mut archive = Archive::open(&args.input)?;
    let out_dtype = args.out_dtype.map(|OutDtype::F32| Dtype::F32);
    let kv_dtype = args.kv_dtype.map(Dtype::from);
    let loaded = load::load(&mut archive, &args.contract, args.layout, out_dtype, kv_dtype)?;
    let problem = AttentionProblem { lse: true, weights: args.weights, ..loaded.problem };
    let computed = backend::compute(path, &args.adapter, &problem, &loaded.data.inputs())?;
    output.write(&serialize(&problem, &computed.outputs, loaded.o_shape)?)?;
    if !args.quiet {
        let unused = load::unused(&archive);
        output::note(&format!("{}: by {}{unused}", args.output.display(), computed.by));
    }
    Ok(())
}

fn serialize(problem: &AttentionProblem, outputs: &Outputs, o_shape: Vec<usize>) -> Result<Vec<u8>> {
    let stored = match outputs.o.as_ref().dtype() {
        Dtype::F32 => Stored::F32,
        Dtype::F16 => Stored::F16,
        Dtype::Bf16 => Stored::BF16,
        other => unreachable!("o is a tensor of floats, not of {other}"),
    };
    let floats = |x| TensorRef::F32(x).bytes();
    let mut tensors = vec![("o", stored, o_shape, outputs.o.as_ref().bytes())];
    if let Some(lse) = &outputs.lse {
        let from = if problem.total_q.is_some() { 2 } else { 1 };
        tensors.push(("lse", Stored::F32, problem.shape(Operand::Lse)[from..].to_vec(), floats(lse)));
    }
    if let Some(weights) = &outputs.weights {
        tensors.push(("weights", Stored::F32, problem.shape(Operand::Weights).to_vec(), floats(weights)));
    }
    let views = tensors
        .into_iter()
        .map(|(name, dtype, shape, bytes)| Ok((name, TensorView::new(dtype, shape, bytes)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
        .map_err(Failure::input)?;
    safetensors::serialize(views, None).map_err(Failure::input)
}
