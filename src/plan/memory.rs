//! What a plan's kernels are bound to and told: uniform blocks, windows of operands, scratch, and the chunks
//! that keep scratch inside its budget.

use super::choice::MOST_ROW_ELEMENTS;
use super::{Path, Plan, Window, dispatch_flop};
use crate::error::{Error, Operand, Result};
use crate::kernel::{bundle_words, key_parts, looks_after_lengths, part_keys};
use crate::layout::Layout;
use crate::params::{ParamLayout, Params};
use crate::problem::MAX_SEQ;
use crate::slot::Slot;

/// Most bytes of unpacked keys, or values: those that the row kernel's masked index reaches.
pub(super) const MOST_UNPACKED: u64 = 4 * MOST_ROW_ELEMENTS as u64;

impl Plan {
    /// Bytes from one uniform block to the next.
    pub(crate) fn params_step(&self) -> u32 {
        (size_of::<Params>() as u32).next_multiple_of(self.caps.uniform_alignment.max(4))
    }

    /// How many uniform blocks there are: one for each part of the keys of each chunk.
    pub(crate) fn blocks(&self) -> usize {
        self.chunks() * self.parts()
    }

    /// Parts of the keys that are worked on one after the other.
    pub(super) fn parts(&self) -> usize {
        if self.splits > 0 { 1 } else { key_parts(&self.problem, &self.caps) }
    }

    /// A uniform block.
    pub(crate) fn params(&self, block: usize) -> Params {
        let p = &self.problem;
        let parts = self.parts();
        let chunk = self.chunk(block / parts);
        let part = block % parts;
        let layout = |operand: Operand| {
            let layout = p.layout(operand).unwrap_or(Layout { offset: 0, strides: [0; 4] });
            let first = self.window(operand).start as usize / p.element_bytes(operand);
            ParamLayout::new(layout, p.shape(operand), first)
        };
        let step = self.tiles.map().map_or(1, |tile| tile.keys);
        let part_keys = part_keys(p, &self.caps);
        Params {
            head_first: chunk.head as u32,
            head_count: chunk.heads as u32,
            row_first: chunk.row as u32,
            row_count: chunk.rows as u32,
            score_stride: self.score_stride() as u32,
            projected_stride: self.projected_stride() as u32,
            key_first: (part * part_keys) as u32,
            key_end: if part + 1 == parts { u32::MAX } else { ((part + 1) * part_keys) as u32 },
            splits: self.splits as u32,
            split_step: step,
            split_least: (self.split_least as u32).div_ceil(step),
            split_tiles: self.split_tiles() as u32,
            most_groups: self.caps.max_dispatch,
            q: layout(Operand::Q),
            k: layout(Operand::K),
            v: layout(Operand::V),
            o: layout(Operand::O),
            bias: layout(Operand::Bias),
            mask: layout(Operand::Mask),
            ..Params::of(p)
        }
    }

    /// The bytes of an operand's buffer that its kernels bind.
    pub(crate) fn window(&self, operand: Operand) -> Window {
        let p = &self.problem;
        p.layout(operand).map_or(Window::NONE, |layout| {
            Window::of(layout, p.shape(operand), p.element_bytes(operand), &self.caps)
        })
    }

    /// Bytes of a scratch buffer; 0 when this plan has none of that kind.
    pub(crate) fn scratch_of(&self, slot: Slot) -> u64 {
        let rows = (self.heads_per_chunk * self.rows_per_chunk) as u64;
        if self.problem.rows() == 0 {
            return 0;
        }
        let staged = self.path() == Path::Staged;
        match slot {
            Slot::Scores if staged => 4 * rows * self.score_stride(),
            // Whole quads, so that the buffer can be bound whatever it is read as.
            Slot::InverseSums if staged => 4 * rows.next_multiple_of(4),
            Slot::Scores | Slot::InverseSums => 0,
            Slot::Bundle if self.stages.iter().any(|stage| stage.bundled) => 4 * bundle_words(&self.problem),
            Slot::Bundle => 0,
            Slot::MaskMap if self.mask_tile().is_some() => self.map_bytes(),
            Slot::MaskMap => 0,
            Slot::Lengths if looks_after_lengths(&self.problem) => 4 * self.problem.batch as u64,
            Slot::Lengths => 0,
            Slot::Launch if self.stages.iter().any(|stage| stage.counted) => 16,
            Slot::Launch => 0,
            Slot::Projected => 4 * rows * self.projected_stride(),
            Slot::KeyTerms => {
                self.problem.key_term_heads(self.heads_per_chunk as u64) * self.key_term_bytes()
            }
            Slot::UnpackedK | Slot::UnpackedV => {
                self.problem.key_term_heads(self.heads_per_chunk as u64) * self.unpacked_bytes(slot)
            }
            Slot::Carried => rows * self.carried_bytes(),
            Slot::Params | Slot::Operand(_) => 0,
            // A layer's, and a gradient's own.
            Slot::Gathered | Slot::LayerProjected | Slot::LayerTurned | Slot::LayerAttended => 0,
        }
    }

    /// Elements from one row of scores to the next: whole value steps of either family.
    pub(super) fn score_stride(&self) -> u64 {
        (self.problem.seq_kv as u64).next_multiple_of(16).max(16)
    }

    pub(super) fn projected_stride(&self) -> u64 {
        let width = self.problem.compared_dim() as u64;
        if self.problem.projects() { width.next_multiple_of(4) } else { 0 }
    }

    /// Bytes of the terms of a head's keys. Not none where there are no keys: the buffer has to be bound.
    pub(super) fn key_term_bytes(&self) -> u64 {
        match self.problem.key_term_width() as u64 {
            0 => 0,
            width => (4 * self.problem.seq_kv as u64 * width).next_multiple_of(16).max(16),
        }
    }

    /// Whether keys and values are unpacked first.
    pub(super) fn unpacks(&self) -> bool {
        self.tiles.row.unpacked
    }

    /// Bytes of a head's unpacked keys or values; not none where there are no keys.
    fn unpacked_bytes(&self, slot: Slot) -> u64 {
        let width = match slot {
            Slot::UnpackedK => self.problem.head_dim,
            _ => self.problem.head_dim_v,
        };
        // Whole steps of the row kernel, of which four keys are the longest.
        let rows = (self.problem.seq_kv as u64).next_multiple_of(4);
        let quads = rows * (width as u64).div_ceil(4);
        if self.unpacks() { 16 * quads.max(1) } else { 0 }
    }

    /// Bytes of all that is made of a head's keys and values.
    pub(super) fn bytes_of_keys(&self) -> u64 {
        self.key_term_bytes() + self.unpacked_bytes(Slot::UnpackedK) + self.unpacked_bytes(Slot::UnpackedV)
    }

    /// At most `heads` heads, as many as fit the budget and a binding together with what is made of their keys:
    /// whole groups, or less than one.
    fn heads_with_key_terms(&self, heads: usize, room: u64, binding: u64) -> usize {
        let own = self.bytes_of_keys();
        if own == 0 {
            return heads;
        }
        let binding = if self.unpacks() { binding.min(MOST_UNPACKED) } else { binding };
        let group = self.problem.key_term_group() as u64;
        let rows = (self.problem.seq_q as u64).saturating_mul(self.row_bytes());
        let groups = (heads as u64 / group)
            .min(room / rows.saturating_mul(group).saturating_add(own))
            .min(binding / own);
        if groups > 0 {
            return (groups * group) as usize;
        }
        let fits = |&heads: &u64| {
            let terms = self.problem.key_term_heads(heads).saturating_mul(own);
            terms <= binding && rows.saturating_mul(heads).saturating_add(terms) <= room
        };
        (1..group.min(heads as u64 + 1)).rev().find(fits).unwrap_or(1) as usize
    }

    /// Bytes of a row's sums between two parts of the keys, or of all splits.
    pub(super) fn carried_bytes(&self) -> u64 {
        // The fused kernels carry a row's maximum and sum as well.
        let quads = (self.problem.head_dim_v as u64).div_ceil(4) + u64::from(self.path() == Path::Fused);
        match self.splits as u64 {
            0 if self.parts() > 1 => 16 * quads,
            splits => 16 * quads * splits,
        }
    }

    /// Rows that one dispatch of a fused kernel may take before a slow GPU's watchdog (2 s, some) sees
    /// it: a part of the keys of so many rows is at most [`dispatch_flop`].
    pub(super) fn rows_of_a_dispatch(&self) -> u64 {
        if self.path() == Path::Staged {
            return u64::MAX;
        }
        let p = &self.problem;
        let keys = p.seq_kv.clamp(1, if self.splits > 0 { MAX_SEQ } else { part_keys(p, &self.caps) }) as u64;
        let rows = dispatch_flop(&self.caps, self.family()) / (2 * keys * (p.head_dim + p.head_dim_v) as u64);
        // Of a ragged batch few of `batch * seq_q` rows may be there.
        match p.total_q {
            Some(total) if (total as u64).saturating_mul(p.heads_q as u64) <= rows => u64::MAX,
            _ => rows.max(64),
        }
    }

    /// That workgroups can be numbered over three dimensions.
    pub(super) fn check_groups(&self) -> Result<()> {
        if self.chunks() == 0 {
            return Ok(());
        }
        let (chunk, got) = (self.chunk(0), u64::from(self.caps.max_dispatch).saturating_pow(3));
        for stage in &self.stages {
            let need = self.groups(stage, chunk);
            if need > got {
                let what = format!("{}: workgroups of a dispatch", stage.kernel.name());
                return Err(Error::LimitExceeded { what, need, got });
            }
        }
        Ok(())
    }

    pub(super) fn check_windows(&self) -> Result<()> {
        for operand in self.problem.operands() {
            let window = self.window(operand);
            let need = window.end - window.start;
            if need > self.caps.max_storage_binding {
                return Err(Error::LimitExceeded {
                    what: format!("{operand}: bytes of one storage binding"),
                    need,
                    got: self.caps.max_storage_binding,
                });
            }
        }
        Ok(())
    }

    /// Bytes of a row in the scratch buffer where it takes most.
    pub(super) fn widest_row_bytes(&self) -> u64 {
        let score_bytes = if self.path() == Path::Staged { 4 * self.score_stride() } else { 0 };
        score_bytes.max(4 * self.projected_stride()).max(self.carried_bytes())
    }

    /// Bytes of scratch for a row.
    pub(super) fn row_bytes(&self) -> u64 {
        let score_bytes = if self.path() == Path::Staged { 4 * self.score_stride() + 4 } else { 0 };
        score_bytes + 4 * self.projected_stride() + self.carried_bytes()
    }

    /// Bytes of scratch beside the rows'.
    pub(super) fn fixed_bytes(&self) -> u64 {
        // The row sums are allocated in whole quads.
        let sums = if self.path() == Path::Staged { 12 } else { 0 };
        sums + [Slot::Bundle, Slot::MaskMap, Slot::Lengths, Slot::Launch]
            .map(|slot| self.scratch_of(slot))
            .iter()
            .sum::<u64>()
    }

    /// Bytes of scratch for one row.
    pub(super) fn least_bytes(&self) -> u64 {
        self.row_bytes() + self.fixed_bytes() + self.bytes_of_keys()
    }

    /// Whole heads if at least one fits the budget, else rows of one head.
    pub(super) fn choose_chunks(&mut self) -> Result<()> {
        let p = &self.problem;
        if p.rows() == 0 {
            return Ok(());
        }
        let binding = self.caps.max_storage_binding.min(self.caps.max_buffer);
        let (widest, terms) = (self.widest_row_bytes(), self.bytes_of_keys());
        // Kernels index scratch by u32.
        let of_terms = binding.min(4 * u64::from(u32::MAX));
        for (what, need, got) in
            [("one row", widest, binding), ("what is made of one head's keys", terms, of_terms)]
        {
            if need > got {
                let what = format!("scratch: bytes of {what} in one storage binding");
                return Err(Error::LimitExceeded { what, need, got });
            }
        }
        let (row_bytes, fixed) = (self.row_bytes(), self.fixed_bytes());
        let least = self.least_bytes();
        if least > self.budget {
            return Err(Error::LimitExceeded {
                what: "scratch_budget: bytes of scratch for one row".into(),
                need: least,
                got: self.budget,
            });
        }
        let by_scratch = |bytes: u64, each: u64| bytes.checked_div(each).unwrap_or(u64::MAX);
        let rows = by_scratch(self.budget - fixed - terms, row_bytes)
            .min(by_scratch(binding, widest))
            .min(by_scratch(u64::from(u32::MAX), widest / 4))
            .min(self.rows_of_a_dispatch());
        let rows = usize::try_from(rows).unwrap_or(usize::MAX);
        // Packed tiles have whole groups, where those fit.
        let group = if p.packs() && rows >= p.owned_rows() { p.group_size() } else { 1 };
        if group == 1 {
            self.stages.iter_mut().for_each(|stage| stage.packed = false);
        }
        if rows >= p.seq_q {
            let heads = (rows / p.seq_q / group * group).min(p.batch * p.heads_q);
            self.heads_per_chunk = self.heads_with_key_terms(heads, self.budget - fixed, of_terms);
            self.rows_per_chunk = p.seq_q;
        } else {
            // Whole tiles where at least one fits.
            let tile = self
                .tiles
                .scores_rows
                .max(self.tiles.values_rows)
                .max(self.tiles.fused.tile_q())
                .max(self.tiles.matrix.tile_q())
                .max(self.tiles.row.tile_q()) as usize;
            self.rows_per_chunk = match rows {
                _ if rows >= tile => rows / tile * tile,
                // So that no chunk straddles two tiles of the mask's map.
                _ if self.scratch_of(Slot::MaskMap) > 0 => {
                    (1..=rows).rev().find(|&rows| tile.is_multiple_of(rows)).unwrap_or(1)
                }
                _ => rows,
            };
        }
        // Dynamic offsets of uniform blocks are u32.
        let blocks = self.blocks() as u64 * u64::from(self.params_step());
        let most = self.caps.max_buffer.min(u64::from(u32::MAX));
        if blocks > most {
            return Err(Error::LimitExceeded {
                what: "scratch_budget: bytes of uniform blocks for so many chunks".into(),
                need: blocks,
                got: most,
            });
        }
        Ok(())
    }
}
