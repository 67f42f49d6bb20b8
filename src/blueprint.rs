//! The blueprint of a kernel: everything that is compiled in.

use crate::cache::Cache;
use crate::caps::{Caps, MANY_REGISTERS};
use crate::dtype::Dtype;
use crate::error::Operand;
use crate::family::Family;
use crate::kernel::{ELEMENT_LANES, Kernel, Tiles, bundle_words, key_parts, looks_after_lengths};
use crate::linear::kernel::Linear;
use crate::mask_map;
use crate::problem::{AttentionProblem, KeyTerms};
use crate::slot::{Binding, Slot};

/// How a kernel reads or writes a tensor operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Io {
    pub(crate) dtype: Dtype,
    /// Rows are contiguous multiples of four elements.
    pub(crate) vec4: bool,
    /// f16 as the shader's own type rather than pairs in a u32.
    pub(crate) native: bool,
}

impl Io {
    fn of(problem: &AttentionProblem, caps: &Caps, operand: Operand) -> Option<Self> {
        let layout = problem.layout(operand)?;
        let dtype = match operand {
            Operand::O => problem.out_dtype,
            Operand::Bias => problem.bias?.dtype,
            Operand::K | Operand::V => problem.stored_kv(),
            _ => problem.dtype,
        };
        // The bias is read element by element, whatever its layout, and codes by the word.
        let vec4 = operand != Operand::Bias && dtype.is_float() && layout.is_vec4(problem.shape(operand)[3]);
        Some(Self { dtype, vec4, native: dtype == Dtype::F16 && caps.shader_f16 })
    }
}

/// Elements that rows of many heads are multiples of: a compiler that knows it adds numbers of quads to where a row
/// begins without a carry, and so without a sum of its own for each quad.
pub(crate) const ROW_BLOCK: usize = 64;

/// How a kernel finds the rows of k and v: [`Cache`], with what is compiled in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Keys {
    Contiguous,
    Ragged,
    /// Rows of the ring.
    Ring(u32),
    /// Rows of a page.
    Paged(u32),
}

/// Everything that is compiled into one pipeline: its cache key, and (by
/// [`compose`](crate::shader)) its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Blueprint {
    pub(crate) kernel: Kernel,
    pub(crate) tiles: Tiles,
    pub(crate) q: Option<Io>,
    pub(crate) k: Option<Io>,
    pub(crate) v: Option<Io>,
    pub(crate) o: Option<Io>,
    pub(crate) bias: Option<Io>,
    /// Scores read queries that another kernel has made of q.
    pub(crate) projected: bool,
    /// What they read of keys that another kernel has made of k.
    pub(crate) key_terms: KeyTerms,
    /// The row kernel's: rows of k, and of v, begin at multiples of [`ROW_BLOCK`] elements.
    pub(crate) in_blocks: [bool; 2],
    pub(crate) softcap: bool,
    pub(crate) alibi: bool,
    pub(crate) mask: bool,
    pub(crate) kv_lens: bool,
    /// [`Kernel::Lengths`] has looked after the lengths.
    pub(crate) looked_after: bool,
    /// How rows of k and v are found; contiguous where the kernel looks for none.
    pub(crate) keys: Keys,
    pub(crate) ragged_q: bool,
    pub(crate) sinks: bool,
    pub(crate) lse: bool,
    /// The status word is there.
    pub(crate) status: bool,
    /// Keys come in several parts.
    pub(crate) parts: bool,
    /// Key lengths, slopes and sinks lie in one buffer, made by [`Kernel::Bundle`]: with a binding for
    /// each there would be more of them than the device has.
    pub(crate) bundled: bool,
    /// [`Kernel::MaskMap`] has mapped the mask's tiles.
    pub(crate) mapped: bool,
    /// Tiles take rows of all heads of a group.
    pub(crate) packed: bool,
    /// Workgroups take splits of the keys, which [`Kernel::Merge`] joins.
    pub(crate) split: bool,
    /// [`Kernel::Count`] has counted the splits that have keys: no others are launched, and joined.
    pub(crate) counted: bool,
    /// How a kernel that is a product of matrices computes it.
    pub(crate) product: Option<Linear>,
}

impl Blueprint {
    /// The blueprint of `kernel`, with only what that kernel depends on filled in: problems that
    /// differ elsewhere share the pipeline.
    pub(crate) fn new(kernel: Kernel, tiles: Tiles, problem: &AttentionProblem, caps: &Caps) -> Self {
        let io = |wanted: bool, operand| {
            let io = Io::of(problem, caps, operand).filter(|_| wanted)?;
            // An adapter on a CPU loads elements one by one: two at a time are half of the loads.
            let by_element = kernel == Kernel::FusedRow || kernel.unpacks();
            Some(Io { native: io.native && !by_element, ..io })
        };
        let (bundles, maps) = (kernel == Kernel::Bundle, kernel == Kernel::MaskMap);
        let scores = kernel.is_scores() || kernel.is_fused();
        let merges = kernel == Kernel::Merge;
        let softmax = kernel == Kernel::SoftmaxRow || kernel.is_fused() || merges;
        let values = kernel.is_values() || kernel.is_fused();
        let lengths = kernel == Kernel::Lengths;
        // It asks how many keys an entry has, or gathers the list.
        let (of_queries, of_keys) = (kernel.is_of_queries(), kernel.is_of_keys());
        let counts = !of_queries && !maps && !merges;
        let looked_after = counts && !lengths && looks_after_lengths(problem);
        // Additive scores are of keys that lie in scratch, one after the other.
        let of_terms = scores && problem.key_terms() == KeyTerms::Projected;
        let unpacked = kernel == Kernel::FusedRow && tiles.row.unpacked;
        let reads = ((scores && !of_terms) || values) && !unpacked;
        let finds = reads || lengths || bundles || of_keys;
        let rows = Some(Io { dtype: Dtype::F32, vec4: true, native: false }).filter(|_| unpacked);
        let product = |operand, rows, inputs| {
            let sizes = [rows, inputs, problem.compared_dim()];
            Some(Linear::product(Io::of(problem, caps, operand)?, sizes, kernel == Kernel::Project, caps))
        };
        Self {
            kernel,
            // What becomes of queries and keys before they are compared is the same for every family.
            tiles: match kernel {
                Kernel::UnpackK => Tiles::unrolled(problem.head_dim),
                Kernel::UnpackV => Tiles::unrolled(problem.head_dim_v),
                _ if of_queries || of_keys => Tiles::none(Family::StagedDirect),
                _ => tiles,
            },
            product: match kernel {
                Kernel::Project | Kernel::ProjectQ => product(Operand::Q, problem.seq_q, problem.query_dim()),
                Kernel::ProjectK => product(Operand::K, problem.seq_kv, problem.head_dim),
                _ => None,
            },
            q: io(of_queries || (scores && !problem.projects()), Operand::Q),
            k: rows.or(io((scores && !of_terms) || (of_keys && kernel != Kernel::UnpackV), Operand::K)),
            v: rows.or(io(values || kernel == Kernel::UnpackV, Operand::V)),
            o: io(values || merges, Operand::O),
            bias: io(scores, Operand::Bias),
            projected: scores && problem.projects(),
            key_terms: if scores { problem.key_terms() } else { KeyTerms::None },
            in_blocks: [Operand::K, Operand::V].map(|operand| {
                let width = problem.shape(operand)[3];
                let layout = problem.layout(operand).filter(|_| kernel == Kernel::FusedRow && !unpacked);
                layout.is_some_and(|layout| layout.is_vec(ROW_BLOCK, width))
            }),
            softcap: scores && problem.softcap.is_some(),
            alibi: (scores || bundles) && problem.alibi,
            mask: (scores || maps) && problem.mask.is_some(),
            kv_lens: counts && problem.kv_lens && !looked_after,
            looked_after,
            keys: match problem.cache {
                Cache::Ragged { .. } if finds || (counts && !looked_after) => Keys::Ragged,
                Cache::Ring { capacity } if finds => Keys::Ring(capacity as u32),
                Cache::Paged { page_size, .. } if finds => Keys::Paged(page_size as u32),
                _ => Keys::Contiguous,
            },
            ragged_q: !maps && !of_keys && kernel != Kernel::Count && problem.total_q.is_some(),
            sinks: (softmax || bundles) && problem.sinks,
            lse: softmax && problem.lse,
            status: lengths && problem.status,
            parts: values && key_parts(problem, caps) > 1,
            bundled: false,
            mapped: false,
            packed: kernel.is_fused() && problem.packs(),
            split: false,
            counted: false,
        }
    }

    /// The same kernel for splits of the keys: what a finished row needs is the merging kernel's.
    pub(crate) fn split(self) -> Self {
        Self { split: true, parts: false, o: None, lse: false, sinks: false, ..self }
    }

    /// The same kernel where the splits that have keys have been counted.
    pub(crate) fn counted(self) -> Self {
        Self { counted: true, ..self }
    }

    /// Whether it reads what other kernels have made of k and v: [`Kernel::UnpackK`] and [`Kernel::UnpackV`].
    pub(crate) fn unpacked(&self) -> bool {
        self.kernel == Kernel::FusedRow && self.tiles.row.unpacked
    }

    /// The same kernel with its lists in one buffer.
    pub(crate) fn bundled(self) -> Self {
        Self { bundled: true, ..self }
    }

    /// The same kernel with the mask's map.
    pub(crate) fn mapped(self) -> Self {
        Self { mapped: true, ..self }
    }

    /// The bindings but the uniform block.
    pub(crate) fn storage(&self) -> impl Iterator<Item = Binding> {
        self.bindings().into_iter().filter(|binding| binding.slot != Slot::Params)
    }

    fn storage_buffers(&self) -> u32 {
        self.storage().count() as u32
    }

    /// Whether there are more bindings than the device has, and bundling could mend that.
    pub(crate) fn wants_bundle(&self, caps: &Caps) -> bool {
        self.storage_buffers() > caps.max_storage_buffers && self.lists().count() > 1
    }

    /// The lists that it reads, by the binding of each.
    pub(crate) fn lists(&self) -> impl Iterator<Item = Slot> {
        let lengths = if self.looked_after { Slot::Lengths } else { Slot::Operand(Operand::KvLens) };
        [
            (self.alibi, Slot::Operand(Operand::AlibiSlopes)),
            (self.sinks, Slot::Operand(Operand::Sinks)),
            (self.kv_lens || self.looked_after, lengths),
            (self.ragged_q, Slot::Operand(Operand::CuSeqlensQ)),
            (self.keys == Keys::Ragged, Slot::Operand(Operand::CuSeqlensK)),
            (matches!(self.keys, Keys::Paged(_)), Slot::Operand(Operand::BlockTable)),
        ]
        .into_iter()
        .filter_map(|(present, slot)| present.then_some(slot))
    }

    /// Threads of a workgroup.
    pub(crate) fn threads(&self) -> u32 {
        let t = &self.tiles;
        match self.kernel {
            Kernel::Project | Kernel::ProjectQ | Kernel::ProjectK => {
                self.product.map_or(0, |product| product.threads())
            }
            Kernel::NormalizeQ
            | Kernel::KeyNorms
            | Kernel::Weights
            | Kernel::Lengths
            | Kernel::Bundle
            | Kernel::MaskMap
            | Kernel::Count
            | Kernel::Merge => ELEMENT_LANES,
            Kernel::UnpackK | Kernel::UnpackV => 1,
            Kernel::FusedTile | Kernel::FusedSubgroup => t.fused.threads(),
            Kernel::FusedMatrix => t.matrix.threads(),
            Kernel::FusedRow => t.row.threads,
            Kernel::ScoresTile => t.scores_lanes * t.scores_lanes,
            Kernel::ScoresDirect => t.scores_lanes,
            Kernel::SoftmaxRow => t.softmax_lanes * t.softmax_rows,
            Kernel::ValuesTile => t.values_lanes * t.values_lanes,
            Kernel::ValuesDirect => t.values_lanes,
        }
    }

    /// Bytes of workgroup memory.
    pub(crate) fn workgroup_bytes(&self) -> u32 {
        let t = &self.tiles;
        match self.kernel {
            Kernel::Project | Kernel::ProjectQ | Kernel::ProjectK => {
                self.product.map_or(0, |product| product.workgroup_bytes())
            }
            Kernel::ScoresTile => 16 * 2 * t.scores_rows * (t.scores_step + 1),
            Kernel::SoftmaxRow => 4 * self.threads(),
            // A bit for each tile of a word, twice.
            Kernel::MaskMap => 8,
            Kernel::Lengths | Kernel::Count => 4,
            Kernel::FusedTile | Kernel::FusedSubgroup => t.fused.workgroup_bytes(),
            Kernel::FusedMatrix => t.matrix.workgroup_bytes(),
            Kernel::ValuesTile => {
                16 * (t.values_rows * (t.values_step / 4 + 1) + t.values_step * t.values_lanes)
            }
            _ => 0,
        }
    }

    /// Workgroups for `heads` heads of `rows` rows.
    pub(crate) fn groups(&self, problem: &AttentionProblem, heads: u64, rows: u64) -> u64 {
        let t = &self.tiles;
        let keys = problem.seq_kv as u64;
        let tiles = |n: u64, tile: u32| n.div_ceil(u64::from(tile));
        let group = if self.packed { problem.group_size() as u64 } else { 1 };
        let product = |rows| self.product.map_or(0, |of| of.tiles(rows, problem.compared_dim() as u64));
        let fused = |tile: u32| heads / group * tiles(rows * group, tile.max(1));
        match self.kernel {
            Kernel::Project | Kernel::ProjectQ => heads * product(rows),
            Kernel::NormalizeQ => tiles(heads * rows, ELEMENT_LANES),
            Kernel::KeyNorms | Kernel::UnpackK | Kernel::UnpackV => {
                problem.key_term_heads(heads) * tiles(keys, ELEMENT_LANES)
            }
            Kernel::ProjectK => problem.key_term_heads(heads) * product(keys),
            Kernel::ScoresTile | Kernel::ScoresDirect => {
                heads * tiles(rows, t.scores_rows) * tiles(keys, t.scores_keys)
            }
            Kernel::SoftmaxRow => tiles(heads * rows, t.softmax_rows),
            Kernel::ValuesTile | Kernel::ValuesDirect => {
                heads * tiles(rows, t.values_rows) * tiles(problem.head_dim_v as u64, 4 * t.values_lanes)
            }
            Kernel::Weights => heads * rows * tiles(keys, ELEMENT_LANES),
            Kernel::Lengths => problem.batch as u64,
            Kernel::Count => 1,
            Kernel::Bundle => tiles(bundle_words(problem), ELEMENT_LANES),
            Kernel::MaskMap => t.map().map_or(0, |tile| mask_map::words(problem, tile)),
            Kernel::FusedTile | Kernel::FusedSubgroup => fused(t.fused.tile_q()),
            Kernel::FusedMatrix => fused(t.matrix.tile_q()),
            Kernel::FusedRow => fused(t.row.tile_q()),
            Kernel::Merge => tiles(heads * rows * (problem.head_dim_v as u64).div_ceil(4), ELEMENT_LANES),
        }
    }

    /// Why this kernel cannot run on a device; `None` when it can.
    pub(crate) fn unfit(&self, caps: &Caps) -> Option<String> {
        let [x, y, _] = self.workgroup_size();
        let t = self.tiles.fused;
        if let Some(why) = t.subgroup_unfit(caps) {
            return Some(format!("{}: {why}", self.kernel.name()));
        }
        for (what, need, got) in [
            ("threads a workgroup", self.threads(), caps.max_invocations),
            ("threads along x", x, caps.max_workgroup_size[0]),
            ("threads along y", y, caps.max_workgroup_size[1]),
            ("bytes of workgroup memory", self.workgroup_bytes(), caps.max_workgroup_bytes),
            ("storage buffers", self.storage_buffers(), caps.max_storage_buffers),
        ] {
            if need > got {
                return Some(format!("{} needs {need} {what}, the device has {got}", self.kernel.name()));
            }
        }
        if self.kernel.is_fused_tile() && t.registers() > MANY_REGISTERS {
            let need = t.registers();
            return Some(format!(
                "{} needs {need} registers a thread, {MANY_REGISTERS} is the most",
                self.kernel.name()
            ));
        }
        if self.kernel == Kernel::FusedRow { self.tiles.row.unfit() } else { None }
    }

    fn workgroup_size(&self) -> [u32; 3] {
        match self.kernel {
            Kernel::ScoresTile => [self.tiles.scores_lanes, self.tiles.scores_lanes, 1],
            Kernel::ValuesTile => [self.tiles.values_lanes, self.tiles.values_lanes, 1],
            _ => [self.threads(), 1, 1],
        }
    }

    /// The kernel's bindings, in order of their numbers.
    pub(crate) fn bindings(&self) -> Vec<Binding> {
        let read = |slot| Binding { slot, writes: false };
        let write = |slot| Binding { slot, writes: true };
        let mut all = vec![read(Slot::Params)];
        for (present, operand) in [
            (self.q.is_some(), Operand::Q),
            (self.k.is_some() && !self.unpacked(), Operand::K),
            (self.v.is_some() && !self.unpacked(), Operand::V),
            (self.bias.is_some(), Operand::Bias),
            (self.mask, Operand::Mask),
            (self.kernel == Kernel::Project, Operand::W),
            (self.kernel == Kernel::ProjectQ, Operand::Wq),
            (self.kernel == Kernel::ProjectK, Operand::Wk),
            (self.key_terms == KeyTerms::Projected, Operand::ScoreV),
        ] {
            if present {
                all.push(read(Slot::Operand(operand)));
            }
        }
        if !self.bundled {
            all.extend(self.lists().map(read));
        }
        for (present, binding) in [
            (self.status, write(Slot::Operand(Operand::Status))),
            (self.projected, read(Slot::Projected)),
            (self.key_terms != KeyTerms::None, read(Slot::KeyTerms)),
            (self.unpacked(), read(Slot::UnpackedK)),
            (self.unpacked(), read(Slot::UnpackedV)),
            (self.lse, write(Slot::Operand(Operand::Lse))),
            (self.parts || self.split, write(Slot::Carried)),
            (self.bundled, read(Slot::Bundle)),
            (self.mapped, read(Slot::MaskMap)),
            // The split kernel does not look at it: its dispatch does.
            (self.counted && self.kernel == Kernel::Merge, read(Slot::Launch)),
        ] {
            if present {
                all.push(binding);
            }
        }
        match self.kernel {
            Kernel::Project | Kernel::NormalizeQ | Kernel::ProjectQ => all.push(write(Slot::Projected)),
            Kernel::KeyNorms | Kernel::ProjectK => all.push(write(Slot::KeyTerms)),
            Kernel::UnpackK => all.push(write(Slot::UnpackedK)),
            Kernel::UnpackV => all.push(write(Slot::UnpackedV)),
            Kernel::ScoresTile | Kernel::ScoresDirect => all.push(write(Slot::Scores)),
            Kernel::SoftmaxRow => all.extend([write(Slot::Scores), write(Slot::InverseSums)]),
            Kernel::ValuesTile | Kernel::ValuesDirect => {
                let out = Slot::Operand(Operand::O);
                all.extend([read(Slot::Scores), read(Slot::InverseSums), write(out)]);
            }
            Kernel::Lengths => all.push(write(Slot::Lengths)),
            Kernel::Count => all.push(write(Slot::Launch)),
            Kernel::Bundle => all.push(write(Slot::Bundle)),
            Kernel::MaskMap => all.push(write(Slot::MaskMap)),
            Kernel::FusedTile | Kernel::FusedSubgroup | Kernel::FusedMatrix | Kernel::FusedRow => {
                if !self.split {
                    all.push(write(Slot::Operand(Operand::O)))
                }
            }
            Kernel::Merge => all.extend([read(Slot::Carried), write(Slot::Operand(Operand::O))]),
            Kernel::Weights => all.extend([
                read(Slot::Scores),
                read(Slot::InverseSums),
                write(Slot::Operand(Operand::Weights)),
            ]),
        }
        all.sort_by_key(|binding| binding.slot.number());
        all
    }
}
