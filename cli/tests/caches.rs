//! `run` on files with pages and ragged batches: the same keys give the same results, however they are kept.

mod common;

use common::*;
use safetensors::Dtype;

const HEADS: usize = 4;
const HEADS_KV: usize = 2;
const WIDTH: usize = 8;
const WIDTH_V: usize = 6;
const PAGE: usize = 8;

/// A batch whose entries have numbers of queries and keys of their own, all tokens first.
struct Batch {
    queries: Vec<usize>,
    keys: Vec<usize>,
}

/// The widest of several.
fn longest(lens: &[usize]) -> usize {
    lens.iter().copied().max().unwrap_or(0)
}

/// 0 and the sums of the first few.
fn offsets(lens: &[usize]) -> Vec<i64> {
    let sums = lens.iter().scan(0, |sum, &len| {
        *sum += len as i64;
        Some(*sum)
    });
    std::iter::once(0).chain(sums).collect()
}

/// One token's row over all heads, the same wherever it is kept.
fn token(seed: u64, entry: usize, at: usize, n: usize) -> Vec<f32> {
    noise(seed * 1_000_000 + (entry * 1000 + at) as u64, n)
}

/// Integers of a shape.
fn integers(dtype: Dtype, shape: &[usize], values: &[i64]) -> Stored {
    let bytes = values.iter().flat_map(|&x| match dtype {
        Dtype::I64 => x.to_le_bytes().to_vec(),
        // -1 is the largest in U32.
        _ => (x as i32).to_le_bytes().to_vec(),
    });
    Stored::bytes(dtype, shape, &bytes.collect::<Vec<u8>>())
}

impl Batch {
    /// `[entries, longest, heads, width]` with NaN behind those of each entry.
    fn padded(&self, seed: u64, lens: &[usize], heads: usize, width: usize) -> Stored {
        let (rows, n) = (longest(lens), heads * width);
        let mut all = vec![f32::NAN; lens.len() * rows * n];
        for (b, &len) in lens.iter().enumerate() {
            for i in 0..len {
                all[(b * rows + i) * n..][..n].copy_from_slice(&token(seed, b, i, n));
            }
        }
        Stored::f32(&[lens.len(), rows, heads, width], &all)
    }

    /// `[total, heads, width]`.
    fn packed(&self, seed: u64, lens: &[usize], heads: usize, width: usize) -> Stored {
        let tokens = lens.iter().enumerate().flat_map(|(b, &len)| (0..len).map(move |i| (b, i)));
        let all: Vec<f32> = tokens.flat_map(|(b, i)| token(seed, b, i, heads * width)).collect();
        Stored::f32(&[lens.iter().sum(), heads, width], &all)
    }

    /// q as it is, or packed.
    fn q(&self, ragged: bool) -> Tensors {
        if ragged {
            let q = self.packed(1, &self.queries, HEADS, WIDTH);
            return tensors([("q", q), ("cu_seqlens_q", Stored::i64(&offsets(&self.queries)))]);
        }
        tensors([("q", self.padded(1, &self.queries, HEADS, WIDTH))])
    }

    fn lens(&self) -> Stored {
        Stored::i64(&self.keys.iter().map(|&len| len as i64).collect::<Vec<_>>())
    }

    fn plain(&self, ragged_q: bool) -> Tensors {
        let mut all = self.q(ragged_q);
        all.extend(tensors([
            ("k", self.padded(2, &self.keys, HEADS_KV, WIDTH)),
            ("v", self.padded(3, &self.keys, HEADS_KV, WIDTH_V)),
            ("kv_lens", self.lens()),
        ]));
        all
    }

    fn ragged(&self, ragged_q: bool) -> Tensors {
        let mut all = self.q(ragged_q);
        all.extend(tensors([
            ("k", self.packed(2, &self.keys, HEADS_KV, WIDTH)),
            ("v", self.packed(3, &self.keys, HEADS_KV, WIDTH_V)),
            ("cu_seqlens_k", Stored::i64(&offsets(&self.keys))),
        ]));
        all
    }

    /// Pages from the last to the first, NaN in every row of them that has no key, -1 for what no key needs.
    fn paged(&self, ragged_q: bool, list: Dtype) -> Tensors {
        let blocks = longest(&self.keys).div_ceil(PAGE) + 1;
        let pages = self.keys.iter().map(|len| len.div_ceil(PAGE)).sum::<usize>() + 2;
        let mut table = vec![-1; self.keys.len() * blocks];
        let mut free = pages;
        for (b, &len) in self.keys.iter().enumerate() {
            for block in &mut table[b * blocks..][..len.div_ceil(PAGE)] {
                free -= 1;
                *block = free as i64;
            }
        }
        let pool = |seed, width| {
            let n = HEADS_KV * width;
            let mut all = vec![f32::NAN; pages * PAGE * n];
            for (b, &len) in self.keys.iter().enumerate() {
                for j in 0..len {
                    let page = table[b * blocks + j / PAGE] as usize;
                    all[(page * PAGE + j % PAGE) * n..][..n].copy_from_slice(&token(seed, b, j, n));
                }
            }
            Stored::f32(&[pages, PAGE, HEADS_KV, width], &all)
        };
        let mut all = self.q(ragged_q);
        all.extend(tensors([
            ("k_pool", pool(2, WIDTH)),
            ("v_pool", pool(3, WIDTH_V)),
            ("block_table", integers(list, &[self.keys.len(), blocks], &table)),
            ("kv_lens", self.lens()),
        ]));
        all
    }
}

fn run(path: &str, input: &Tensors, flags: &[&str]) -> Tensors {
    let folder = Folder::new();
    let (from, to) = (folder.write("in.safetensors", file(input)), folder.text("out.safetensors"));
    succeed(
        &[&["run", &from, "-o", &to, "--path", path, "--layout", "bshd", "--causal", "bottom-right"], flags]
            .concat(),
    );
    read(&folder.path("out.safetensors"))
}

fn assert_same(what: &str, got: &Tensors, want: &Tensors, tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (name, want) in want {
        assert_eq!(got[name].shape, want.shape, "{what}: {name}");
        let error = distance(&got[name].values(), &want.values());
        assert!(error <= tolerance, "{what}: {name} is off by {error:e}");
    }
}

#[test]
fn pages_and_ragged_keys_give_what_contiguous_ones_give() {
    let batch = Batch { queries: vec![3, 3, 3], keys: vec![37, 16, 5] };
    for path in paths() {
        let flags = weights_flag(path);
        let want = run(path, &batch.plain(false), flags);
        assert_eq!(want["o"].shape, [3, 3, HEADS, WIDTH_V]);
        for (what, input) in [
            ("pages", batch.paged(false, Dtype::I32)),
            ("pages in 64 bits", batch.paged(false, Dtype::I64)),
            ("pages without sign", batch.paged(false, Dtype::U32)),
            ("ragged keys", batch.ragged(false)),
        ] {
            assert_same(&format!("{what}, {path}"), &run(path, &input, flags), &want, 1e-5);
        }
    }
}

/// Some entries begin, some go on by one token, some rest: against every way of keeping keys.
#[test]
fn a_mixed_batch_is_its_entries_one_by_one() {
    let batch = Batch { queries: vec![1, 9, 0, 2], keys: vec![20, 9, 4, 33] };
    let total = batch.queries.iter().sum::<usize>();
    let alone: Vec<Tensors> = (0..4)
        .map(|b| {
            let tokens = |seed, heads: usize, width, len| {
                let all: Vec<f32> = (0..len).flat_map(|i| token(seed, b, i, heads * width)).collect();
                Stored::f32(&[1, len, heads, width], &all)
            };
            let input = tensors([
                ("q", tokens(1, HEADS, WIDTH, batch.queries[b])),
                ("k", tokens(2, HEADS_KV, WIDTH, batch.keys[b])),
                ("v", tokens(3, HEADS_KV, WIDTH_V, batch.keys[b])),
            ]);
            run("oracle", &input, &[])
        })
        .collect();
    let o: Vec<f64> = alone.iter().flat_map(|entry| entry["o"].values()).collect();
    let lse: Vec<f64> = (0..HEADS)
        .flat_map(|h| alone.iter().zip(&batch.queries).map(move |(entry, &n)| (entry, n, h)))
        .flat_map(|(entry, n, h)| entry["lse"].values()[h * n..][..n].to_vec())
        .collect();
    let weights = run("oracle", &batch.plain(true), &["--weights"]).remove("weights").unwrap();
    assert_eq!(weights.shape, [4, HEADS, 9, 33]);
    for path in paths() {
        for (what, input) in [
            ("contiguous", batch.plain(true)),
            ("pages", batch.paged(true, Dtype::I32)),
            ("ragged keys", batch.ragged(true)),
        ] {
            let what = format!("{what}, {path}");
            let got = run(path, &input, weights_flag(path));
            assert_eq!(got["o"].shape, [total, HEADS, WIDTH_V], "{what}");
            assert_eq!(got["lse"].shape, [HEADS, total], "{what}");
            for (name, want) in [("o", &o), ("lse", &lse)] {
                let error = distance(&got[name].values(), want);
                assert!(error < 2e-5, "{what}: {name} is off by {error:e}");
            }
            if let Some(got) = got.get("weights") {
                assert_eq!(got.shape, weights.shape, "{what}");
                let error = distance(&got.values(), &weights.values());
                assert!(error < 1e-5, "{what}: the weights are off by {error:e}");
            }
        }
    }
    let picture = |input: &Tensors, entry: &str| {
        let folder = Folder::new();
        let (from, to) = (folder.write("in.safetensors", file(input)), folder.text("out.svg"));
        succeed(&["heatmap", &from, "-o", &to, "--quiet", "--layout", "bshd", "--batch", entry]);
        // The cells; the words above them name the cache.
        let picture = std::fs::read_to_string(to).unwrap();
        picture.lines().filter(|line| line.starts_with("<path")).map(String::from).collect::<Vec<_>>()
    };
    let cells = picture(&batch.plain(true), "3");
    assert!(cells.len() > 10 && cells == picture(&batch.paged(true, Dtype::U32), "3"), "another picture");
    // An entry has no more rows and columns than it has queries and keys.
    let first = Batch { queries: vec![1], keys: vec![20] };
    assert_eq!(picture(&batch.ragged(true), "0"), picture(&first.plain(false), "0"));
    // A batch in which nobody asks.
    let none = Batch { queries: vec![0, 0], keys: vec![3, 4] };
    let got = run("cpu", &none.paged(true, Dtype::I64), &[]);
    assert_eq!((got["o"].shape.as_slice(), got["lse"].shape.as_slice()), (&[0, 4, 6][..], &[4, 0][..]));
}

#[test]
fn k_and_v_have_a_type_of_their_own() {
    let batch = Batch { queries: vec![2, 2], keys: vec![19, 8] };
    let narrow = |input: &Tensors, make: fn(&[usize], &[f32]) -> Stored| {
        let mut narrow = input.clone();
        for (name, tensor) in input.iter().filter(|(name, _)| name.starts_with(['k', 'v'])) {
            if tensor.dtype == Dtype::F32 {
                let values: Vec<f32> = tensor.values().into_iter().map(|x| x as f32).collect();
                narrow.insert(name.clone(), make(&tensor.shape, &values));
            }
        }
        narrow
    };
    let exact = run("oracle", &batch.plain(false), &[]);
    let files = [batch.plain(false), batch.paged(false, Dtype::I64), batch.ragged(false)];
    let mut seen = vec![exact.clone()];
    for (kv_dtype, off) in [("f16", 2e-3), ("bf16", 2e-2), ("int8", 2e-2), ("int4", 0.3)] {
        let want = run("oracle", &files[0], &["--kv-dtype", kv_dtype]);
        assert!(!seen.contains(&want), "{kv_dtype} changes something");
        assert_same(kv_dtype, &want, &exact, off);
        assert_eq!(want["o"].dtype, Dtype::F32, "o is as q");
        for path in paths() {
            for (at, input) in files.iter().enumerate() {
                let what = format!("{kv_dtype}, {path}, file {at}");
                assert_same(&what, &run(path, input, &["--kv-dtype", kv_dtype]), &want, 2e-5);
            }
        }
        seen.push(want);
    }
    for (make, kv_dtype) in [(Stored::f16 as fn(&[usize], &[f32]) -> Stored, "f16"), (Stored::bf16, "bf16")] {
        let want = run("oracle", &files[0], &["--kv-dtype", kv_dtype]);
        for path in paths() {
            for input in &files {
                let input = narrow(input, make);
                assert_same(path, &run(path, &input, &[]), &want, 2e-5);
            }
        }
        // Widened, they are the numbers that they were.
        assert_same("f32", &run("cpu", &narrow(&files[1], make), &["--kv-dtype", "f32"]), &want, 2e-5);
    }
}

#[test]
fn what_does_not_fit_together_is_one_line() {
    let batch = Batch { queries: vec![2, 1], keys: vec![19, 8] };
    let (plain, ragged, paged) = (batch.plain(false), batch.ragged(true), batch.paged(true, Dtype::I32));
    let with = |input: &Tensors, name: &str, tensor: Stored| {
        let mut input = input.clone();
        input.insert(name.into(), tensor);
        input
    };
    let without = |input: &Tensors, name: &str| {
        let mut input = input.clone();
        input.remove(name).unwrap();
        input
    };
    let table = |values: &[i64]| integers(Dtype::I64, &[2, 4], values);
    let (pool, list) = (&paged["k_pool"], Stored::i64(&[0, 2, 3]));
    for (input, words) in [
        (with(&paged, "k", plain["k"].clone()), &["k:", "[2, 19, 2, 8]", "k_pool", "[6, 8, 2, 8]"][..]),
        (with(&paged, "v", plain["v"].clone()), &["v:", "[2, 19, 2, 6]", "v_pool"]),
        (with(&plain, "block_table", table(&[0; 8])), &["k:", "block_table", "[2, 4]"]),
        (with(&paged, "cu_seqlens_k", list.clone()), &["cu_seqlens_k", "[3]", "k_pool"]),
        (with(&ragged, "kv_lens", Stored::i64(&[19, 8])), &["kv_lens", "[2]", "cu_seqlens_k", "[3]"]),
        (without(&paged, "block_table"), &["k_pool", "[6, 8, 2, 8]", "needs block_table"]),
        (without(&paged, "v_pool"), &["k_pool", "needs v_pool"]),
        (without(&paged, "k_pool"), &["v_pool", "[6, 8, 2, 6]", "needs k_pool"]),
        (with(&paged, "k_pool", Stored::f32(&[96, 8], &[0.0; 768])), &["k_pool", "[pages, keys,", "[96, 8]"]),
        (with(&paged, "v_pool", pool.clone()), &[]),
        (with(&paged, "v_pool", Stored::f32(&[3, 16, 2, 8], &[0.0; 768])), &["v_pool", "pages 6", "got 3"]),
        (with(&paged, "k_pool", Stored::f32(&[6, 0, 2, 8], &[])), &["kv_lens[0]", "0 to 0", "19"]),
        (with(&paged, "k_pool", Stored::f16(&[6, 8, 2, 8], &[0.0; 768])), &["v_pool", "f16", "f32"]),
        (with(&paged, "block_table", Stored::i64(&[0; 8])), &["block_table", "[batch, blocks]", "[8]"]),
        (with(&paged, "block_table", integers(Dtype::I64, &[1, 4], &[0; 4])), &["block_table", "batch 2"]),
        (with(&paged, "block_table", Stored::f32(&[2, 4], &[0.0; 8])), &["block_table", "I32", "F32"]),
        (
            with(&paged, "block_table", table(&[0, 1, -7, 0, 0, 0, 0, 0])),
            &["block_table[0][2] = -7", "the 6 pages"],
        ),
        (
            with(&paged, "block_table", table(&[0, 1, 2, 0, 6, 0, 0, 0])),
            &["block_table[1][0] = 6", "the 6 pages"],
        ),
        (with(&paged, "block_table", table(&[0, 1, 1 << 32, 0, 0, 0, 0, 0])), &["block_table[0][2]"]),
        (with(&paged, "kv_lens", Stored::i64(&[33, 1])), &["kv_lens[0]", "0 to 32", "33"]),
        (with(&paged, "kv_lens", Stored::i64(&[3])), &["kv_lens", "[2]", "[1]"]),
        (with(&ragged, "cu_seqlens_q", Stored::i64(&[0, 2])), &["cu_seqlens_k", "batch 1", "got 2", "[3]"]),
        (with(&ragged, "cu_seqlens_q", Stored::i64(&[0, 2, 4])), &["cu_seqlens_q[2] = 4"]),
        (with(&ragged, "cu_seqlens_q", Stored::i64(&[1, 2, 3])), &["cu_seqlens_q[0] = 1"]),
        (with(&ragged, "cu_seqlens_q", Stored::i64(&[0, 3, 2])), &["cu_seqlens_q"]),
        (with(&ragged, "cu_seqlens_q", Stored::i64(&[0, -1, 3])), &["cu_seqlens_q[1]", "-1"]),
        (with(&ragged, "cu_seqlens_q", Stored::i64(&[0, 1 << 32, 3])), &["cu_seqlens_q[1]", "4294967296"]),
        (with(&ragged, "cu_seqlens_q", Stored::i64(&[])), &["cu_seqlens_q", "[batch + 1]", "[0]"]),
        (with(&ragged, "cu_seqlens_q", table(&[0; 8])), &["cu_seqlens_q", "[batch + 1]", "[2, 4]"]),
        (with(&ragged, "q", plain["q"].clone()), &["q", "[total, heads, width]", "[2, 2, 4, 8]"]),
        (with(&ragged, "k", plain["k"].clone()), &["k", "[total, heads, width]", "[2, 19, 2, 8]"]),
        (with(&ragged, "cu_seqlens_k", Stored::i64(&[0, 19, 28])), &["cu_seqlens_k[2] = 28"]),
        (with(&ragged, "cu_seqlens_k", Stored::i64(&[0, 19, 26])), &["cu_seqlens_k[2] = 26"]),
    ] {
        let folder = Folder::new();
        let (from, to) = (folder.write("in.safetensors", file(&input)), folder.text("out.safetensors"));
        let args = ["run", &from, "-o", &to, "--path", "cpu", "--layout", "bshd"];
        if words.is_empty() {
            // Another width of v is none of our business.
            succeed(&args);
            continue;
        }
        let line = refuse(&words.join(" "), &args);
        assert!(words.iter().all(|word| line.contains(word)), "{words:?} in {line}");
        assert!(line.contains("in.safetensors"), "{line}");
        assert_eq!(folder.files(), ["in.safetensors"], "nothing is written");
    }
    let folder = Folder::new();
    let from = folder.write("in.safetensors", file(&paged));
    let line = refuse("type", &["run", &from, "-o", &folder.text("out"), "--kv-dtype", "int2"]);
    assert!(line.contains("int2"), "{line}");
}
