//! Whatever the bytes and flags: exit code 2, one line, nothing written, no panic.

mod common;

use common::*;
use safetensors::Dtype;

fn good() -> Tensors {
    qkv([2, 4, 3, 8], [2, 2, 5, 8], [2, 2, 5, 6])
}

/// The good file with other or more tensors.
fn with<const N: usize>(list: [(&str, Stored); N]) -> Vec<u8> {
    let mut all = good();
    all.extend(tensors(list));
    file(&all)
}

fn without(name: &str) -> Vec<u8> {
    let mut all = good();
    all.remove(name);
    file(&all)
}

fn zeros(shape: &[usize]) -> Stored {
    Stored::f32(shape, &vec![0.0; shape.iter().product()])
}

/// A header with q at an offset range of so many data bytes.
fn header(q: &str, data: usize) -> Vec<u8> {
    raw_file(&format!("{{{q}}}"), &vec![0; data])
}

#[test]
fn hostile_files_are_refused() {
    let whole = file(&good());
    let entry = |name: &str, dtype: &str, shape: &str, from: &str, to: &str| {
        format!("\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":[{shape}],\"data_offsets\":[{from},{to}]}}")
    };
    let two = |a: (&str, &str), b: (&str, &str)| {
        [entry("q", "F32", "1,2", a.0, a.1), entry("k", "F32", "1,2", b.0, b.1)].join(",")
    };
    let mut long_header = (1u64 << 26).to_le_bytes().to_vec();
    long_header.extend(b"{}");
    // In wrapping arithmetic the end of this data is the end of the file.
    let wraps = |extra: u64| {
        let all = u64::MAX - extra;
        header(&entry("q", "U8", &all.to_string(), "0", &all.to_string()), 8)
    };
    let deep = "[".repeat(100_000);
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("an empty file", vec![]),
        ("seven bytes", vec![1; 7]),
        ("no header", vec![0; 8]),
        ("a header longer than the file", long_header),
        ("a header longer than memory", u64::MAX.to_le_bytes().to_vec()),
        ("a header longer than the format allows", [&200_000_000u64.to_le_bytes()[..], b"{}"].concat()),
        ("a header of zeros", raw_file("\0\0\0\0\0\0\0\0", &[])),
        ("a header that is no JSON", raw_file("hello", &[])),
        ("a header that ends early", raw_file("{\"q\":{\"dtype\":\"F32\"", &[])),
        ("a header that is no object", raw_file("[1,2,3]", &[])),
        ("a header that is no text", [&4u64.to_le_bytes()[..], &[0xff, 0xfe, 0x80, 0x81]].concat()),
        ("a deep header", raw_file(&format!("{{\"q\":{deep}"), &[])),
        ("a tensor that is a number", raw_file("{\"q\":1}", &[])),
        ("no tensor", raw_file("{}", &[])),
        ("a tensor without shape", raw_file("{\"q\":{\"dtype\":\"F32\",\"data_offsets\":[0,0]}}", &[])),
        ("an unknown type", header(&entry("q", "F31", "1,2", "0", "8"), 8)),
        ("a negative size", header(&entry("q", "F32", "-1,2", "0", "8"), 8)),
        ("a fractional size", header(&entry("q", "F32", "1.5,2", "0", "12"), 12)),
        ("a size beyond 64 bits", header(&entry("q", "F32", "99999999999999999999,2", "0", "8"), 8)),
        ("sizes whose product overflows", header(&entry("q", "F32", "4294967296,4294967296", "0", "8"), 8)),
        ("bytes that overflow", header(&entry("q", "F32", "4611686018427387904,1", "0", "8"), 8)),
        ("an end that wraps around", wraps(0)),
        ("an end that wraps around to the file's own", wraps(7)),
        ("offsets that do not match the shape", header(&entry("q", "F32", "1,2", "0", "12"), 12)),
        ("offsets that go backwards", header(&entry("q", "F32", "1,2", "8", "0"), 8)),
        ("offsets that overlap", header(&two(("0", "8"), ("4", "12")), 12)),
        ("the same offsets twice", header(&two(("0", "8"), ("0", "8")), 8)),
        ("a gap between tensors", header(&two(("0", "8"), ("12", "20")), 20)),
        ("offsets not from 0", header(&entry("q", "F32", "1,2", "4", "12"), 12)),
        ("offsets behind the end", header(&entry("q", "F32", "1,2", "0", "8"), 4)),
        ("the same name twice", {
            let one = entry("q", "F32", "0,2", "0", "0");
            header(&format!("{one},{one}"), 0)
        }),
        ("the same name twice, written otherwise", {
            let (one, other) = (entry("q", "F32", "0,2", "0", "0"), entry("\\u0071", "F32", "0,2", "0", "0"));
            header(&format!("{one},{other}"), 0)
        }),
        ("a truncated file", whole[..whole.len() - 1].to_vec()),
        ("half a file", whole[..whole.len() / 2].to_vec()),
        ("a byte too many", [&whole[..], &[0]].concat()),
        ("control characters in a name", header(&entry("q\\n\\u001b[31mred", "F32", "1,2", "0", "8"), 8)),
        ("another format", b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}".to_vec()),
        ("no q", without("q")),
        ("no k", without("k")),
        ("no v", without("v")),
        ("q of rank 1", with([("q", zeros(&[8]))])),
        ("q of rank 5", with([("q", zeros(&[1, 2, 4, 3, 8]))])),
        ("q of rank 0", with([("q", zeros(&[]))])),
        ("q of f64", with([("q", Stored::bytes(Dtype::F64, &[2, 4, 3, 8], &[0; 2 * 4 * 3 * 8 * 8]))])),
        ("q of integers", with([("q", Stored::bytes(Dtype::I32, &[2, 4, 3, 8], &[0; 2 * 4 * 3 * 8 * 4]))])),
        ("k of another type", with([("k", Stored::f16(&[2, 2, 5, 8], &[0.0; 160]))])),
        ("v of another type", with([("v", Stored::bf16(&[2, 2, 5, 6], &[0.0; 120]))])),
        ("k of another width", with([("k", zeros(&[2, 2, 5, 7]))])),
        ("k of another batch", with([("k", zeros(&[3, 2, 5, 8]))])),
        ("k of too many heads", with([("k", zeros(&[2, 8, 5, 8])), ("v", zeros(&[2, 8, 5, 6]))])),
        ("heads that do not divide", with([("k", zeros(&[2, 3, 5, 8])), ("v", zeros(&[2, 3, 5, 6]))])),
        ("no head", with([("k", zeros(&[2, 0, 5, 8])), ("v", zeros(&[2, 0, 5, 6]))])),
        ("v of another length", with([("v", zeros(&[2, 2, 6, 6]))])),
        ("v of other heads", with([("v", zeros(&[2, 1, 5, 6]))])),
        ("width 0", with([("q", zeros(&[2, 4, 3, 0])), ("k", zeros(&[2, 2, 5, 0]))])),
        ("value width 0", with([("v", zeros(&[2, 2, 5, 0]))])),
        ("results that nothing can hold", {
            let vast = Stored::f32(&[1, 1, 0, 1 << 28], &[]);
            file(&tensors([("q", zeros(&[1, 1, 64, 1])), ("k", zeros(&[1, 1, 0, 1])), ("v", vast)]))
        }),
        ("a width that no data vouches for", {
            let wide = Stored::f32(&[1, 1, 0, 1 << 17], &[]);
            file(&tensors([("q", zeros(&[1, 1, 1, 1])), ("k", zeros(&[1, 1, 0, 1])), ("v", wide)]))
        }),
        ("a length that nothing can hold", {
            let vast = |width| Stored::f32(&[1, 1, 1 << 40, width], &[]);
            file(&tensors([("q", zeros(&[1, 1, 2, 1])), ("k", vast(0)), ("v", vast(0))]))
        }),
        ("w without bilinear", with([("w", zeros(&[8, 8]))])),
        ("bias that does not fit", with([("bias", zeros(&[3, 4]))])),
        ("bias of rank 1", with([("bias", zeros(&[5]))])),
        ("bias of rank 5", with([("bias", zeros(&[1, 1, 1, 3, 5]))])),
        ("bias with 0", with([("bias", zeros(&[0, 5]))])),
        ("bias of booleans", with([("bias", Stored::bytes(Dtype::BOOL, &[3, 5], &[1; 15]))])),
        ("mask of floats", with([("mask", zeros(&[3, 5]))])),
        ("mask that does not fit", with([("mask", Stored::bytes(Dtype::BOOL, &[2, 5], &[1; 10]))])),
        ("too few slopes", with([("alibi_slopes", zeros(&[3]))])),
        ("slopes of rank 2", with([("alibi_slopes", zeros(&[1, 4]))])),
        ("too many sinks", with([("sinks", zeros(&[5]))])),
        ("sinks of integers", with([("sinks", Stored::i32(&[1, 2, 3, 4]))])),
        ("a negative length", with([("kv_lens", Stored::i64(&[-1, 2]))])),
        ("a length beyond the keys", with([("kv_lens", Stored::i32(&[6, 2]))])),
        ("an enormous length", with([("kv_lens", Stored::i64(&[i64::MAX, i64::MIN]))])),
        ("a length that is 0 in 32 bits", with([("kv_lens", Stored::i64(&[1 << 32, 2]))])),
        ("too few lengths", with([("kv_lens", Stored::i64(&[2]))])),
        ("lengths of floats", with([("kv_lens", zeros(&[2]))])),
    ];
    for (what, bytes) in &cases {
        let folder = Folder::new();
        let (from, to) = (folder.write("in.safetensors", bytes), folder.text("out.safetensors"));
        for path in ["cpu", "oracle"] {
            let line = refuse(what, &["run", &from, "-o", &to, "--path", path]);
            assert!(line.contains("in.safetensors"), "{what}: which file? {line}");
            assert!(!line.contains('\x1b'), "{what}: {line:?}");
        }
        let picture = folder.text("out.svg");
        refuse(what, &["heatmap", &from, "-o", &picture]);
        assert_eq!(folder.files(), ["in.safetensors"], "{what}: nothing is written");
    }
}

#[test]
fn a_matrix_that_does_not_fit_is_refused() {
    let folder = Folder::new();
    let to = folder.text("out.safetensors");
    for (what, bytes) in [
        ("bilinear without w", file(&good())),
        ("w of another width", with([("w", zeros(&[8, 7]))])),
        ("w of other heads", with([("w", zeros(&[2, 8, 8]))])),
        ("w of rank 1", with([("w", zeros(&[64]))])),
        ("w of integers", with([("w", Stored::bytes(Dtype::I32, &[8, 8], &[0; 256]))])),
    ] {
        let from = folder.write("in.safetensors", bytes);
        let line = refuse(what, &["run", &from, "-o", &to, "--similarity", "bilinear", "--path", "cpu"]);
        assert!(line.contains("w:"), "{what}: {line}");
    }
    let all = |v: &[usize], w_q: &[usize], w_k: &[usize]| {
        with([("score_v", zeros(v)), ("w_q", zeros(w_q)), ("w_k", zeros(w_k))])
    };
    for (what, bytes, name) in [
        ("additive without score_v", with([("w_q", zeros(&[6, 8])), ("w_k", zeros(&[6, 8]))]), "score_v"),
        ("additive without w_k", with([("score_v", zeros(&[6])), ("w_q", zeros(&[6, 8]))]), "w_k"),
        ("score_v of rank 0", all(&[], &[6, 8], &[6, 8]), "score_v"),
        ("score_v of other heads", all(&[3, 6], &[6, 8], &[6, 8]), "score_v"),
        ("score_v of width 0", all(&[0], &[0, 8], &[0, 8]), "hidden"),
        ("w_q of another hidden width", all(&[6], &[5, 8], &[6, 8]), "w_q"),
        ("w_k of another width", all(&[6], &[6, 8], &[6, 7]), "w_k"),
        ("w_k of each head, score_v of none", all(&[6], &[6, 8], &[4, 6, 8]), "w_k"),
    ] {
        let from = folder.write("in.safetensors", bytes);
        let line = refuse(what, &["run", &from, "-o", &to, "--similarity", "additive", "--path", "cpu"]);
        assert!(line.contains(name), "{what}: {line}");
        refuse(what, &["run", &from, "-o", &to, "--path", "cpu"]);
    }
}

#[test]
fn a_line_names_the_tensor_the_need_and_the_got() {
    let folder = Folder::new();
    let to = folder.text("out.safetensors");
    for (bytes, words) in [
        (with([("k", Stored::f16(&[2, 2, 5, 8], &[0.0; 160]))]), &["k", "f32", "f16"][..]),
        (with([("v", zeros(&[2, 2, 6, 6]))]), &["v", "5", "6"]),
        (with([("bias", zeros(&[3, 4]))]), &["bias", "[2, 4, 3, 5]", "[3, 4]"]),
        (with([("kv_lens", Stored::i64(&[2, 9]))]), &["kv_lens[1]", "5", "9"]),
        (with([("q", Stored::bytes(Dtype::U8, &[2, 3], &[0; 6]))]), &["q", "F32", "U8"]),
        (without("v"), &["'v'", "k, q"]),
    ] {
        let from = folder.write("in.safetensors", bytes);
        let line = refuse("wording", &["run", &from, "-o", &to, "--path", "cpu"]);
        assert!(words.iter().all(|word| line.contains(word)), "{words:?} in {line}");
    }
}

#[test]
fn bad_flags_are_refused() {
    let folder = Folder::new();
    let from = folder.write("in.safetensors", file(&good()));
    let (to, picture) = (folder.text("out.safetensors"), folder.text("out.svg"));
    let tokens = folder.write("tokens.txt", "only three tokens\n");
    let elsewhere = folder.text("no/such/folder/out.safetensors");
    let (here, chart) = (folder.text("."), folder.text("chart.png"));
    let before = folder.files();
    let run = |more: &[&str]| {
        let mut args = vec!["run", from.as_str(), "-o", to.as_str(), "--path", "cpu"];
        // A flag that is given twice is an error of its own.
        if more.first() == Some(&"--path") {
            args.truncate(4);
        }
        args.extend(more);
        refuse("flags", &args)
    };
    for flags in [
        &["--scale", "nan"][..],
        &["--scale", "inf"],
        &["--scale", "1e99"],
        &["--scale", "abc"],
        &["--scale"],
        &["--scale", "1", "--scale", "2"],
        &["--softcap", "0"],
        &["--softcap", "-1"],
        &["--softcap", "nan"],
        &["--window", "3"],
        &["--window", "a,b"],
        &["--window", "-1,2"],
        &["--window", "1,2,3"],
        &["--window", "99999999999999999999999,1"],
        &["--causal", "left"],
        &["--causal"],
        &["--align", "middle"],
        &["--similarity", "euclidean"],
        &["--similarity", "bilinear"],
        &["--layout", "sbhd"],
        &["--layout", "bshd"],
        &["--out-dtype", "f16"],
        &["--kv-dtype", "f64"],
        &["--path", "warp"],
        &["--path", "staged:warp"],
        &["--path", "staged", "--adapter", "no such adapter"],
        &["--path", "auto", "--adapter", "no such adapter"],
        &["--frobnicate"],
        &["more.safetensors"],
        &["--weights=7"],
    ] {
        run(flags);
    }
    for args in [
        &["run", from.as_str()][..],
        &["run", "-o", to.as_str()],
        &["run", "no-such-file.safetensors", "-o", to.as_str()],
        &["run", here.as_str(), "-o", to.as_str()],
        &["run", "/dev/null", "-o", to.as_str()],
        &["run", from.as_str(), "-o", here.as_str()],
        &["run", from.as_str(), "-o", elsewhere.as_str()],
        &["run", from.as_str(), "-o", ""],
        &["frobnicate"],
        &["--frobnicate"],
        &["bench", "--shapes", "1x2x3"],
        &["bench", "--shapes", ""],
        &["bench", "--shapes", "1x0x3x4"],
        &["bench", "--shapes", "1x4/3x8x8"],
        &["bench", "--shapes", "0x1x8x8"],
        &["bench", "--shapes", "1x1x9999999999x8"],
        &["bench", "--shapes", "99999x99999x99999x8"],
        &["bench", "--dtype", "f8"],
        &["bench", "--repeat", "0"],
        &["bench", "--repeat", "-1"],
        &["bench", "--path", "warp"],
        &["bench", "--path", "staged", "--adapter", "no such adapter"],
        &["bench", "--with", "glue"],
        &["bench", "--cache", "heap:16"],
        &["bench", "--cache", "paged:0"],
        &["bench", "--cache", "paged"],
        &["bench", "--shapes", "1x1x1/64x8", "--cache", "ring:63"],
        &["bench", "--kv-dtype", "int2"],
        &["bench", "--json", elsewhere.as_str()],
        &["bench", "--plot", here.as_str()],
        &["bench", "--plot", chart.as_str()],
        &["verify", "--cases", "0"],
        &["verify", "--adapter", "no such adapter"],
        &["explain"],
        &["explain", "1x2"],
        &["explain", "1x8x64x64", "--family", "warp"],
        &["explain", "1x8x64x64", "--adapter", "no such adapter"],
        &["explain", "1x8x64x64", "--softcap", "0"],
        &["heatmap", from.as_str(), "-o", picture.as_str(), "--tokens", tokens.as_str()],
        &["heatmap", from.as_str(), "-o", picture.as_str(), "--tokens", here.as_str()],
        &["heatmap", from.as_str(), "-o", picture.as_str(), "--tokens", from.as_str()],
        &["heatmap", from.as_str(), "-o", picture.as_str(), "--batch", "2"],
    ] {
        refuse("arguments", args);
    }
    assert_eq!(folder.files(), before, "nothing is written");
}

/// Mutated files: refused or computed, and never a panic.
#[test]
fn mutated_files_never_panic() {
    let mask: Vec<u8> = (0..15).map(|i| i % 2).collect();
    let plain = with([
        ("mask", Stored::bytes(Dtype::BOOL, &[3, 5], &mask)),
        ("bias", Stored::f16(&[4, 1, 5], &[0.5; 20])),
        ("sinks", Stored::f32(&[4], &[0.0; 4])),
        ("kv_lens", Stored::i64(&[3, 5])),
    ]);
    let (q, offsets) = (zeros(&[4, 4, 8]), Stored::i64(&[0, 1, 4]));
    let table = Stored { shape: vec![2, 3], ..Stored::i64(&[2, 0, -1, 1, -1, -1]) };
    let paged = file(&tensors([
        ("q", q.clone()),
        ("cu_seqlens_q", offsets.clone()),
        ("k_pool", zeros(&[3, 3, 2, 8])),
        ("v_pool", zeros(&[3, 3, 2, 6])),
        ("block_table", table),
        ("kv_lens", Stored::i64(&[5, 3])),
    ]));
    let ragged = file(&tensors([
        ("q", q),
        ("cu_seqlens_q", offsets.clone()),
        ("k", zeros(&[4, 2, 8])),
        ("v", zeros(&[4, 2, 6])),
        ("cu_seqlens_k", offsets),
    ]));
    let files = [plain, paged, ragged];
    let seed = 20_260_101;
    let mut state = seed;
    let mut below = |n: usize| (next(&mut state) % n as u64) as usize;
    let (mut computed, mut refused) = (0, 0);
    for round in 0..450 {
        let mut bytes = files[round % 3].clone();
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        for _ in 0..1 + below(3) {
            match below(8) {
                // Most of what can go wrong stands in the header; a digit for a digit keeps it JSON.
                0..=3 => {
                    let digits: Vec<usize> =
                        (8..header.min(bytes.len())).filter(|&i| bytes[i].is_ascii_digit()).collect();
                    if !digits.is_empty() {
                        let at = digits[below(digits.len())];
                        bytes[at] = b'0' + below(10) as u8;
                    }
                }
                4 => {
                    let at = below(header.min(bytes.len()));
                    bytes[at] = below(256) as u8;
                }
                5 => {
                    let at = below(bytes.len());
                    bytes[at] ^= 1 << below(8);
                }
                6 => {
                    let at = below(bytes.len());
                    bytes.truncate(at.max(1));
                }
                _ => {
                    let at = below(bytes.len());
                    bytes.insert(at, below(256) as u8);
                }
            }
        }
        let folder = Folder::new();
        let (from, to) = (folder.write("in.safetensors", &bytes), folder.text("out.safetensors"));
        let path = ["cpu", "oracle"][round / 3 % 2];
        let output = program(&["run", &from, "-o", &to, "--path", path, "--quiet"]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        let what = format!("seed {seed}, round {round}: {stderr}");
        match output.status.code() {
            Some(0) => {
                computed += 1;
                assert!(stderr.is_empty(), "{what}");
                assert_eq!(folder.files().len(), 2, "{what}");
            }
            Some(2) => {
                refused += 1;
                assert_eq!(stderr.lines().count(), 1, "{what}");
                assert_eq!(folder.files(), ["in.safetensors"], "{what}");
            }
            code => panic!("exit code {code:?}, {what}"),
        }
    }
    // Both kinds must have been met, or the mutations are too tame or too wild.
    assert!(computed > 5 && refused > 50, "{computed} computed, {refused} refused");
}
