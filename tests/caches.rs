//! Caches and ragged batches: the same keys kept in another way give the same answer, on every path.

mod common;

use common::case::{Axes, Case, Lens, Sim, Spread};
use common::check::Expected;
use common::kept::{Kept, Move};
use common::subject::{Subject, check_all};
use half::f16;
use wgpu_attention::reference::{max_error, oracle};
use wgpu_attention::{Align, Dtype, Operand, Tensor, Window};

/// Problems that caches and ragged batches are met with, each with every option somewhere.
fn axes() -> Vec<Axes> {
    let base = Axes {
        batch: 3,
        heads: (6, 2),
        seq_q: 1,
        seq_kv: 161,
        head_dim: 32,
        head_dim_v: 32,
        causal: Some(Align::BottomRight),
        lens: Lens::Partial,
        ..Axes::default()
    };
    let half = |axes| Axes { dtype: Dtype::F16, out_dtype: Dtype::F16, ..axes };
    vec![
        base,
        half(Axes { seq_q: 5, head_dim: 64, head_dim_v: 48, sinks: true, ..base }),
        Axes { seq_q: 70, window: Some(Window { left: Some(30), right: Some(0) }), alibi: true, ..base },
        Axes { heads: (2, 2), head_dim: 33, head_dim_v: 7, softcap: Some(20.0), seq_q: 19, ..base },
        half(Axes {
            seq_q: 33,
            mask: Some(Spread::Full),
            bias: Some((Dtype::F32, Spread::PerBatch, true)),
            window: Some(Window { left: Some(50), right: Some(0) }),
            ..base
        }),
        Axes {
            dtype: Dtype::Bf16,
            out_dtype: Dtype::Bf16,
            similarity: Sim::Bilinear { extra: 3, per_head: true },
            seq_q: 2,
            causal: None,
            lens: Lens::FirstEmpty,
            ..base
        },
        Axes { seq_q: 40, causal: Some(Align::TopLeft), align: Align::TopLeft, weights: true, ..base },
        Axes { similarity: Sim::Cosine, scale: Some(1.0), seq_q: 3, head_dim: 22, ..base },
        Axes {
            similarity: Sim::Additive { extra: 1, hidden: 12, per_head: true },
            seq_q: 4,
            head_dim: 18,
            ..base
        },
        half(Axes { similarity: Sim::Additive { extra: 0, hidden: 7, per_head: false }, ..base }),
    ]
}

/// Every way of keeping keys, with storage types and ragged queries taking turns.
fn moves() -> Vec<Move> {
    let kept = [
        Kept::Plain,
        Kept::Ring(0),
        Kept::Ring(5),
        Kept::Paged(16),
        Kept::Paged(1),
        Kept::Paged(7),
        Kept::Paged(256),
        Kept::Ragged,
    ];
    let kv_dtypes =
        [None, Some(Dtype::F16), Some(Dtype::Int8), Some(Dtype::Int4), Some(Dtype::Bf16), Some(Dtype::F32)];
    let turns = (0..kept.len() * kv_dtypes.len() / 2).map(|i| Move {
        kept: kept[i % kept.len()],
        kv_dtype: kv_dtypes[(i + i / kept.len()) % kv_dtypes.len()],
        ragged_q: (i + i / kept.len()) % 3 != 1,
        heads_first: i % 5 < 2,
    });
    turns.collect()
}

fn cases() -> Vec<(Case, Case)> {
    let axes = axes();
    let moved = moves().into_iter().enumerate().map(|(i, to)| {
        let plain = axes[i % axes.len()].build(i as u64);
        let moved = plain.moved(to, i as u64);
        (plain, moved)
    });
    moved.collect()
}

/// The oracle itself: a moved case's entries are the plain problems that they were.
#[test]
fn the_oracle_finds_the_keys_wherever_they_are_kept() {
    for (plain, moved) in cases() {
        let p = &moved.problem;
        let whole = oracle(p, &moved.data.inputs()).unwrap_or_else(|e| panic!("{}: {e}", moved.name));
        // Rounding to another storage type is no business of this test's.
        let rounding = match p.stored_kv() {
            kv if kv == p.dtype => 0.0,
            Dtype::F32 => 0.0,
            Dtype::F16 => 4e-3,
            Dtype::Bf16 | Dtype::Int8 => 3e-2,
            Dtype::Int4 => 0.5,
            other => unreachable!("no case stores {other}"),
        };
        for b in 0..p.batch {
            let alone = moved.alone(&plain, b);
            let own = &alone.problem;
            let want = oracle(own, &alone.data.inputs()).unwrap_or_else(|e| panic!("{}: {e}", alone.name));
            let first =
                moved.data.cu_seqlens_q.as_ref().map_or(b * p.heads_q * p.seq_q, |list| list[b] as usize);
            let stride = p.total_q.unwrap_or(p.seq_q);
            for h in 0..p.heads_q {
                let (at, n) = ((h * own.seq_q) * own.head_dim_v, own.seq_q * own.head_dim_v);
                let row = first + h * stride;
                let got = whole.o[row * own.head_dim_v..][..n].iter().copied();
                let error = max_error(got, &want.o[at..][..n]);
                assert!(error <= rounding * want.max_value, "{error} in {}", alone.name);
                let lse = whole.lse[row..][..own.seq_q].iter().copied();
                let error = max_error(lse, &want.lse[h * own.seq_q..][..own.seq_q]);
                assert!(error <= rounding * want.max_score.max(1.0), "{error} in lse of {}", alone.name);
            }
        }
    }
}

/// Every path on every case: the CPU's, and each family's on opposite kinds of devices.
#[test]
fn kept_keys_on_every_path() {
    let cases: Vec<_> = cases()
        .into_iter()
        .map(|(_, moved)| {
            let subjects = Subject::few().into_iter().filter(|subject| subject.compares(&moved)).collect();
            (moved, subjects)
        })
        .collect();
    check_all("caches", &cases);
}

/// What is made of keys beforehand finds them, wherever they are kept: norms, and products with a matrix.
#[test]
fn terms_of_kept_keys() {
    let kept = [Kept::Plain, Kept::Ring(3), Kept::Paged(16), Kept::Paged(7), Kept::Ragged];
    let similarities = [
        Sim::Cosine,
        Sim::Additive { extra: 3, hidden: 13, per_head: false },
        Sim::Additive { extra: 0, hidden: 8, per_head: true },
    ];
    let mut cases = Vec::new();
    for (i, kept) in kept.into_iter().enumerate() {
        for (j, similarity) in similarities.into_iter().enumerate() {
            let axes = Axes {
                batch: 3,
                heads: (4, 2),
                seq_q: 5,
                seq_kv: 90,
                head_dim: [18, 32, 7][(i + j) % 3],
                causal: Some(Align::BottomRight),
                window: (i % 2 == 1).then_some(Window { left: Some(25), right: Some(0) }),
                lens: Lens::Partial,
                similarity,
                scale: Some(1.0),
                ..Axes::default()
            };
            let kv_dtype = [None, Some(Dtype::Int8), Some(Dtype::F16), Some(Dtype::Int4)][(i + j) % 4];
            let to = Move { kept, kv_dtype, ragged_q: (i + j) % 2 == 0, heads_first: j == 1 };
            let moved = axes.build((3 * i + j) as u64).moved(to, 7);
            let subjects = Subject::few().into_iter().filter(|subject| subject.compares(&moved)).collect();
            cases.push((moved, subjects));
        }
    }
    check_all("terms of kept keys", &cases);
}

/// Codes reach as far as bf16, and what f16 has reaches further as a code: the lowest f16 lies above a lowest value of
/// -65536. Neither may become an infinity on the way to matrices, whose product with a dropped key's weight is no number.
#[test]
fn codes_past_f16() {
    let mut cases = Vec::new();
    for (i, (operand, value)) in [
        (Operand::V, 7e4),
        (Operand::V, -2e5),
        (Operand::V, f16::MIN.to_f32()),
        (Operand::V, f16::MAX.to_f32()),
        (Operand::K, f16::MIN.to_f32()),
        (Operand::K, f16::MAX.to_f32()),
    ]
    .into_iter()
    .enumerate()
    {
        let axes =
            Axes { seq_q: 67, seq_kv: 67, causal: Some(Align::TopLeft), head_dim: 24, ..Axes::default() };
        let mut case = axes.build(i as u64);
        let p = &case.problem;
        let (layout, data) = match operand {
            Operand::K => (p.k, &mut case.data.k),
            _ => (p.v, &mut case.data.v),
        };
        let mut numbers = data.to_f32();
        numbers[layout.index([0, 1, 40, 3])] = value;
        *data = Tensor::from_f32(p.dtype, &numbers).into();
        for kv_dtype in [Dtype::Int8, Dtype::Int4] {
            let to = Move { kv_dtype: Some(kv_dtype), ..Move::default() };
            let mut moved = case.moved(to, 7);
            moved.name = format!("{operand} of {value:e}, {}", moved.name);
            cases.push((moved, Subject::all()));
        }
    }
    check_all("codes past f16", &cases);
}

/// The plan's own choice, and both modes of shaders, on a few.
#[test]
fn kept_keys_through_every_door() {
    let cases: Vec<_> = cases()
        .into_iter()
        .step_by(13)
        .map(|(_, moved)| {
            let subjects = Subject::all().into_iter().filter(|subject| subject.compares(&moved)).collect();
            (moved, subjects)
        })
        .collect();
    check_all("caches through every door", &cases);
    assert!(Expected::of(&cases[0].0).oracle.o.iter().all(|x| x.is_finite()));
}
