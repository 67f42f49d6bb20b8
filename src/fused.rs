//! Tiles of the fused kernels: pure functions of widths, lengths and device, priced in bytes of
//! workgroup memory and registers of a thread.

use crate::caps::{Caps, MANY_REGISTERS, NEWER_MESA};
use crate::dtype::Dtype;
use crate::problem::AttentionProblem;
use crate::tile::{Tile, check};

/// Keys of a lane in a step of the tile kernel: one vec4 of weights.
pub(crate) const LANE_KEYS: u32 = 4;

/// Keys of a tile of the mask's map for the row kernel, whose step is a key or two: long enough that
/// looking it up costs nothing, and as fine as the tile kernel's. Divides [`FusedRow::level`].
pub(crate) const ROW_MAP_KEYS: u32 = 32;

/// Most quads of o of a row that share an exchange of weights: each costs a row four registers.
const MOST_SHARED: u32 = 2;

/// The tile kernel's sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct FusedTile {
    /// Threads that share a query row.
    pub(crate) lanes: u32,
    /// Threads along the rows.
    pub(crate) row_lanes: u32,
    /// Query rows of a thread.
    pub(crate) rows: u32,
    /// Quads of head_dim or head_dim_v that are staged at a time.
    pub(crate) slice: u32,
    /// Whether all slices of head_dim, and of head_dim_v, are whole.
    pub(crate) whole: [bool; 2],
    /// Quads of head_dim_v of a thread.
    pub(crate) quads: u32,
    /// Keys and values are staged together.
    pub(crate) both: bool,
    /// Quads of head_dim if queries are held in workgroup memory, else 0.
    pub(crate) held: u32,
    /// The threads of a row exchange by subgroup operations, else through workgroup memory.
    pub(crate) subgroup: bool,
}

impl FusedTile {
    /// Of kernels that are none.
    pub(crate) const NONE: Self = Self {
        lanes: 0,
        row_lanes: 0,
        rows: 0,
        slice: 0,
        whole: [false; 2],
        quads: 0,
        both: false,
        held: 0,
        subgroup: false,
    };

    /// Query rows of a workgroup.
    pub(crate) fn tile_q(self) -> u32 {
        self.row_lanes * self.rows
    }

    /// Keys of a step.
    pub(crate) fn tile_kv(self) -> u32 {
        self.lanes * LANE_KEYS
    }

    pub(crate) fn threads(self) -> u32 {
        self.lanes * self.row_lanes
    }

    /// Workgroup memory: a slice of the key or value tile or of both (skewed by a vec4, so that rows
    /// begin in different banks), the queries if they are held, and two flags; and without subgroup
    /// operations the weights (skewed, too) and a number for each row and lane.
    pub(crate) fn workgroup_bytes(self) -> u32 {
        let staged = self.tile_kv() * (self.slice + 1) * if self.both { 2 } else { 1 };
        let exchanged = self.tile_q() * (16 * (self.lanes + 1) + 4 * self.lanes);
        let queries = if self.held > 0 { self.held_quads(self.held) } else { 0 };
        let rest = if self.subgroup { 0 } else { exchanged } + 8;
        // A head may be wider than any such memory.
        staged.saturating_add(queries).saturating_mul(16).saturating_add(rest)
    }

    /// Quads of workgroup memory that hold rows of `quads`, skewed by one from thread to thread along the rows.
    pub(crate) fn held_quads(self, quads: u32) -> u32 {
        self.rows.saturating_mul(quads).saturating_add(1).saturating_mul(self.row_lanes)
    }

    /// Quads of o of each row that share an exchange of weights. (By count, a quad's own loads and shuffles take a
    /// GPU twice as long as its products.)
    pub(crate) fn share(self) -> u32 {
        self.slice_quads().min(self.quads).clamp(1, MOST_SHARED)
    }

    /// Quads of a thread in a slice.
    fn slice_quads(self) -> u32 {
        self.slice / self.lanes.max(1)
    }

    /// Slices of a row of v, the last of them perhaps narrower.
    pub(crate) fn slices_v(self) -> u32 {
        self.quads.div_ceil(self.slice_quads().max(1))
    }

    /// Exchanges of weights for a slice.
    pub(crate) fn shares(self) -> u32 {
        self.slice_quads().min(self.quads).div_ceil(self.share())
    }

    /// Registers of a thread that live through a step: o, scores (then weights), partial sums, maxima
    /// and sums, and the operands of one product: weights of each row and some values.
    pub(crate) fn registers(self) -> u32 {
        let of_a_row = 4 * self.quads + LANE_KEYS + 4 * self.share() + 2 + 4;
        self.rows * of_a_row + 4 * LANE_KEYS
    }

    /// The same, knowing which widths its slices cut without a rest.
    fn cutting(self, widths: [usize; 2]) -> Self {
        Self { whole: widths.map(|width| (width as u32).is_multiple_of(4 * self.slice)), ..self }
    }

    /// The same with queries held in workgroup memory.
    fn holding(self, head_dim: usize) -> Self {
        Self { held: (head_dim as u32).div_ceil(4), ..self }
    }

    /// The same if there is room.
    fn holding_well(self, head_dim: usize, caps: &Caps) -> Option<Self> {
        Some(self.holding(head_dim)).filter(|held| held.workgroup_bytes() <= most_holding_bytes(caps))
    }

    /// Why the device's subgroups do not serve; `None` when they do, or are not asked to.
    pub(crate) fn subgroup_unfit(self, caps: &Caps) -> Option<String> {
        if !self.subgroup {
            return None;
        }
        caps.subgroups_unfit(self.lanes.max(LEAST_SUBGROUP), MOST_THREADS).or_else(|| {
            let (_, most) = caps.subgroup?;
            (!self.threads().is_multiple_of(most))
                .then(|| format!("its {} threads are no whole subgroups of {most}", self.threads()))
        })
    }
}

/// Most workgroup memory of a workgroup that holds its queries there: a multiprocessor should have two of them.
/// Of those that offer up to 48 KiB most have twice that and more (NVIDIA); that of others is what they offer (AMD).
pub(crate) fn most_holding_bytes(caps: &Caps) -> u32 {
    if caps.max_workgroup_bytes > 48 << 10 { 32 << 10 } else { caps.max_workgroup_bytes }
}

/// Threads of a workgroup of the tile kernels: four warps, and no fewer than the largest subgroup there is.
const MOST_THREADS: u32 = 128;

/// Threads of a workgroup that has few rows: enough that a multiprocessor's share of workgroups, of which
/// each takes a part of its workgroup memory, has loads in flight.
const LEAST_THREADS: u32 = 64;

/// Quads of the longest slice.
const MOST_QUADS: u32 = 128;

/// The smallest subgroup there is.
pub(crate) const LEAST_SUBGROUP: u32 = 4;

/// The tile kernels' sizes for a problem: the widest step of keys whose tiles fit the device's workgroup
/// memory (barriers dominate small steps), then with queries beside them, then keys and values together, then the
/// widest slice.
pub(crate) fn tile(
    rows: usize,
    head_dim: usize,
    head_dim_v: usize,
    subgroup: bool,
    caps: &Caps,
) -> FusedTile {
    // More rows make no other tile, and no product of theirs overflows.
    let rows = rows.min(1 << 20);
    let quads = |width: usize| (width as u32).div_ceil(4);
    let widest = quads(head_dim.max(head_dim_v));
    let threads = caps.max_invocations.clamp(8, MOST_THREADS);
    // A row's lanes are neighbours in a subgroup.
    let neighbours = if subgroup { caps.subgroup.map_or(LEAST_SUBGROUP, |(least, _)| least) } else { 8 };
    // No more threads than there are rows for, but two warps, and whole subgroups.
    let subgroup_most = caps.subgroup.map_or(1, |(_, most)| most);
    let least_threads = LEAST_THREADS.max(if subgroup { subgroup_most } else { 1 });
    let candidate = |lanes: u32, both: bool, slice: u32| {
        let wanted = (rows as u32 * lanes).max(least_threads).next_power_of_two();
        let row_lanes = threads.min(wanted) / lanes;
        let own_quads = quads(head_dim_v).div_ceil(lanes);
        let of_rows = |rows| FusedTile {
            lanes,
            row_lanes,
            rows,
            slice: slice.min(widest).next_multiple_of(lanes),
            quads: own_quads,
            both,
            subgroup,
            ..FusedTile::NONE
        };
        // As many as there are, and as there are registers for: with four, each thread has 32 sums that do not wait
        // for one another.
        let wanted = (rows as u32).div_ceil(row_lanes).next_power_of_two();
        let fits = |tile: &FusedTile| tile.rows <= wanted && tile.registers() <= caps.max_registers;
        [4, 2].map(of_rows).into_iter().find(fits).unwrap_or(of_rows(1)).cutting([head_dim, head_dim_v])
    };
    // Compilers keep all that a thread stages in registers: twice the slice is twice as many.
    let longest = if caps.max_registers < MANY_REGISTERS { 16 } else { 32 };
    // Side by side they fit whole, and only where nothing else asks for barriers.
    let fit = subgroup && widest.min(32) <= longest && widest <= MOST_QUADS;
    let together = [(true, widest)].into_iter().filter(|_| fit);
    let slices = [32, 16, 8].into_iter().filter(move |&slice| slice <= longest);
    let slices = together.chain(slices.map(|slice| (false, slice)));
    let best = |lanes: u32| {
        let all = slices.clone().map(|(both, slice)| candidate(lanes, both, slice));
        // Many slices cost barriers.
        let few = |tile: &FusedTile| 2 * tile.slice >= widest;
        let holding = all.clone().filter(few).find_map(|tile| tile.holding_well(head_dim, caps));
        holding.or_else(|| all.clone().find(|tile| tile.workgroup_bytes() <= caps.max_workgroup_bytes))
    };
    let lanes = [8, 4, 2].into_iter().filter(|&lanes| lanes <= neighbours);
    lanes.into_iter().find_map(best).unwrap_or(candidate(2, false, 8))
}

/// Sizes of a caller's choice in the place of the planner's; or why they make no kernel. Whether it fits
/// the device is asked of every kernel alike.
pub(crate) fn sized(
    of: FusedTile,
    tile: &Tile,
    problem: &AttentionProblem,
    caps: &Caps,
) -> Result<FusedTile, String> {
    let quads = |width: usize| (width as u32).div_ceil(4);
    let widest = quads(problem.head_dim.max(problem.head_dim_v));
    let lanes = tile.lanes.unwrap_or(of.lanes);
    check("lanes", lanes, lanes.is_power_of_two() && (2..=32).contains(&lanes), "2, 4, 8, 16 or 32")?;
    let threads = tile.threads.unwrap_or(of.threads());
    let fits = threads.is_power_of_two() && threads >= lanes && threads <= 1024;
    check("threads", threads, fits, "a power of two from lanes to 1024")?;
    let rows = tile.rows.unwrap_or(of.rows);
    check("rows", rows, (1..=8).contains(&rows), "1 to 8")?;
    let slice = tile.slice.unwrap_or(of.slice.next_multiple_of(lanes));
    check(
        "slice",
        slice,
        slice.is_multiple_of(lanes) && (lanes..=MOST_QUADS).contains(&slice),
        &format!("a multiple of lanes, at most {MOST_QUADS}"),
    )?;
    let both = of.subgroup && slice >= widest && tile.slice.is_none_or(|_| of.both);
    let sized = FusedTile {
        lanes,
        row_lanes: threads / lanes,
        rows,
        slice,
        quads: quads(problem.head_dim_v).div_ceil(lanes),
        both,
        subgroup: of.subgroup,
        ..FusedTile::NONE
    }
    .cutting([problem.head_dim, problem.head_dim_v]);
    if let Some(held) = tile.held {
        check("held", held, held <= 1, "0 or 1")?;
    }
    Ok(match tile.held {
        None => sized.holding_well(problem.head_dim, caps).unwrap_or(sized),
        Some(0) => sized,
        Some(_) => sized.holding(problem.head_dim),
    })
}

/// The row kernel's sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct FusedRow {
    /// Threads of a workgroup.
    pub(crate) threads: u32,
    /// Query rows of a thread.
    pub(crate) rows: u32,
    /// Keys of a step.
    pub(crate) keys: u32,
    /// Keys of a step whose scores are summed side by side.
    pub(crate) side: u32,
    /// Keys and values are rows of f32 that another kernel has made.
    pub(crate) unpacked: bool,
    /// head_dim and head_dim_v.
    pub(crate) width: u32,
    pub(crate) width_v: u32,
    /// The widest q and v together that compile in time.
    pub(crate) widest: u32,
}

/// Widths of q and v together beyond which the row kernel's text takes too long to compile (some
/// drivers' time grows with its square), and where each element of k or v is a load of its own.
const MOST_ROW_WIDTH: u32 = 256;
const MOST_ROW_WIDTH_BY_ELEMENT: u32 = 160;

impl FusedRow {
    /// Of kernels that are none.
    pub(crate) const NONE: Self =
        Self { threads: 0, rows: 0, keys: 0, side: 0, unpacked: false, width: 0, width_v: 0, widest: 0 };

    /// Query rows of a workgroup.
    pub(crate) fn tile_q(self) -> u32 {
        self.rows * self.threads
    }

    /// The same with sizes of a caller's choice; or why those make no kernel.
    pub(crate) fn sized(self, tile: &Tile, problem: &AttentionProblem, caps: &Caps) -> Result<Self, String> {
        let of = match tile.unpacked {
            Some(asked) => row_of(problem, caps, check("unpacked", asked, asked <= 1, "0 or 1")? == 1),
            None => self,
        };
        let rows = tile.rows.unwrap_or(of.rows);
        let keys = tile.keys.unwrap_or(of.keys);
        check("keys", keys, [1, 2, 4].contains(&keys), "1, 2 or 4")?;
        // Each pair of a row and a key is text of its own.
        check("rows", rows, (1..=24 / keys).contains(&rows), "from 1 to 24 / keys")?;
        let side = tile.side.unwrap_or(of.side.min(keys));
        check("side", side, [1, 2, 4].contains(&side) && side <= keys, "1, 2 or 4, and at most keys")?;
        let threads = tile.threads.unwrap_or(of.threads);
        let fits = threads.is_power_of_two() && (4..=64).contains(&threads);
        check("threads", threads, fits, "a power of two from 4 to 64")?;
        Ok(Self { threads, rows, keys, side, ..of })
    }

    /// Keys between two additions to the outer sums, a multiple of [`ROW_MAP_KEYS`]: 32 steps or 64. (32 of them
    /// everywhere would take processors with small instruction caches 4 % longer, since the additions drive the loop
    /// out of them.) A row that is stored `narrow`, as half of that, has no such digits.
    pub(crate) fn level(self, narrow: bool) -> u32 {
        if narrow { 1024 } else { (64 * self.keys).min(128) }
    }

    /// Variables of a thread that live through a step: q, o in two levels, maxima and sums.
    pub(crate) fn variables(self) -> u32 {
        self.rows * (self.width + 2 * self.width_v + 4)
    }

    /// Why these widths do not fit; `None` when they do.
    pub(crate) fn unfit(self) -> Option<String> {
        let need = self.width + self.width_v;
        let widest = self.widest;
        (need > widest).then(|| {
            format!("fused_row unrolls head_dim + head_dim_v = {need} columns, {widest} is the most here")
        })
    }
}

/// The instruction cache from which on the row kernel has its longer text.
const LARGE_INSTRUCTION_CACHE: u32 = 64 << 10;

/// Whether keys and values are whole vec4s of elements.
fn by_vec4(problem: &AttentionProblem) -> bool {
    problem.k.is_vec4(problem.head_dim) && problem.v.is_vec4(problem.head_dim_v)
}

/// Whether the row kernel has nothing to gain from unpacked keys and values.
pub(crate) fn row_reads_plainly(problem: &AttentionProblem) -> bool {
    problem.stored_kv() == Dtype::F32 && by_vec4(problem)
}

/// Whether the row kernel should read keys and values that another kernel has made rows of f32, since each of its
/// threads converts all of them for its few rows. That kernel takes as long as conversions for so many rows of a head
/// of keys; half of a causal call's see a key. (To Mesa before 26, which reads lane by lane, halves are half of the
/// loads.)
fn row_unpacks(problem: &AttentionProblem, caps: &Caps) -> bool {
    let p = problem;
    let least = match p.stored_kv() {
        Dtype::Int8 | Dtype::Int4 => 256,
        _ if !by_vec4(p) => 128,
        Dtype::F16 | Dtype::Bf16 => 384,
        Dtype::F32 => return false,
    };
    let rows = p.seq_q.saturating_mul(p.group_size()) / if p.causal.is_some() { 2 } else { 1 };
    let newer = caps.on_cpu() && caps.mesa().is_some_and(|version| version >= NEWER_MESA);
    newer && rows >= least
}

/// The row kernel's sizes for a problem. More rows and keys use each load (and with more keys each store of o) more
/// often; but the loop has to stay inside a processor's instruction cache (a step of three rows and two keys of 64 columns
/// takes 23 of 32 KiB; a fourth row makes it 29, and takes a tenth less or a third more time, as what surrounds it is
/// laid out), the variables inside its data cache, and each score's own finish and each conversion are text, which
/// drivers take seconds to compile. Found by trial on lavapipe 26.1. To 22.3.6 no address is uniform that comes from a loop's counter: it reads K and V lane by lane, half
/// of the time, and compiles longer. (More rows share a load there: at head_dim 128, 8 for 3 are 1.7 times as fast and
/// take 2.2 times as long to compile.)
pub(crate) fn row(problem: &AttentionProblem, caps: &Caps) -> FusedRow {
    row_of(problem, caps, row_unpacks(problem, caps))
}

/// The same, with keys and values unpacked or not.
fn row_of(problem: &AttentionProblem, caps: &Caps, unpacked: bool) -> FusedRow {
    let (width, width_v) = (problem.head_dim as u32, problem.head_dim_v as u32);
    let p = problem;
    let finish = p.softcap.is_some() || p.bias.is_some() || p.alibi || p.mask.is_some();
    // Codes are read by the word, however rows of them are aligned.
    let codes = !p.stored_kv().is_float();
    let vec4 = unpacked || codes || by_vec4(p);
    let converts = !unpacked && (codes || p.stored_kv() == Dtype::F16);
    let halves = !unpacked && matches!(p.stored_kv(), Dtype::F16 | Dtype::Bf16);
    let widths = width.next_multiple_of(4) + width_v.next_multiple_of(4);
    let (rows, keys) = if !vec4 {
        (2, 1)
    } else if caps.mesa().is_some_and(|version| version < NEWER_MESA) {
        match widths {
            _ if finish => (3, 1),
            0..=32 => (6, 2),
            33..=136 => (8, 1),
            137..=200 => (4, 1),
            _ if p.stored_kv() == Dtype::F32 => (3, 1),
            _ => (2, 1),
        }
    } else if caps.mesa().is_some() && caps.instruction_cache < LARGE_INSTRUCTION_CACHE {
        match widths {
            0..=40 if !finish => (6, 4),
            0..=80 if !finish => (6, 2),
            0..=80 => (4, 2),
            81..=136 if !converts && !halves => (3, 2),
            81..=200 => (4, 1),
            _ => (3, 1),
        }
    } else {
        // Other drivers, SwiftShader in a browser among them, take their time over the longer text.
        let long = !finish && caps.mesa().is_some();
        match widths {
            0..=96 if long => (6, 4),
            97..=136 if long && halves => (5, 4),
            97..=160 if long && !converts => (4, 4),
            0..=96 if !finish => (6, 2),
            97..=136 if !finish && converts => (6, 2),
            0..=200 => (4, 2),
            _ if converts => (2, 2),
            _ => (3, 2),
        }
    };
    // SwiftShader's compiler takes 19 seconds for six rows of 8 elements and two keys and a quarter of one for four
    // rows and one key, which are no slower.
    let (rows, keys) = if caps.adapter.contains("SwiftShader") { (rows.min(4), 1) } else { (rows, keys) };
    // A vector of the processor, so that no workgroup loops over several: drivers there take one for a subgroup
    // (lavapipe 256 bits, or what LP_NATIVE_VECTOR_WIDTH says; SwiftShader 128).
    let threads = match caps.subgroup {
        Some((least, _)) if caps.on_cpu() => least.clamp(4, 16),
        _ => 8,
    };
    // No more rows than there are.
    let rows = rows.min((problem.owned_rows() as u32).div_ceil(threads).max(1));
    let widest = if vec4 { MOST_ROW_WIDTH } else { MOST_ROW_WIDTH_BY_ELEMENT };
    // Four rows of a key have four sums: those of two keys fit a processor's 16 vector registers.
    let side = keys.min(if caps.vector_registers < 32 { 2 } else { 4 });
    FusedRow { threads, rows, keys, side, unpacked, width, width_v, widest }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cache;

    #[test]
    fn default_limits_have_a_tile_for_every_width() {
        for head_dim in [1, 4, 7, 32, 64, 80, 96, 128, 160, 256, 512] {
            for head_dim_v in [1, 8, 64, 100, 128, 256, 512] {
                for seq_q in [1, 17, 4096] {
                    let t = tile(seq_q, head_dim, head_dim_v, false, &Caps::minimal());
                    assert!(t.workgroup_bytes() <= 16 << 10, "{head_dim} {head_dim_v}: {t:?}");
                    assert!(
                        t.registers() <= Caps::minimal().max_registers,
                        "{head_dim} {head_dim_v}: {t:?}, {}",
                        t.registers()
                    );
                    assert!(
                        t.slice.is_multiple_of(t.lanes) && t.quads * t.lanes * 4 >= head_dim_v as u32,
                        "{t:?}"
                    );
                }
            }
        }
    }

    /// By the statistics of Mesa's compilers: at 120 registers Intel's spills a hundred, at 88 none.
    #[test]
    fn few_registers_get_fewer_rows() {
        let few = Caps { max_registers: 96, ..Caps::minimal() };
        for (width, rows) in [(32, [4, 4]), (64, [4, 2]), (128, [4, 2]), (256, [2, 1]), (512, [1, 1])] {
            let tiles = [&Caps::minimal(), &few].map(|caps| tile(4096, width, width, false, caps));
            assert_eq!(tiles.map(|tile| tile.rows), rows, "{width}: {tiles:?}");
            assert!(tiles[1].slice <= 16, "{width}: {tiles:?}");
        }
    }

    /// Queries are held where a multiprocessor has room for two workgroups that do so.
    #[test]
    fn queries_are_held_where_there_is_room() {
        for (kib, width, held) in
            [(16, 64, 0), (32, 32, 8), (32, 64, 16), (48, 64, 16), (48, 66, 17), (48, 128, 0), (64, 64, 16)]
        {
            let caps = Caps { max_workgroup_bytes: kib << 10, ..Caps::minimal() };
            let tile = tile(4096, width, width, false, &caps);
            assert_eq!(tile.held, held, "{kib} KiB, {width}: {tile:?}");
            assert!(tile.workgroup_bytes() <= caps.max_workgroup_bytes, "{tile:?}");
        }
    }

    #[test]
    fn older_mesa_gets_more_rows_and_fewer_keys() {
        let instruction_cache = LARGE_INSTRUCTION_CACHE;
        let caps = |driver: &str| Caps { driver: driver.into(), instruction_cache, ..Caps::minimal() };
        let problem = AttentionProblem::new(1, 8, 8, 1024, 1024, 64, 64);
        for (driver, sizes) in [
            ("llvmpipe Mesa 22.3.6 (LLVM 15.0.6)", (8, 1)),
            ("llvmpipe Mesa 26.1.6-1~bpo13+1 (LLVM 19.1.7)", (4, 4)),
            ("llvmpipe Mesa", (4, 2)),
            ("", (4, 2)),
        ] {
            let tile = row(&problem, &caps(driver));
            assert_eq!((tile.rows, tile.keys), sizes, "{driver}");
        }
    }

    /// As much text as stays inside the instruction cache; with conversions, rows share more of them.
    #[test]
    fn narrow_heads_get_more_rows_and_keys() {
        let sizes = |kib: u32, width, kv, softcap: Option<f32>, unpacked| {
            let caps = Caps { driver: "llvmpipe Mesa 26.1.6".into(), ..Caps::minimal() };
            let caps = Caps { instruction_cache: kib << 10, ..caps };
            let problem = AttentionProblem::new(1, 8, 8, 1024, 1024, width, width);
            let problem = AttentionProblem { softcap, ..problem }.with_cache(Cache::Contiguous, kv);
            let tile = row_of(&problem, &caps, unpacked);
            (tile.rows, tile.keys)
        };
        for (kib, width, of_f32, of_f16, of_int8, capped) in [
            (64, 32, (6, 4), (6, 4), (6, 4), (4, 2)),
            (64, 64, (4, 4), (5, 4), (6, 2), (4, 2)),
            (64, 80, (4, 4), (4, 2), (4, 2), (4, 2)),
            (64, 128, (3, 2), (2, 2), (2, 2), (3, 2)),
            (32, 16, (6, 4), (6, 4), (6, 4), (4, 2)),
            (32, 32, (6, 2), (6, 2), (6, 2), (4, 2)),
            (32, 64, (3, 2), (4, 1), (4, 1), (3, 2)),
            (32, 80, (4, 1), (4, 1), (4, 1), (4, 1)),
            (32, 128, (3, 1), (3, 1), (3, 1), (3, 1)),
        ] {
            for unpacked in [false, true] {
                assert_eq!(sizes(kib, width, Dtype::F32, None, unpacked), of_f32, "{kib} {width}");
                assert_eq!(sizes(kib, width, Dtype::F32, Some(8.0), unpacked), capped, "{kib} {width}");
                for (dtype, of) in [(Dtype::F16, of_f16), (Dtype::Int8, of_int8)] {
                    let want = if unpacked { of_f32 } else { of };
                    assert_eq!(sizes(kib, width, dtype, None, unpacked), want, "{kib} {width}");
                }
            }
        }
    }

    /// No level ends inside a tile of the mask's map.
    #[test]
    fn levels_are_whole_tiles_of_the_map() {
        for keys in [1, 2, 4] {
            let row = FusedRow { keys, ..FusedRow::NONE };
            assert!(
                [false, true].map(|narrow| row.level(narrow)).iter().all(|n| n.is_multiple_of(ROW_MAP_KEYS))
            );
        }
    }

    /// As many rows share a conversion as pay for a kernel of its own.
    #[test]
    fn many_rows_have_their_keys_unpacked() {
        let newer = Caps {
            device_type: wgpu::DeviceType::Cpu,
            driver: "llvmpipe Mesa 26.1.6".into(),
            ..Caps::minimal()
        };
        let older = Caps { driver: "llvmpipe Mesa 22.3.6".into(), ..newer.clone() };
        let gpu = Caps::minimal();
        let problem = |dtype, width| AttentionProblem::new(1, 8, 4, 128, 99, width, width).with_dtype(dtype);
        for (of, least) in [
            (problem(Dtype::F32, 64), usize::MAX),
            (problem(Dtype::F32, 66), 128),
            (problem(Dtype::F16, 64), 384),
            (problem(Dtype::Bf16, 66), 128),
            (problem(Dtype::F32, 64).with_cache(Cache::Contiguous, Dtype::Int4), 256),
        ] {
            let unpacks =
                |seq_q, causal, caps| row(&AttentionProblem { seq_q, causal, ..of.clone() }, caps).unpacked;
            for (causal, least) in [(None, least / 2), (Some(crate::Align::TopLeft), least)] {
                assert!(!unpacks(least - 1, causal, &newer), "{of:?}");
                assert_eq!(unpacks(least, causal, &newer), least < usize::MAX / 2, "{of:?}");
                assert!(!unpacks(least, causal, &older) && !unpacks(least, causal, &gpu));
            }
        }
    }

    #[test]
    fn more_vector_registers_sum_more_keys_at_once() {
        let problem = AttentionProblem::new(1, 8, 8, 1024, 1024, 64, 64);
        let few = Caps { driver: "llvmpipe Mesa 26.1.6".into(), ..Caps::minimal() };
        let few = Caps { instruction_cache: LARGE_INSTRUCTION_CACHE, ..few };
        let many = Caps { vector_registers: 32, ..few.clone() };
        assert_eq!([&few, &many].map(|caps| row(&problem, caps).side), [2, 4]);
    }

    #[test]
    fn rows_fill_a_vector_of_the_processor() {
        let problem = AttentionProblem::new(1, 8, 8, 20, 1024, 64, 64);
        let cpu = Caps { device_type: wgpu::DeviceType::Cpu, ..Caps::minimal() };
        let gpu = Caps::minimal();
        for (caps, subgroup, sizes) in [
            (&cpu, None, (8, 3)),
            (&cpu, Some((4, 4)), (4, 4)),
            (&cpu, Some((8, 8)), (8, 3)),
            (&cpu, Some((16, 16)), (16, 2)),
            (&cpu, Some((64, 64)), (16, 2)),
            (&gpu, Some((32, 32)), (8, 3)),
        ] {
            let tile = row(&problem, &Caps { subgroup, ..caps.clone() });
            assert_eq!((tile.threads, tile.rows), sizes, "{subgroup:?}");
        }
    }

    #[test]
    fn more_workgroup_memory_takes_wider_slices() {
        let roomy = Caps { max_workgroup_bytes: 32 << 10, ..Caps::minimal() };
        let [wide, narrow] = [&roomy, &Caps::minimal()].map(|caps| tile(4096, 128, 128, false, caps));
        assert!(wide.slice > narrow.slice && wide.tile_kv() >= narrow.tile_kv(), "{wide:?} {narrow:?}");
    }
}
