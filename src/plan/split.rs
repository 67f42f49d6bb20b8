//! What a plan adds to its kernels, or takes from them: unpacked keys, splits of the keys, and the map of a boolean mask.

use super::Plan;
use super::choice::stages;
use super::memory::MOST_UNPACKED;
use crate::blueprint::{Blueprint, Keys};
use crate::error::{Error, Result};
use crate::kernel::{Kernel, part_keys};
use crate::mask_map::{self, MapTile};

/// Threads that a split of the keys aims at: two workgroups of 128 for each of a large GPU's hundred and more
/// multiprocessors, so that enough loads are on their way. (Of workgroups of one subgroup that is many.)
const WANTED_THREADS: usize = 256 * 128;

/// Workgroups for a processor's threads.
const WANTED_ON_CPU: usize = 16;

/// Fewest keys of a split that nobody asked for: joining it costs about as much as a few dozen keys.
const LEAST_SPLIT: usize = 256;

impl Plan {
    /// Splits the keys where the rows alone would leave most of a device idle, or where the caller asks.
    pub(super) fn split(&mut self, asked: Option<usize>) {
        let p = &self.problem;
        let (Some(tile), false) = (self.tiles.map(), p.rows() == 0 || p.seq_kv == 0) else { return };
        let heads = (p.batch * p.heads_q) as u64;
        let groups = |stage: &Blueprint| stage.groups(p, heads, p.seq_q as u64) as usize;
        let fused = self.stages.iter().find(|stage| stage.kernel.is_fused());
        let groups = fused.map_or(1, groups).max(1);
        let threads = fused.map_or(1, Blueprint::threads).max(1) as usize;
        let wanted = if self.caps.on_cpu() { WANTED_ON_CPU } else { WANTED_THREADS / threads };
        // What the queries of an entry see at most: a window's keys, wherever it stands.
        let window = p.window.unwrap_or_default();
        let sides = window.left.zip(window.right.or(p.causal.map(|_| 0)));
        let keys = sides.map_or(p.seq_kv, |(left, right)| {
            left.saturating_add(right).saturating_add(p.seq_q).min(p.seq_kv)
        });
        let own = (wanted / groups).min(keys.div_ceil(LEAST_SPLIT));
        if asked.unwrap_or(own) < 2 {
            return;
        }
        // Whole steps of the kernel, and no more iterations than a part has. The shader shares the steps out
        // that there are; a window that begins inside a step takes part of one more.
        let step = tile.keys as usize;
        let most = part_keys(p, &self.caps) / step * step;
        let share = keys.div_ceil(asked.unwrap_or(own)).next_multiple_of(step).min(most);
        let whole = asked.is_none().then(|| self.clone());
        self.splits = (keys + if sides.is_some() { step - 1 } else { 0 }).div_ceil(share);
        self.split_least = if asked.is_some() { step } else { LEAST_SPLIT };
        let why = if asked.is_some() { "as asked" } else { "to fill the device" };
        self.reasons.push(format!(
            "the keys are split {} times, up to {share} keys each, over {groups} tiles of rows: {why}",
            self.splits
        ));
        for stage in &mut self.stages {
            if stage.kernel.is_fused() {
                *stage = stage.split();
            }
        }
        self.stages.push(Blueprint::new(Kernel::Merge, self.tiles, &self.problem, &self.caps));
        // A budget is no reason for an error where the problem does without.
        if let Some(whole) = whole.filter(|_| self.least_bytes() > self.budget) {
            *self = whole;
            self.reasons.push("the keys are not split: the scratch budget has no room for it".into());
        }
    }

    /// Tiles of rows of the kernel whose keys are split, of all rows.
    pub(super) fn split_tiles(&self) -> u64 {
        let p = &self.problem;
        let all = |stage: &Blueprint| stage.groups(p, (p.batch * p.heads_q) as u64, p.seq_q as u64);
        self.stages.iter().find(|stage| stage.split).map_or(0, all)
    }

    /// Has the splits that have keys counted on the GPU.
    pub(super) fn count_splits(&mut self) {
        let p = &self.problem;
        let count = Blueprint::new(Kernel::Count, self.tiles, p, &self.caps);
        let why = if self.splits < 2 {
            "the keys are not split"
        } else if !count.kv_lens && !count.looked_after && count.keys != Keys::Ragged {
            "the host knows the lengths"
        } else if self.chunks() != 1 || self.scratch_bytes() + 16 > self.budget {
            "it serves one chunk, and takes 16 bytes of scratch"
        } else {
            for stage in self.stages.iter_mut().filter(|stage| stage.split || stage.kernel == Kernel::Merge) {
                *stage = stage.counted();
            }
            // After the lengths have been looked after.
            let at = self.stages.iter().position(|stage| stage.split).unwrap_or(0);
            self.stages.insert(at, count.counted());
            "as asked"
        };
        self.reasons.push(format!("splits counted on the GPU, an indirect dispatch: {why}"));
    }

    /// Says what unpacked keys and values take; or leaves them as they are where there is no room for them.
    pub(super) fn unpack(&mut self) -> Result<()> {
        if !self.unpacks() {
            return Ok(());
        }
        let need = self.bytes_of_keys();
        let room =
            (self.budget / 2).min(self.caps.max_storage_binding).min(self.caps.max_buffer).min(MOST_UNPACKED);
        if need <= room {
            self.reasons.push(format!("keys and values are unpacked to f32 first, {need} B a head"));
            return Ok(());
        }
        self.tiles.row.unpacked = false;
        self.stages = stages(self.tiles, &self.problem, &self.caps)
            .map_err(|why| Error::KernelUnfit { kernel: self.family().to_string(), why })?;
        self.reasons.push(format!(
            "keys and values stay as they are: unpacked, a head's have {need} bytes, there is room for {room}"
        ));
        Ok(())
    }

    pub(super) fn map_bytes(&self) -> u64 {
        self.tiles.map().map_or(0, |tile| mask_map::words(&self.problem, tile).saturating_mul(4))
    }

    /// Puts the map of the boolean mask before the fused kernel where it may pay and there is room for it.
    pub(super) fn map_mask(&mut self) {
        let Some(tile) = self.tiles.map().filter(|_| self.problem.mask.is_some()) else { return };
        let reason = match self.mapped_stages(tile) {
            Ok(stages) => {
                self.stages = stages;
                let bytes = self.map_bytes();
                format!("the mask is mapped in tiles of {} x {} pairs, {bytes} B", tile.rows, tile.keys)
            }
            Err(why) => format!("the mask is not mapped: {why}"),
        };
        self.reasons.push(reason);
    }

    /// The stages with a map of the mask; or why there is none.
    pub(super) fn mapped_stages(&self, tile: MapTile) -> Result<Vec<Blueprint>, String> {
        if let Some(why) = mask_map::futile(&self.problem, tile) {
            return Err(why);
        }
        // What the rows need comes first, and most of the budget stays theirs.
        let need = self.map_bytes();
        let rows = self.row_bytes() + self.fixed_bytes() + self.bytes_of_keys();
        let room = (self.budget / 4)
            .min(self.budget.saturating_sub(rows))
            .min(self.caps.max_storage_binding)
            .min(self.caps.max_buffer);
        if need > room {
            return Err(format!("the map has {need} bytes, there is room for {room}"));
        }
        let map = Blueprint::new(Kernel::MaskMap, self.tiles, &self.problem, &self.caps);
        let mut stages = vec![map];
        stages.extend(self.stages.iter().map(
            |stage| {
                if stage.kernel.is_fused() { stage.mapped() } else { *stage }
            },
        ));
        match stages.iter().find_map(|stage| stage.unfit(&self.caps)) {
            Some(why) => Err(why),
            None => Ok(stages),
        }
    }
}
