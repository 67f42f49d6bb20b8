//! A plan in words.

use super::{Path, Plan};
use crate::cache::Cache;
use crate::kernel::{ELEMENT_LANES, Kernel};

impl std::fmt::Display for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let p = &self.problem;
        let t = &self.tiles;
        writeln!(
            f,
            "attention of {} x {} heads ({} key-value), {} queries, {} keys, head_dim {}, head_dim_v {}, {}",
            p.batch, p.heads_q, p.heads_kv, p.seq_q, p.seq_kv, p.head_dim, p.head_dim_v, p.dtype
        )?;
        if (p.cache, p.stored_kv()) != (Cache::Contiguous, p.dtype) {
            writeln!(f, "keys and values in {}, {}", p.cache, p.stored_kv())?;
        }
        if let Some(total) = p.total_q {
            writeln!(f, "ragged queries, {total} in all")?;
        }
        writeln!(f, "on {}", self.caps.adapter)?;
        let how = match self.path() {
            Path::Staged => "scores in scratch memory, then softmax, then values",
            Path::Fused => "online softmax, no score leaves the kernel",
        };
        writeln!(f, "path {}: {how}", self.path())?;
        for reason in &self.reasons {
            writeln!(f, "  {reason}")?;
        }
        for stage in &self.stages {
            let tile = match stage.kernel {
                Kernel::ScoresTile | Kernel::ScoresDirect => {
                    format!("{} queries x {} keys", t.scores_rows, t.scores_keys)
                }
                Kernel::SoftmaxRow => format!("{} rows x {} lanes", t.softmax_rows, t.softmax_lanes),
                Kernel::ValuesTile | Kernel::ValuesDirect => format!(
                    "{} queries x {} of head_dim_v, {} keys a step",
                    t.values_rows,
                    4 * t.values_lanes,
                    t.values_step
                ),
                Kernel::Project | Kernel::ProjectQ | Kernel::ProjectK => {
                    stage.product.map_or(String::new(), |product| format!("as {}", product.kernel()))
                }
                Kernel::Weights | Kernel::Bundle | Kernel::Merge => "element by element".into(),
                Kernel::NormalizeQ => "a query each".into(),
                Kernel::KeyNorms => "a key each".into(),
                Kernel::UnpackK | Kernel::UnpackV => format!("{ELEMENT_LANES} keys each"),
                Kernel::Lengths => "an entry each".into(),
                Kernel::Count => "once".into(),
                Kernel::MaskMap => match t.map() {
                    Some(tile) => format!("{} queries x {} keys, two bits each", tile.rows, tile.keys),
                    None => "no tiles".into(),
                },
                Kernel::FusedTile | Kernel::FusedSubgroup => format!(
                    "{} queries x {} keys, {} of a row at a time{}, queries in {}, {} registers a thread",
                    t.fused.tile_q(),
                    t.fused.tile_kv(),
                    4 * t.fused.slice,
                    if t.fused.both { " of keys and values together" } else { "" },
                    if t.fused.held > 0 { "workgroup memory" } else { "caches" },
                    t.fused.registers()
                ),
                Kernel::FusedMatrix => format!(
                    "{} queries x {} keys, matrices of {e} x {e}, {} columns of subgroups, queries in {}, {} registers \
                     a thread for fragments",
                    t.matrix.tile_q(),
                    t.matrix.tile_kv,
                    t.matrix.columns,
                    if t.matrix.kept_q { "fragments" } else { "workgroup memory" },
                    t.matrix.registers(),
                    e = t.matrix.edge,
                ),
                Kernel::FusedRow => format!(
                    "{} queries x {} keys, {} queries and {} variables a thread",
                    t.row.tile_q(),
                    t.row.keys,
                    t.row.rows,
                    t.row.variables()
                ),
            };
            writeln!(
                f,
                "  {:<14} {tile}; {} threads, {} B of workgroup memory (of {}), {} storage buffers (of {})",
                stage.kernel.name(),
                stage.threads(),
                stage.workgroup_bytes(),
                self.caps.max_workgroup_bytes,
                stage.bindings().len() - 1,
                self.caps.max_storage_buffers,
            )?;
        }
        writeln!(
            f,
            "{} chunks of {} heads x {} rows; scratch {} B (budget {} B), outputs {} B, {} dispatches",
            self.chunks(),
            self.heads_per_chunk,
            self.rows_per_chunk,
            self.scratch_bytes(),
            self.budget,
            self.output_bytes(),
            self.dispatches().count(),
        )
    }
}
