//! [`Tile`]: a kernel family with sizes of the caller's or the tuner's choice.

use std::fmt;
use std::str::FromStr;

use crate::caps::{Caps, NEWER_MESA};
use crate::error::{Error, Result};
use crate::family::Family;
use crate::fused::{self, FusedRow, FusedTile};
use crate::fused_matrix::FusedMatrix;
use crate::kernel::{Tiles, tiles};
use crate::plan::{Plan, PlanOptions};
use crate::problem::AttentionProblem;

/// A kernel family, and those of its sizes that are not left to the planner. What fits neither kernel
/// nor device is [`Error::KernelUnfit`](crate::Error::KernelUnfit) when it is planned.
///
/// As text, sizes follow the family: `fused:tile:lanes=8:rows=2`.
///
/// ```
/// use wgpu_attention::{AttentionProblem, Caps, Plan, PlanOptions, Tile};
/// let problem = AttentionProblem::new(1, 8, 8, 512, 512, 64, 64);
/// let tile: Tile = "fused:tile:lanes=4:rows=2".parse()?;
/// let options = PlanOptions { tile: Some(tile), ..PlanOptions::default() };
/// let plan = Plan::new(&problem, &Caps::minimal(), &options)?;
/// assert_eq!(plan.tile().lanes, Some(4));
/// # Ok::<(), wgpu_attention::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tile {
    /// The family.
    pub family: Family,
    /// Query rows of a thread; for [`Family::FusedMatrix`] those of a subgroup.
    pub rows: Option<u32>,
    /// Threads that share a query row ([`Family::FusedTile`] and [`Family::FusedSubgroup`]: four keys of
    /// each make a step; [`Family::FusedMatrix`]: with more of them, several subgroups share rows).
    pub lanes: Option<u32>,
    /// Keys of a step ([`Family::FusedRow`] and [`Family::FusedMatrix`]).
    pub keys: Option<u32>,
    /// Keys of a step whose scores are summed side by side ([`Family::FusedRow`]).
    pub side: Option<u32>,
    /// Quads of head_dim or head_dim_v that are staged at a time ([`Family::FusedTile`] and
    /// [`Family::FusedSubgroup`]).
    pub slice: Option<u32>,
    /// Threads of a workgroup (all but the staged kernels).
    pub threads: Option<u32>,
    /// 1: queries lie in workgroup memory. 0: threads read them anew for each step of keys, from the caches, and more
    /// workgroups fit a multiprocessor ([`Family::FusedTile`] and [`Family::FusedSubgroup`]).
    pub held: Option<u32>,
    /// 1: keys and values are made rows of f32 first, in scratch memory. 0: threads convert them as they read
    /// ([`Family::FusedRow`]).
    pub unpacked: Option<u32>,
}

impl Tile {
    /// The names of sizes in text, in their order there.
    const NAMES: [&'static str; 8] =
        ["rows", "lanes", "keys", "side", "slice", "threads", "held", "unpacked"];

    /// A family, with every size left to the planner.
    pub fn of(family: Family) -> Self {
        Self {
            family,
            rows: None,
            lanes: None,
            keys: None,
            side: None,
            slice: None,
            threads: None,
            held: None,
            unpacked: None,
        }
    }

    fn sizes(&self) -> [Option<u32>; 8] {
        let Self { rows, lanes, keys, side, slice, threads, held, unpacked, .. } = *self;
        [rows, lanes, keys, side, slice, threads, held, unpacked]
    }

    fn size_mut(&mut self, name: &str) -> Option<&mut Option<u32>> {
        match name {
            "rows" => Some(&mut self.rows),
            "lanes" => Some(&mut self.lanes),
            "keys" => Some(&mut self.keys),
            "side" => Some(&mut self.side),
            "slice" => Some(&mut self.slice),
            "threads" => Some(&mut self.threads),
            "held" => Some(&mut self.held),
            "unpacked" => Some(&mut self.unpacked),
            _ => None,
        }
    }

    /// Tiles that are worth timing for a problem on a device: those that fit, the planner's own choice of
    /// each family first. Staged kernels have no sizes to choose.
    ///
    /// ```
    /// use wgpu_attention::{AttentionProblem, Caps, Tile};
    /// let problem = AttentionProblem::new(1, 8, 8, 512, 512, 64, 64);
    /// assert!(Tile::candidates(&problem, &Caps::minimal()).len() > 5);
    /// ```
    pub fn candidates(problem: &AttentionProblem, caps: &Caps) -> Vec<Self> {
        let mut all: Vec<Self> = Family::ALL.iter().copied().map(Self::of).collect();
        let some = |sizes: &[u32]| sizes.iter().map(|&n| Some(n)).collect::<Vec<_>>();
        for family in [Family::FusedTile, Family::FusedSubgroup] {
            for lanes in some(&[4, 8, 16]) {
                for rows in some(&[1, 2, 4, 8]) {
                    all.push(Self { rows, lanes, ..Self::of(family) });
                }
            }
            for held in some(&[0, 1]) {
                all.push(Self { held, ..Self::of(family) });
            }
        }
        // More than eight pairs a step are text that compilers take minutes and gigabytes for.
        for (keys, most) in [(1, 8), (2, 4), (4, 2)] {
            for rows in [1, 2, 3, 4, 6, 8].into_iter().filter(|&rows| rows <= most) {
                all.push(Self { rows: Some(rows), keys: Some(keys), ..Self::of(Family::FusedRow) });
            }
        }
        // Newer Mesa's compiler takes seconds over as much as instruction caches hold, which are not alike.
        if caps.mesa().is_some_and(|version| version >= NEWER_MESA) {
            let widths = problem.head_dim.saturating_add(problem.head_dim_v);
            for (rows, keys) in [(6, 2), (8, 2), (4, 4), (5, 4), (6, 4)] {
                if widths <= 2560 / (rows * keys) as usize {
                    all.push(Self { rows: Some(rows), keys: Some(keys), ..Self::of(Family::FusedRow) });
                }
            }
        }
        for side in some(&[2, 4]) {
            all.push(Self { side, ..Self::of(Family::FusedRow) });
        }
        for threads in some(&[4, 16, 32]) {
            all.push(Self { threads, ..Self::of(Family::FusedRow) });
        }
        for unpacked in some(&[0, 1]).into_iter().filter(|_| !fused::row_reads_plainly(problem)) {
            all.push(Self { unpacked, ..Self::of(Family::FusedRow) });
        }
        // For matrices of 16 and of 8 in subgroups of 32, and of 8 in vectors of 8.
        for (rows, lanes, threads) in [
            (16, 2, 64),
            (16, 2, 128),
            (16, 2, 256),
            (16, 4, 256),
            (32, 1, 128),
            (8, 4, 128),
            (8, 8, 256),
            (8, 4, 64),
            (8, 1, 32),
        ] {
            // More than 64 scores of a thread are more registers than they are worth.
            for keys in [32, 64, 128].into_iter().filter(|keys| keys / lanes <= 64) {
                let (rows, lanes, keys, threads) = (Some(rows), Some(lanes), Some(keys), Some(threads));
                all.push(Self { rows, lanes, keys, threads, ..Self::of(Family::FusedMatrix) });
            }
        }
        let mut kept: Vec<(Self, Tiles)> = Vec::new();
        for tile in all {
            let options = PlanOptions { tile: Some(tile), ..PlanOptions::default() };
            let Ok(plan) = Plan::new(problem, caps, &options) else { continue };
            if kept.iter().all(|(_, of)| of != plan.tiles()) {
                kept.push((tile, *plan.tiles()));
            }
        }
        kept.into_iter().map(|(tile, _)| tile).collect()
    }

    /// What a plan has chosen.
    pub(crate) fn chosen(tiles: &Tiles) -> Self {
        let of = Self::of(tiles.family);
        match tiles.family {
            Family::StagedTile | Family::StagedDirect => of,
            Family::FusedTile | Family::FusedSubgroup => {
                let FusedTile { lanes, rows, slice, .. } = tiles.fused;
                let threads = Some(tiles.fused.threads());
                let held = Some((tiles.fused.held > 0).into());
                Self { rows: Some(rows), lanes: Some(lanes), slice: Some(slice), threads, held, ..of }
            }
            Family::FusedMatrix => {
                let FusedMatrix { edge, bands, tile_kv, .. } = tiles.matrix;
                let (lanes, threads) = (Some(tiles.matrix.lanes()), Some(tiles.matrix.threads()));
                Self { rows: Some(edge * bands), lanes, keys: Some(tile_kv), threads, ..of }
            }
            Family::FusedRow => {
                let FusedRow { threads, rows, keys, side, unpacked, .. } = tiles.row;
                let (side, threads, unpacked) = (Some(side), Some(threads), Some(unpacked.into()));
                Self { rows: Some(rows), keys: Some(keys), side, threads, unpacked, ..of }
            }
        }
    }

    /// The planner's sizes, but for those that are given here; or why those make no kernel.
    pub(crate) fn resolve(&self, problem: &AttentionProblem, caps: &Caps) -> Result<Tiles, String> {
        let mut tiles = tiles(self.family, problem, caps);
        let takes: &[&str] = match self.family {
            Family::StagedTile | Family::StagedDirect => &[],
            Family::FusedTile | Family::FusedSubgroup => &["rows", "lanes", "slice", "threads", "held"],
            Family::FusedMatrix => &["rows", "lanes", "keys", "threads"],
            Family::FusedRow => &["rows", "keys", "side", "threads", "unpacked"],
        };
        for (name, size) in Self::NAMES.into_iter().zip(self.sizes()) {
            if size.is_some() && !takes.contains(&name) {
                return Err(format!("{} has no size {name}; it has {}", self.family, list(takes)));
            }
        }
        if self.sizes() == [None; 8] {
            return Ok(tiles);
        }
        match self.family {
            Family::StagedTile | Family::StagedDirect => {}
            Family::FusedTile | Family::FusedSubgroup => {
                tiles.fused = fused::sized(tiles.fused, self, problem, caps)?;
            }
            Family::FusedMatrix => tiles.matrix = tiles.matrix.sized(self)?,
            Family::FusedRow => tiles.row = tiles.row.sized(self, problem, caps)?,
        }
        Ok(tiles)
    }
}

/// Checks one size: `need` says in words what it has to be.
pub(crate) fn check(name: &str, got: u32, fits: bool, need: &str) -> Result<u32, String> {
    if fits { Ok(got) } else { Err(format!("{name} = {got}, it has to be {need}")) }
}

fn list(names: &[&str]) -> String {
    if names.is_empty() { "none".into() } else { names.join(", ") }
}

impl From<Family> for Tile {
    fn from(family: Family) -> Self {
        Self::of(family)
    }
}

impl fmt::Display for Tile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.family)?;
        for (name, size) in Self::NAMES.into_iter().zip(self.sizes()) {
            if let Some(size) = size {
                write!(f, ":{name}={size}")?;
            }
        }
        Ok(())
    }
}

impl FromStr for Tile {
    type Err = Error;

    /// Reads what `Display` writes.
    ///
    /// # Errors
    /// [`Error::Name`] with the first part that names nothing.
    fn from_str(text: &str) -> Result<Self> {
        let fail = |got: &str, why: String| Error::Name { got: got.into(), why };
        let first = text.find('=').map_or(text.len(), |equals| text[..equals].rfind(':').unwrap_or(0));
        let mut tile = Self::of(text[..first].parse()?);
        for part in text[first..].split(':').skip(1) {
            let (name, size) = part.split_once('=').ok_or_else(|| fail(part, "is no size, name=N".into()))?;
            let known = || fail(name, format!("is no size; there are {}", list(&Self::NAMES)));
            let place = tile.size_mut(name).ok_or_else(known)?;
            let parsed = size.parse().map_err(|_| fail(size, format!("is no number, as {name} must be")))?;
            if place.replace(parsed).is_some() {
                return Err(fail(name, "is there twice".into()));
            }
        }
        Ok(tile)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips() {
        for text in [
            "fused:row",
            "staged:tile",
            "fused:row:rows=3:keys=4:side=2",
            "fused:row:rows=2:unpacked=1",
            "fused:tile:threads=64:held=0",
            "fused:tile_matrix:lanes=2:keys=64:threads=128",
        ] {
            assert_eq!(text.parse::<Tile>().map(|tile| tile.to_string()), Ok(text.to_string()));
        }
        for (text, why) in [
            ("fused", "family"),
            ("fused:row:rows", "family"),
            ("fused:row:rows=3:keys", "name=N"),
            ("fused:row:cols=3", "cols"),
            ("fused:row:rows=x", "number"),
            ("fused:row:rows=1:rows=2", "twice"),
            ("=", "family"),
        ] {
            let error = text.parse::<Tile>().expect_err(text).to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn what_makes_no_kernel_says_why() {
        let problem = AttentionProblem::new(1, 2, 2, 100, 300, 64, 80);
        let caps = Caps { subgroup: Some((8, 8)), ..Caps::minimal() };
        for (text, why) in [
            ("staged:tile:rows=4", "none"),
            ("fused:row:lanes=4", "no size lanes"),
            ("fused:row:held=0", "no size held"),
            ("fused:row:unpacked=2", "unpacked"),
            ("fused:row:rows=0", "rows"),
            ("fused:row:keys=3", "keys"),
            ("fused:row:keys=2:side=4", "side"),
            ("fused:tile:side=2", "no size side"),
            ("fused:row:threads=12", "threads"),
            ("fused:row:rows=8:keys=4", "rows"),
            ("fused:tile:lanes=3", "lanes"),
            ("fused:tile:slice=7", "slice"),
            ("fused:tile:held=2", "held"),
            ("fused:tile:threads=100", "threads"),
            ("fused:tile:threads=512", "threads"),
            ("fused:tile:lanes=16:slice=64", "workgroup memory"),
            ("fused:tile:held=1", "workgroup memory"),
            ("fused:tile:rows=8:lanes=2:threads=8", "registers"),
            ("fused:tile_subgroup:lanes=16", "subgroups"),
            ("fused:tile_matrix:slice=2", "no size slice"),
        ] {
            let tile = Some(text.parse::<Tile>().expect(text));
            let error = Plan::new(&problem, &caps, &PlanOptions { tile, ..PlanOptions::default() });
            let error = error.expect_err(text).to_string();
            assert!(
                error.contains(why) && error.contains("fused") | error.contains("staged"),
                "{text}: {error}"
            );
        }
    }

    #[test]
    fn candidates_fit_and_differ() {
        let problem = AttentionProblem::new(1, 2, 2, 300, 300, 64, 80);
        let candidates = Tile::candidates(&problem, &Caps::minimal());
        for family in [Family::FusedTile, Family::FusedRow, Family::StagedTile, Family::StagedDirect] {
            assert!(candidates.contains(&Tile::of(family)), "{candidates:?}");
        }
        let mut chosen: Vec<_> = candidates
            .iter()
            .map(|&tile| {
                let options = PlanOptions { tile: Some(tile), ..PlanOptions::default() };
                let plan = Plan::new(&problem, &Caps::minimal(), &options).expect("a candidate fits");
                plan.tile().to_string()
            })
            .collect();
        chosen.sort_unstable();
        assert!(chosen.windows(2).all(|two| two[0] != two[1]), "{chosen:?}");
    }

    /// Compilers that take minutes over a long text are not asked to.
    #[test]
    fn long_texts_are_tried_where_they_compile() {
        let tile: Tile = "fused:row:rows=5:keys=4".parse().unwrap();
        for (driver, width, tried) in [
            ("llvmpipe Mesa 26.1.6 (LLVM 19.1.7)", 64, true),
            ("llvmpipe Mesa 26.1.6 (LLVM 19.1.7)", 80, false),
            ("llvmpipe Mesa 22.3.6 (LLVM 15.0.6)", 64, false),
            ("SwiftShader driver", 64, false),
        ] {
            let caps = Caps { driver: driver.into(), ..Caps::minimal() };
            let problem = AttentionProblem::new(1, 2, 2, 300, 300, width, width);
            assert_eq!(Tile::candidates(&problem, &caps).contains(&tile), tried, "{driver}, {width}");
        }
    }
}
