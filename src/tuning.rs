//! [`Tuning`]: which tiles were fastest on an adapter, as measured there.

use std::fmt;
use std::str::FromStr;

use crate::caps::Caps;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::problem::{AttentionProblem, MAX_SEQ};
use crate::tile::Tile;

/// A table of measured tiles, keyed by adapter and by class of problem. A plan takes its entry where
/// there is one that fits, else its own choice; [`Plan`](crate::Plan)'s `Display` says which.
///
/// The program's command `tune` makes one. As text it is a line an entry, so that tables can be joined:
///
/// ```
/// use std::sync::Arc;
/// use wgpu_attention::{AttentionProblem, Caps, Plan, PlanOptions, Tuning};
/// let problem = AttentionProblem::new(1, 8, 8, 2048, 2048, 64, 64);
/// let caps = Caps::minimal();
/// let mut tuning = Tuning::default();
/// tuning.set(&problem, &caps, "fused:tile:lanes=4".parse()?);
/// let read: Tuning = tuning.to_string().parse()?;
/// assert_eq!(read, tuning);
///
/// let options = PlanOptions { tuning: Some(Arc::new(read)), ..PlanOptions::default() };
/// assert_eq!(Plan::new(&problem, &caps, &options)?.tile().lanes, Some(4));
/// # Ok::<(), wgpu_attention::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tuning {
    entries: Vec<Entry>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    class: Class,
    tile: Tile,
}

/// What an entry is for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Class {
    /// Adapter, driver and backend.
    adapter: [String; 3],
    dtype: Dtype,
    /// head_dim and head_dim_v.
    widths: [usize; 2],
    /// seq_q and seq_kv, as powers of two.
    lengths: [u32; 2],
}

/// Factors of two by which both lengths together may differ from an entry's.
const REACH: u32 = 4;

const HEAD: &str = "# wgpu-attention tuning 1: adapter, driver, backend, dtype, head_dim, head_dim_v, \
                    log2 seq_q, log2 seq_kv, kernel";

impl Class {
    fn of(problem: &AttentionProblem, caps: &Caps) -> Self {
        // A tab or a line's end would end the field.
        let field = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let length = |n: usize| n.clamp(1, MAX_SEQ).next_power_of_two().ilog2();
        Self {
            adapter: [field(&caps.adapter), field(&caps.driver), caps.backend.to_string()],
            dtype: problem.dtype,
            widths: [problem.head_dim, problem.head_dim_v],
            lengths: [length(problem.seq_q), length(problem.seq_kv)],
        }
    }

    /// How far a problem's lengths are from these, where nothing else differs.
    fn distance(&self, of: &Self) -> Option<u32> {
        let same = (&self.adapter, self.dtype, self.widths) == (&of.adapter, of.dtype, of.widths);
        let steps = |i: usize| self.lengths[i].abs_diff(of.lengths[i]);
        same.then(|| steps(0).saturating_add(steps(1))).filter(|&steps| steps <= REACH)
    }
}

impl Tuning {
    /// Notes the fastest tile for problems like this one on such a device, in the place of what the table
    /// had for them.
    pub fn set(&mut self, problem: &AttentionProblem, caps: &Caps, tile: Tile) {
        self.put(Entry { class: Class::of(problem, caps), tile });
    }

    /// Forgets what the table has for problems like this one on such a device: the planner's own choice
    /// counts again.
    pub fn remove(&mut self, problem: &AttentionProblem, caps: &Caps) {
        let class = Class::of(problem, caps);
        self.entries.retain(|old| old.class != class);
    }

    /// Takes another table's entries, which replace those for the same problems and devices.
    pub fn extend(&mut self, newer: Self) {
        newer.entries.into_iter().for_each(|entry| self.put(entry));
    }

    /// The tile of the nearest problem of the same type and widths on the same adapter and driver, whose
    /// lengths are together within a factor of 16.
    pub fn get(&self, problem: &AttentionProblem, caps: &Caps) -> Option<Tile> {
        let class = Class::of(problem, caps);
        let near = self.entries.iter().filter_map(|entry| Some((entry.class.distance(&class)?, entry.tile)));
        near.min_by_key(|&(steps, _)| steps).map(|(_, tile)| tile)
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn put(&mut self, entry: Entry) {
        self.entries.retain(|old| old.class != entry.class);
        self.entries.push(entry);
    }
}

impl fmt::Display for Tuning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{HEAD}")?;
        for Entry { class, tile } in &self.entries {
            let [adapter, driver, backend] = &class.adapter;
            let ([d, dv], [q, kv]) = (class.widths, class.lengths);
            writeln!(f, "{adapter}\t{driver}\t{backend}\t{}\t{d}\t{dv}\t{q}\t{kv}\t{tile}", class.dtype)?;
        }
        Ok(())
    }
}

impl FromStr for Tuning {
    type Err = Error;

    /// Reads a table; lines that are empty, or begin with `#` and have no tab, say nothing.
    ///
    /// # Errors
    /// [`Error::Tuning`] with the number of the first line that is none.
    fn from_str(text: &str) -> Result<Self> {
        let mut tuning = Self::default();
        for (number, line) in text.lines().enumerate() {
            // An adapter's name may begin with anything.
            let remark = line.starts_with('#') && !line.contains('\t');
            if !line.trim().is_empty() && !remark {
                let fail = |why| Error::Tuning { line: number + 1, why };
                tuning.put(entry(line).map_err(fail)?);
            }
        }
        Ok(tuning)
    }
}

fn entry(line: &str) -> Result<Entry, String> {
    let fields: Vec<&str> = line.split('\t').collect();
    let &[adapter, driver, backend, dtype, d, dv, q, kv, tile] = fields.as_slice() else {
        return Err(format!("9 fields between tabs, not {}", fields.len()));
    };
    let number = |text: &str| text.parse::<u32>().map_err(|_| format!("{text:?} is no number"));
    let dtype = Dtype::FLOATS.into_iter().find(|of| of.to_string() == dtype);
    let class = Class {
        adapter: [adapter, driver, backend].map(String::from),
        dtype: dtype.ok_or_else(|| format!("{:?} is no element type", fields[3]))?,
        widths: [number(d)? as usize, number(dv)? as usize],
        lengths: [number(q)?, number(kv)?],
    };
    Ok(Entry { class, tile: tile.parse().map_err(|error: Error| error.to_string())? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::Family;
    use crate::plan::{Plan, PlanOptions};
    use std::sync::Arc;

    fn problem(seq: usize) -> AttentionProblem {
        AttentionProblem::new(1, 2, 2, seq, seq, 64, 64)
    }

    #[test]
    fn the_nearest_entry_counts_and_no_far_one() {
        let caps = Caps::minimal();
        let mut tuning = Tuning::default();
        tuning.set(&problem(512), &caps, Family::StagedTile.into());
        tuning.set(&problem(4096), &caps, Family::FusedRow.into());
        let family = |seq| tuning.get(&problem(seq), &caps).map(|tile| tile.family);
        assert_eq!([400, 512, 1000].map(family), [Some(Family::StagedTile); 3]);
        assert_eq!([2048, 4096, 16384].map(family), [Some(Family::FusedRow); 3]);
        assert_eq!([16, 1 << 20].map(family), [None; 2]);
        assert_eq!(tuning.get(&problem(512).with_dtype(Dtype::F16), &caps), None);
        let other = Caps { driver: "newer".into(), ..caps.clone() };
        assert_eq!(tuning.get(&problem(512), &other), None);
    }

    #[test]
    fn newer_entries_replace() {
        // What a name begins with is no remark.
        let caps = Caps { adapter: "# a card\tof\ntwo lines".into(), ..Caps::minimal() };
        let mut tuning = Tuning::default();
        tuning.set(&problem(512), &caps, Family::StagedTile.into());
        let mut newer = Tuning::default();
        newer.set(&problem(500), &caps, Family::FusedRow.into());
        tuning.extend(newer);
        assert_eq!((tuning.len(), tuning.is_empty()), (1, false));
        let read: Tuning = tuning.to_string().parse().unwrap();
        assert_eq!(read.get(&problem(512), &caps), Some(Family::FusedRow.into()));
    }

    #[test]
    fn a_damaged_table_names_the_line() {
        let good = {
            let mut tuning = Tuning::default();
            tuning.set(&problem(512), &Caps::minimal(), Family::FusedRow.into());
            tuning.to_string()
        };
        for (from, to, what) in [
            ("\t64\t", "\t6x\t", "6x"),
            ("f32", "f33", "f33"),
            ("fused:row", "fused:col", "col"),
            ("\t9", "", "9 fields"),
        ] {
            let Err(Error::Tuning { line: 2, why }) = good.replacen(from, to, 1).parse::<Tuning>() else {
                panic!("{from:?} -> {to:?}\n{good}")
            };
            assert!(why.contains(what), "{why}");
        }
    }

    #[test]
    fn an_entry_that_does_not_fit_is_no_error() {
        let caps = Caps::minimal();
        let mut tuning = Tuning::default();
        tuning.set(&problem(512), &caps, "fused:tile:lanes=16:slice=128".parse().unwrap());
        let tuned = PlanOptions { tuning: Some(Arc::new(tuning)), ..PlanOptions::default() };
        let plan = Plan::new(&problem(512), &caps, &tuned).unwrap();
        let own = Plan::new(&problem(512), &caps, &PlanOptions::default()).unwrap();
        assert_eq!(plan.tile(), own.tile());
        assert!(plan.to_string().contains("tuning table"), "{plan}");
        // A family that is asked for is not taken from the table.
        let forced = PlanOptions { family: Some(Family::StagedTile), ..tuned };
        assert_eq!(Plan::new(&problem(512), &caps, &forced).unwrap().family(), Family::StagedTile);
    }
}
