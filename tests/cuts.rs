//! However the work is cut - into tiles, chunks of heads and rows, parts of the keys - and whatever scratch
//! memory held before, the answer is the same.

mod common;

use std::sync::Arc;

use common::case::{Axes, Case, Lens, Sim, Spread, Storage, indices};
use common::check::{Expected, Gap, same_bits};
use common::gpu::{self, Door, Kind};
use common::rng::{Rng, every, has_turn};
use common::subject::{Outcome, Subject, check_all};
use wgpu_attention::{Align, Dtype, Family, Layout, Operand, Path, PlanOptions, Tensor, Tile, Window};

/// An additive similarity for tests of one.
const ADDITIVE: Sim = Sim::Additive { extra: 2, hidden: 10, per_head: false };

/// Budgets for scratch memory split the work over batch, heads and rows; the bits stay the same.
#[test]
fn any_scratch_budget_gives_the_same_bits() {
    let base = Axes { batch: 2, heads: (6, 2), seq_q: 70, seq_kv: 129, ..Axes::default() };
    let problems = [
        base,
        Axes { weights: true, lens: Lens::Partial, sinks: true, causal: Some(Align::BottomRight), ..base },
        Axes {
            dtype: Dtype::F16,
            out_dtype: Dtype::F16,
            similarity: Sim::Bilinear { extra: 3, per_head: true },
            mask: Some(Spread::Full),
            storage: Storage::Odd,
            ..base
        },
        Axes { batch: 1, heads: (1, 1), seq_q: 257, seq_kv: 31, head_dim_v: 5, ..base },
        // Maxima that rise late.
        Axes { spread: 12.0, ..base },
        Axes { similarity: Sim::Cosine, scale: Some(1.0), lens: Lens::Partial, ..base },
        Axes { similarity: ADDITIVE, lens: Lens::Partial, ..base },
        Axes { similarity: Sim::Additive { extra: 1, hidden: 9, per_head: true }, ..base },
    ];
    for (i, axes) in problems.into_iter().enumerate() {
        let case = axes.build(i as u64);
        // Splits give the row kernel scratch of its own in every problem.
        let row = gpu::get(Kind::Full, false).map(|_| Subject::Gpu {
            kind: Kind::Full,
            checks: false,
            family: Some(Family::FusedRow),
            door: Door::Encode,
            split: true,
        });
        for (place, subject) in Subject::few().into_iter().chain(row).enumerate() {
            let Subject::Gpu { kind, checks, family, .. } = subject else { continue };
            if !has_turn(i + place) || !subject.compares(&case) {
                continue;
            }
            let case = subject.asked(&case);
            let expected = Expected::of(&case);
            // The fused kernels only have scratch for what queries and keys are made into.
            let staged = subject.gives_weights();
            let gpu = gpu::get(kind, checks).expect("listed");
            let mut whole: Option<wgpu_attention::Outputs> = None;
            // The last cuts through tiles of rows, where only the row kernel's rows know nothing of one another.
            let cut = (family == Some(Family::FusedRow)).then_some(Some(5 << 10));
            for scratch_budget in [None, Some(1 << 20), Some(64 << 10), Some(16 << 10)].into_iter().chain(cut)
            {
                let options = PlanOptions { family, scratch_budget, ..PlanOptions::default() };
                let plan = gpu.attention.plan_with(&case.problem, &options).expect("the problem is served");
                let context = format!("{subject:?} within {scratch_budget:?}, {} chunks", plan.chunks());
                if let Some(budget) = scratch_budget {
                    assert!(plan.scratch_bytes() <= budget, "{context}: {} bytes", plan.scratch_bytes());
                    assert!(budget > 16 << 10 || !staged || plan.chunks() > 1, "{context}");
                }
                let Ok(Outcome::Done(out, gap)) = subject.run_within(&case, scratch_budget) else {
                    panic!("{context} is not served\n  {}", case.name);
                };
                if let Err(what) = expected.check(&case, &out, gap) {
                    panic!("{context}: {what}\n  {}", case.name);
                }
                let same = whole.get_or_insert_with(|| (*out).clone());
                assert!(same_bits(same, &out), "{context} differs from the default\n  {}", case.name);
            }
        }
    }
}

/// A mask in blocks of `tile` less `shift`: some dropped, some kept, some of either kind but for one pair
/// in a corner. Keys that no query of a head keeps are poison.
fn with_blocks(axes: Axes, spread: Spread, tile: [usize; 2], shift: [usize; 2], seed: u64) -> Case {
    let mut case = axes.build(seed);
    let p = &mut case.problem;
    let shape = p.shape(Operand::Mask);
    let dims = spread.dims(shape);
    let layout = Layout::broadcast(dims).at(seed as usize % 4);
    p.mask = Some(layout);
    let blocks = [0, 1].map(|i| (shape[2 + i] + shift[i]) / tile[i] + 1);
    let mut rng = Rng::new(seed);
    let kinds: Vec<_> = indices([dims[0], dims[1], blocks[0], blocks[1]])
        .map(|_| (rng.below(5), [0, 1].map(|i| if rng.chance(0.5) { 0 } else { tile[i] - 1 })))
        .collect();
    let mut mask = vec![0x55; layout.extent(dims) as usize];
    for at in indices(dims) {
        let [row, key] = [0, 1].map(|i| at[2 + i] + shift[i]);
        let block = [row / tile[0], key / tile[1]];
        let number = ((at[0] * dims[1] + at[1]) * blocks[0] + block[0]) * blocks[1] + block[1];
        let (kind, corner) = kinds[number];
        // A row or key that stands for all of them is every corner.
        let is = |i: usize, at: usize| dims[2 + i] == 1 || at % tile[i] == corner[i];
        let odd = is(0, row) && is(1, key);
        let kept = matches!((kind, odd), (1, _) | (2, false) | (3, true)) || (kind == 4 && rng.chance(0.5));
        mask[layout.index(at)] = u8::from(kept) << (number % 8);
    }
    let group = p.heads_q / p.heads_kv;
    for at in indices([p.batch, p.heads_kv, p.seq_kv, 1]) {
        let mut queries = indices([1, group, p.seq_q, 1]);
        let [b, h, j, _] = at;
        if queries.all(|[_, g, i, _]| mask[layout.index([b, h * group + g, i, j])] == 0) {
            for (data, layout, dim) in
                [(&mut case.data.k, p.k, p.head_dim), (&mut case.data.v, p.v, p.head_dim_v)]
            {
                (0..dim).for_each(|d| Arc::make_mut(data).set(layout.index([b, h, j, d]), f32::NAN));
            }
        }
    }
    case.data.mask = Some(mask);
    case.name = format!("{spread:?} mask in blocks of {tile:?} less {shift:?}, {}", case.name);
    case
}

/// The tile in which a subject's plan maps the mask of a case, if it does.
fn mask_tile(subject: Subject, case: &Case, scratch_budget: Option<u64>) -> Option<[usize; 2]> {
    let Subject::Gpu { kind, checks, family, .. } = subject else { return None };
    let options = PlanOptions { family, scratch_budget, ..PlanOptions::default() };
    let plan = gpu::get(kind, checks)?.attention.plan_with(&subject.asked(case).problem, &options);
    plan.expect("the problem is served").mask_tile()
}

/// Subjects, with the tile in which they map the mask of `axes`; those that do not are in every share.
fn by_mask_tile(axes: Axes, subjects: Vec<Subject>) -> Vec<([usize; 2], Vec<Subject>)> {
    let case = with_blocks(axes, Spread::Full, [64, 32], [0, 0], 0);
    let tile_of = |&subject: &Subject| mask_tile(subject, &case, None);
    let mut tiles: Vec<_> = subjects.iter().filter_map(tile_of).collect();
    tiles.sort_unstable();
    tiles.dedup();
    assert!(subjects.len() <= Subject::cpu().len() || !tiles.is_empty(), "no mask is mapped");
    let share = |tile| subjects.iter().copied().filter(move |s| tile_of(s).is_none_or(|own| own == tile));
    tiles.iter().map(|&tile| (tile, share(tile).collect())).collect()
}

/// Masks that drop or keep whole tiles, or do so but for one pair, at the tile's edge and one off it.
#[test]
fn masks_in_blocks() {
    let base = Axes {
        batch: 2,
        heads: (2, 1),
        seq_q: 77,
        seq_kv: 531,
        head_dim: 64,
        head_dim_v: 64,
        spread: 1.0,
        ..Axes::default()
    };
    let small = Axes { dtype: Dtype::F16, out_dtype: Dtype::F16, lens: Lens::Partial, sinks: true, ..base };
    let small = Axes { heads: (2, 2), seq_kv: 258, ..small };
    let ranges = [
        base,
        Axes { causal: Some(Align::BottomRight), ..base },
        Axes { window: Some(Window { left: Some(300), right: Some(9) }), ..base },
        Axes { causal: Some(Align::TopLeft), seq_q: 130, seq_kv: 128, ..base },
        small,
        Axes { causal: Some(Align::BottomRight), lens: Lens::FirstEmpty, ..small },
    ];
    let mut cases = Vec::new();
    // The kernel on matrix units, which takes seconds to compile on a processor, has its turn below.
    let subjects = Subject::all().into_iter().filter(|subject| subject.takes(Dtype::F32)).collect();
    for (t, (tile, subjects)) in by_mask_tile(base, subjects).into_iter().enumerate() {
        for (i, spread) in Spread::ALL.into_iter().enumerate() {
            for (j, shift) in [[0, 0], [1, 0], [0, 1], [tile[0] - 1, tile[1] - 1]].into_iter().enumerate() {
                if !has_turn(t + i + j) {
                    continue;
                }
                // Each spread and each shift meets most of the ranges.
                let axes = ranges[(i + j * 5 / 4) % ranges.len()];
                cases.push((with_blocks(axes, spread, tile, shift, (4 * i + j) as u64), subjects.clone()));
            }
        }
    }
    check_all("masks in blocks", &cases);
}

/// Chunks of heads and of rows, fewer than a tile too, and parts of the keys find their place in the map,
/// which is as large as the plan says.
#[test]
fn masks_in_blocks_are_mapped_once_for_all_chunks() {
    // Bilinear queries take scratch: a budget then cuts them into chunks.
    let similarity = Sim::Bilinear { extra: 0, per_head: false };
    let base = Axes { batch: 2, heads: (4, 2), seq_q: 133, seq_kv: 300, ..Axes::default() };
    let base = Axes { head_dim: 64, head_dim_v: 64, similarity, ..base };
    let fused = |subject: &Subject| matches!(subject, Subject::Gpu { family: Some(family), .. } if family.path() == Path::Fused);
    let subjects = || Subject::few().into_iter().filter(fused);
    for (i, spread) in [Spread::Full, Spread::PerHead, Spread::PerBatch].into_iter().enumerate() {
        for (place, subject) in subjects().enumerate() {
            let Subject::Gpu { kind, checks, family, .. } = subject else { continue };
            if !has_turn(i + place) {
                continue;
            }
            let shape = with_blocks(base, spread, [64, 32], [0, 0], 0);
            let tile = mask_tile(subject, &shape, None).expect("four heads share it");
            let case = subject.asked(&with_blocks(base, spread, tile, [0, 1], i as u64));
            let expected = Expected::of(&case);
            let own = gpu::get(kind, checks).expect("listed").fresh();
            let mut whole = None;
            for scratch_budget in [None, Some(40_000), Some(10_000), Some(2_100)] {
                let options = PlanOptions { family, scratch_budget, ..PlanOptions::default() };
                let plan = own.plan_with(&case.problem, &options).expect("the problem is served");
                let context = format!("{subject:?} within {scratch_budget:?}\n{plan}\n  {}", case.name);
                assert_eq!(plan.mask_tile(), Some(tile), "{context}");
                if let Some(budget) = scratch_budget {
                    assert!(plan.chunks() > 1 && plan.scratch_bytes() <= budget, "{context}");
                }
                let out = own.run_plan_blocking(&plan, &case.data.inputs()).expect("served");
                if scratch_budget.is_none() {
                    assert_eq!(own.scratch_bytes(), plan.scratch_bytes(), "{context}");
                }
                if let Err(what) = expected.check(&case, &out, Gap::Zero) {
                    panic!("{what}: {context}");
                }
                // The rows of a thread rescale together, so that less than a tile is other rounding.
                if scratch_budget.is_none_or(|budget| budget > 2_100) {
                    let same = whole.get_or_insert_with(|| out.clone());
                    assert!(same_bits(same, &out), "other bits: {context}");
                }
            }
        }
    }
    let long = Axes { batch: 1, heads: (2, 1), seq_q: 66, seq_kv: 4200, ..Axes::default() };
    let long = Axes { head_dim: 128, head_dim_v: 128, ..long };
    let cases: Vec<_> = by_mask_tile(long, subjects().collect())
        .into_iter()
        .map(|(tile, subjects)| (with_blocks(long, Spread::Shared, tile, [0, 0], 7), subjects))
        .collect();
    check_all("masks in blocks over long rows", &cases);
}

/// Whatever tile a caller or a tuner chooses: the smallest, the largest, and some between.
#[test]
fn any_tile_gives_the_right_answer() {
    let base =
        Axes { heads: (2, 1), seq_q: 131, seq_kv: 150, head_dim: 20, head_dim_v: 36, ..Axes::default() };
    let all = Axes {
        causal: Some(Align::BottomRight),
        mask: Some(Spread::Shared),
        lens: Lens::Partial,
        sinks: true,
        storage: Storage::Odd,
        head_dim: 21,
        head_dim_v: 35,
        ..base
    };
    let Some(gpu) = gpu::get(Kind::Full, false) else { return };
    let mut runs = 0;
    for (i, axes) in [base, Axes { dtype: Dtype::F16, ..all }].into_iter().enumerate() {
        for family in gpu.families() {
            let door = Door::Encode;
            let subject =
                Subject::Gpu { kind: Kind::Full, checks: false, family: Some(family), door, split: false };
            let case = subject.asked(&axes.build(i as u64));
            let expected = Expected::of(&case);
            let tiles: Vec<_> = Tile::candidates(&case.problem, gpu.attention.caps())
                .into_iter()
                .filter(|tile| tile.family == family)
                .collect();
            assert!(!tiles.is_empty(), "{family} has no tile for {}", case.name);
            // Each takes a driver a second or more to compile.
            let step = tiles.len().div_ceil(4) * every();
            // The planner takes one of two: by the processor's registers, and by the room in workgroup memory.
            let of = Tile::of(family);
            let both = match family {
                Family::FusedRow => {
                    [2, 4].map(|side| Tile { rows: Some(2), keys: Some(4), side: Some(side), ..of }).to_vec()
                }
                Family::FusedTile | Family::FusedSubgroup => {
                    [0, 1].map(|held| Tile { held: Some(held), ..of }).to_vec()
                }
                _ => Vec::new(),
            };
            for &tile in tiles.iter().step_by(step).chain(tiles.last()).chain(&both) {
                let options = PlanOptions { tile: Some(tile), ..PlanOptions::default() };
                let outcome = gpu.run(&case, &options, door).map_err(|e| e.to_string());
                if let Err(what) = outcome.and_then(|(out, gap)| expected.check(&case, &out, gap)) {
                    panic!("{tile}: {what}\n  {}", case.name);
                }
                runs += 1;
            }
        }
    }
    common::say(&format!("tiles: {runs} runs"));
}

/// Any number of splits gives what one gives, up to rounding: steps of decoding, one query or a few guessed
/// ahead, heads in groups whose rows share a tile, against a cache that is longer than what it holds.
#[test]
fn splits_of_the_keys_change_nothing() {
    let base = Axes { batch: 2, seq_kv: 515, causal: Some(Align::BottomRight), ..Axes::default() };
    let base = Axes { head_dim: 20, head_dim_v: 33, lens: Lens::Partial, ..base };
    let decode = [
        Axes { heads: (8, 2), seq_q: 1, sinks: true, ..base },
        Axes { heads: (6, 2), seq_q: 3, alibi: true, softcap: Some(20.0), ..base },
        Axes { heads: (9, 3), seq_q: 16, bias: Some((Dtype::F32, Spread::PerHead, true)), ..base },
        Axes { heads: (4, 1), seq_q: 7, mask: Some(Spread::PerHead), storage: Storage::Odd, ..base },
        Axes { heads: (4, 2), seq_q: 2, window: Some(Window { left: Some(40), right: Some(0) }), ..base },
        Axes { heads: (4, 2), seq_q: 5, similarity: Sim::Bilinear { extra: 3, per_head: true }, ..base },
        Axes { heads: (6, 3), seq_q: 1, dtype: Dtype::F16, out_dtype: Dtype::F32, head_dim: 64, ..base },
        Axes { heads: (8, 2), seq_q: 2, similarity: Sim::Cosine, scale: Some(1.0), ..base },
    ];
    let Some(gpu) = gpu::get(Kind::Full, false) else { return };
    for (i, axes) in decode.into_iter().enumerate() {
        let case = axes.build(i as u64);
        let fused = gpu.families().filter(|family| family.path() == Path::Fused).enumerate();
        // Each takes a driver four kernels: slow adapters try some of them.
        for (_, family) in fused.filter(|(place, _)| (i + place).is_multiple_of(every())) {
            let (kind, door) = (Kind::Full, Door::Encode);
            let subject = Subject::Gpu { kind, checks: false, family: Some(family), door, split: true };
            let case = subject.asked(&case);
            let expected = Expected::of(&case);
            for splits in [1, 5] {
                // A budget of less than a group, too: its heads then take tiles of their own.
                for scratch_budget in [None, Some(60_000)] {
                    let options = PlanOptions {
                        family: Some(family),
                        splits: Some(splits),
                        scratch_budget,
                        ..PlanOptions::default()
                    };
                    let outcome = gpu.run(&case, &options, door).map_err(|e| e.to_string());
                    if let Err(what) = outcome.and_then(|(out, gap)| expected.check(&case, &out, gap)) {
                        panic!("{family}, {splits} splits: {what}\n  {}", case.name);
                    }
                }
            }
        }
    }
}

/// What another call left in scratch memory, NaN included, is never read.
#[test]
fn stale_scratch_reaches_nothing() {
    let base = Axes { batch: 2, heads: (4, 2), seq_q: 70, seq_kv: 150, weights: true, ..Axes::default() };
    let mut poison = Axes { similarity: Sim::Bilinear { extra: 0, per_head: false }, ..base }.build(1);
    poison.data.k = Tensor::from_f32(Dtype::F32, &vec![f32::NAN; poison.data.k.to_f32().len()]).into();
    let after = [
        Axes { causal: Some(Align::TopLeft), ..base },
        Axes { window: Some(Window { left: Some(3), right: Some(2) }), seq_q: 33, seq_kv: 77, ..base },
        Axes { lens: Lens::Partial, similarity: Sim::Bilinear { extra: 0, per_head: false }, ..base },
        Axes { causal: Some(Align::BottomRight), seq_q: 90, seq_kv: 31, ..base },
        Axes { lens: Lens::Partial, similarity: Sim::Cosine, scale: Some(1.0), ..base },
        Axes { lens: Lens::Partial, similarity: ADDITIVE, ..base },
    ];
    for kind in [Kind::Full, Kind::Minimal] {
        let Some(gpu) = gpu::get(kind, false) else { return };
        let own = gpu.fresh();
        for (i, axes) in after.into_iter().enumerate() {
            let case = axes.build(i as u64);
            for (place, family) in gpu.families().enumerate() {
                let fused = family.path() == Path::Fused;
                if !has_turn(i + place) || fused && axes.similarity == ADDITIVE {
                    continue;
                }
                let splits = (fused && i % 2 == 1).then_some(3);
                let options = PlanOptions { family: Some(family), splits, ..PlanOptions::default() };
                let (mut poison, mut case) = (poison.clone(), case.clone());
                for case in [&mut poison, &mut case] {
                    let subject = Subject::Gpu {
                        kind,
                        checks: false,
                        family: Some(family),
                        door: Door::Run,
                        split: false,
                    };
                    *case = subject.asked(case);
                    let plan = own.plan_with(&case.problem, &options).expect("served");
                    let out = own.run_plan_blocking(&plan, &case.data.inputs()).expect("served");
                    if let Err(what) = Expected::of(case).check(case, &out, Gap::Zero) {
                        panic!("{kind:?} {family}: {what}\n  {}", case.name);
                    }
                }
            }
        }
    }
}
