//! `run` gives what the contract says, on every path, in every layout and type.

mod common;

use common::*;
use safetensors::Dtype;

/// Runs a file through a path and reads the results.
fn run(path: &str, input: &Tensors, flags: &[&str]) -> Tensors {
    let folder = Folder::new();
    let (from, to) = (folder.write("in.safetensors", file(input)), folder.text("out.safetensors"));
    let mut args = vec!["run", &from, "-o", &to, "--path", path, "--quiet"];
    args.extend(flags);
    let output = program(&args);
    assert!(output.status.success(), "{args:?}: {output:?}");
    assert!(output.stderr.is_empty() || ["staged", "fused", "decode"].contains(&path), "quiet: {output:?}");
    assert_eq!(folder.files(), ["in.safetensors", "out.safetensors"], "nothing else is left behind");
    read(&folder.path("out.safetensors"))
}

fn assert_near(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    let error = distance(got, want);
    assert!(error <= tolerance, "{what}: off by {error:e}: {got:?}, want {want:?}");
}

/// Two keys, one query, by hand: scores 0 and ln 3 after the scale of 1/sqrt(1).
#[test]
fn two_keys_by_hand() {
    let one = |values: &[f32]| Stored::f32(&[values.len(), 1], values);
    let input = tensors([("q", one(&[1.0])), ("k", one(&[0.0, 3f32.ln()])), ("v", one(&[4.0, 8.0]))]);
    for path in paths() {
        let got = run(path, &input, weights_flag(path));
        assert_eq!(got["o"].shape, [1, 1], "rank 2 in, rank 2 out");
        assert_near(path, &got["o"].values(), &[7.0], 1e-5);
        assert_eq!(got["lse"].shape, [1, 1, 1]);
        assert_near(path, &got["lse"].values(), &[4f64.ln()], 1e-5);
        assert_eq!(got.contains_key("weights"), !weights_flag(path).is_empty());
        if let Some(weights) = got.get("weights") {
            assert_eq!(weights.shape, [1, 1, 1, 2]);
            assert_near(path, &weights.values(), &[0.25, 0.75], 1e-5);
        }
        let without = run(path, &input, &[]);
        assert_eq!((without.len(), without.contains_key("weights")), (2, false));
    }
}

#[test]
fn every_option_gives_what_the_oracle_gives() {
    let (b, hq, hkv, sq, sk, d) = (2, 4, 2, 5, 7, 8);
    let plain = qkv([b, hq, sq, d], [b, hkv, sk, d], [b, hkv, sk, 3]);
    let with = |extra: &[(&str, Stored)]| {
        let mut all = plain.clone();
        all.extend(extra.iter().map(|(name, tensor)| (name.to_string(), tensor.clone())));
        all
    };
    let mask: Vec<u8> = (0..sq * sk).map(|i| u8::from(i % 3 != 0)).collect();
    let e = 6;
    let additive = |heads: &[usize], [e, d_q, d_k]: [usize; 3]| {
        let matrix = |seed, shape: &[usize]| {
            let shape = [heads, shape].concat();
            Stored::f32(&shape, &noise(seed, shape.iter().product()))
        };
        let v = matrix(6, &[e]);
        with(&[("score_v", v), ("w_q", matrix(7, &[e, d_q])), ("w_k", matrix(8, &[e, d_k]))])
    };
    let cases: Vec<(&str, Tensors, Vec<&str>)> = vec![
        ("plain", plain.clone(), vec![]),
        ("dot", plain.clone(), vec!["--similarity", "dot"]),
        ("scale", plain.clone(), vec!["--scale", "-0.25"]),
        ("cap", plain.clone(), vec!["--softcap", "0.5", "--scale", "2"]),
        ("causal, top left", plain.clone(), vec!["--causal", "top-left"]),
        ("causal, bottom right", plain.clone(), vec!["--causal", "bottom-right"]),
        ("window", plain.clone(), vec!["--window", "2,-"]),
        ("window by the top", plain.clone(), vec!["--window", "-,1", "--align", "top-left"]),
        ("bias [sq,sk]", with(&[("bias", Stored::f32(&[sq, sk], &noise(4, sq * sk)))]), vec![]),
        ("bias [hq,1,sk]", with(&[("bias", Stored::bf16(&[hq, 1, sk], &noise(4, hq * sk)))]), vec![]),
        ("bias [b,1,sq,1]", with(&[("bias", Stored::f16(&[b, 1, sq, 1], &noise(4, b * sq)))]), vec![]),
        ("mask", with(&[("mask", Stored::bytes(Dtype::BOOL, &[sq, sk], &mask))]), vec![]),
        (
            "mask of bytes",
            with(&[("mask", Stored::bytes(Dtype::U8, &[b, 1, 1, sk], &mask[..b * sk]))]),
            vec![],
        ),
        ("alibi", with(&[("alibi_slopes", Stored::f32(&[hq], &[0.5, 0.25, 0.1, 0.0]))]), vec![]),
        ("sinks", with(&[("sinks", Stored::f16(&[hq], &[0.5, -1.0, 3.0, 0.0]))]), vec![]),
        ("lengths", with(&[("kv_lens", Stored::i64(&[3, 7]))]), vec!["--causal", "bottom-right"]),
        ("no key at all", with(&[("kv_lens", Stored::i32(&[0, 7]))]), vec![]),
        ("one W", with(&[("w", Stored::f32(&[d, d], &noise(5, d * d)))]), vec!["--similarity", "bilinear"]),
        (
            "a W for each head",
            with(&[("w", Stored::bf16(&[hq, d, d], &noise(5, hq * d * d)))]),
            vec!["--similarity", "bilinear"],
        ),
        ("one v, Wq and Wk", additive(&[], [e, d, d]), vec!["--similarity", "additive"]),
        (
            "additive for each head",
            additive(&[hq], [e, d, d]),
            vec!["--similarity", "additive", "--scale", "2"],
        ),
        ("others are left alone", with(&[("hidden", Stored::i64(&[1]))]), vec![]),
    ];
    let paths = paths();
    let mut seen: Vec<Tensors> = Vec::new();
    for (name, input, flags) in cases {
        let flags = |path| [&flags, weights_flag(path)].concat();
        let want = run("oracle", &input, &flags("oracle"));
        assert!(name.starts_with("others") || !seen.contains(&want), "{name} changes something");
        for path in paths.iter().filter(|path| **path != "oracle") {
            // No product of matrices gives additive scores.
            if flags(path).contains(&"additive") && ["fused", "decode"].contains(path) {
                let folder = Folder::new();
                let (from, to) =
                    (folder.write("in.safetensors", file(&input)), folder.text("out.safetensors"));
                let output = program(&["run", &from, "-o", &to, "--path", path, "--similarity", "additive"]);
                assert_eq!(output.status.code(), Some(2), "{name} {path}: {output:?}");
                assert!(String::from_utf8_lossy(&output.stderr).contains("additive"), "{output:?}");
                continue;
            }
            let got = run(path, &input, &flags(path));
            assert_eq!(got.len(), want.len() - usize::from(weights_flag(path).is_empty()), "{name} {path}");
            for output in got.keys().map(String::as_str) {
                assert_eq!(got[output].shape, want[output].shape, "{name} {path} {output}");
                assert_eq!(got[output].dtype, Dtype::F32);
                assert_near(
                    &format!("{name} {path} {output}"),
                    &got[output].values(),
                    &want[output].values(),
                    2e-5,
                );
            }
        }
        seen.push(want);
    }
}

#[test]
fn o_has_the_layout_rank_and_type_of_q() {
    // [B,S,H,D] is [B,H,S,D] with two dimensions exchanged.
    let (h, s, d) = (3, 4, 2);
    let swap = |x: &[f64], [a, b]: [usize; 2]| -> Vec<f64> {
        (0..b * a * d).map(|i| x[(i / d % a * b + i / d / a) * d + i % d]).collect()
    };
    let narrow = |x: Vec<f64>| x.into_iter().map(|x| x as f32).collect::<Vec<_>>();
    let bhsd = qkv([1, h, s, d], [1, h, s, d], [1, h, s, d]);
    let mut bshd = Tensors::new();
    let mut rank3 = Tensors::new();
    for (name, tensor) in &bhsd {
        let swapped = narrow(swap(&tensor.values(), [h, s]));
        bshd.insert(name.clone(), Stored::f32(&[1, s, h, d], &swapped));
        rank3.insert(name.clone(), Stored::f32(&[s, h, d], &swapped));
    }
    for path in paths() {
        let want = run(path, &bhsd, &[]);
        assert_eq!(want["o"].shape, [1, h, s, d]);
        for (input, shape) in [(&bshd, &[1, s, h, d][..]), (&rank3, &[s, h, d])] {
            let got = run(path, input, &["--layout", "bshd"]);
            assert_eq!(got["o"].shape, shape);
            assert_near(path, &swap(&got["o"].values(), [s, h]), &want["o"].values(), 1e-6);
            assert_eq!(got["lse"].shape, [1, h, s], "lse has one order");
            assert_near(path, &got["lse"].values(), &want["lse"].values(), 1e-6);
        }
    }
    for (make, dtype, tolerance) in
        [(Stored::f16 as fn(&[usize], &[f32]) -> Stored, Dtype::F16, 2e-3), (Stored::bf16, Dtype::BF16, 2e-2)]
    {
        let narrow: Tensors = bhsd
            .iter()
            .map(|(name, tensor)| {
                let values: Vec<f32> = tensor.values().into_iter().map(|x| x as f32).collect();
                (name.clone(), make(&tensor.shape, &values))
            })
            .collect();
        for path in paths() {
            let (same, wide) = (run(path, &narrow, &[]), run(path, &narrow, &["--out-dtype", "f32"]));
            assert_eq!((same["o"].dtype, wide["o"].dtype), (dtype, Dtype::F32));
            assert_eq!(same["lse"].dtype, Dtype::F32);
            assert_near(path, &same["o"].values(), &wide["o"].values(), tolerance);
        }
    }
}

#[test]
fn empty_dimensions_are_legal() {
    for path in paths() {
        let no_keys = run(path, &qkv([1, 2, 3, 4], [1, 2, 0, 4], [1, 2, 0, 5]), weights_flag(path));
        assert_eq!(
            (no_keys["o"].shape.as_slice(), no_keys["o"].values()),
            (&[1, 2, 3, 5][..], vec![0.0; 30])
        );
        assert_eq!(no_keys["lse"].values(), [f64::NEG_INFINITY; 6]);
        assert!(no_keys.get("weights").is_none_or(|weights| weights.shape == [1, 2, 3, 0]));
        let no_queries = run(path, &qkv([1, 2, 0, 4], [1, 2, 3, 4], [1, 2, 3, 5]), weights_flag(path));
        assert_eq!(
            (no_queries["o"].shape.as_slice(), no_queries["lse"].shape.as_slice()),
            (&[1, 2, 0, 5][..], &[1, 2, 0][..])
        );
        let no_batch = run(path, &qkv([0, 2, 9, 4], [0, 1, 3, 4], [0, 1, 3, 5]), &[]);
        assert_eq!(no_batch["o"].shape, [0, 2, 9, 5]);
    }
    // Nothing of a size that only a zero makes possible is ever looped over or allocated.
    let vast = |shape: [usize; 4]| Stored::f32(&shape, &[]);
    let big = 1 << 28;
    let input = tensors([
        ("q", vast([big, big, 0, 4])),
        ("k", vast([big, big, 0, 4])),
        ("v", vast([big, big, 0, 4])),
    ]);
    assert_eq!(run("cpu", &input, &[])["lse"].shape, [big, big, 0]);
}

#[test]
fn nan_and_infinity_are_data() {
    let mut input = qkv([1, 1, 2, 2], [1, 1, 2, 2], [1, 1, 2, 2]);
    input.insert("q".into(), Stored::f32(&[1, 1, 2, 2], &[f32::NAN, 1.0, 0.5, 0.5]));
    for path in paths() {
        let o = run(path, &input, &[])["o"].values();
        assert!(o[0].is_nan() && o[2].is_finite(), "{path}: {o:?}");
    }
}

#[test]
fn an_existing_output_is_replaced_and_a_pipe_is_written_to() {
    let folder = Folder::new();
    let from = folder.write("in.safetensors", file(&qkv([1, 1, 2, 2], [1, 1, 2, 2], [1, 1, 2, 2])));
    let to = folder.write("out.safetensors", "old");
    succeed(&["run", &from, "-o", &to, "--path", "cpu"]);
    assert!(read(&folder.path("out.safetensors")).contains_key("o"));
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        succeed(&["run", &from, "-o", "/dev/null", "--path", "cpu"]);
        assert!(std::fs::metadata("/dev/null").unwrap().file_type().is_char_device());
    }
    // Input and output may be one file.
    succeed(&["run", &from, "-o", &from, "--path", "cpu"]);
    assert!(read(&folder.path("in.safetensors")).contains_key("o"));
}

#[test]
fn a_kernel_can_be_forced() {
    let folder = Folder::new();
    let (small, wide) = ([1, 2, 9, 8], [1, 1, 2, 600]);
    let from = folder.write("in.safetensors", file(&qkv(small, small, small)));
    let too_wide = folder.write("wide.safetensors", file(&qkv(wide, wide, wide)));
    let to = folder.text("out.safetensors");
    if paths().contains(&"fused") {
        for (path, kernel) in
            [("fused", "row"), ("fused", "tile"), ("decode", "tile"), ("auto", "row"), ("staged", "direct")]
        {
            let output = program(&["run", &from, "-o", &to, "--path", path, "--kernel", kernel]);
            let stderr = String::from_utf8(output.stderr).unwrap();
            let used = if path == "staged" { "scores_direct".into() } else { format!("fused_{kernel}") };
            assert!(output.status.success() && stderr.contains(&used), "{stderr}");
            assert_eq!(stderr.contains("merge"), path == "decode", "{stderr}");
        }
        // As tables show it.
        let output = program(&["run", &from, "-o", &to, "--kernel", "fused:row:rows=1"]);
        assert!(output.status.success() && String::from_utf8_lossy(&output.stderr).contains("fused_row"));
        let args = ["run", &too_wide, "-o", &to, "--path", "fused", "--kernel", "row"];
        refuse("fused_row unrolls head_dim + head_dim_v = 1200", &args);
    }
    refuse("no kernel 'direct' on the fused path", &["run", &from, "-o", &to, "--kernel", "direct"]);
    refuse("--kernel row", &["run", &from, "-o", &to, "--path", "cpu", "--kernel", "row"]);
}

#[test]
fn auto_says_what_it_used() {
    let folder = Folder::new();
    let from = folder.write("in.safetensors", file(&qkv([1, 1, 2, 2], [1, 1, 2, 2], [1, 1, 2, 2])));
    let output = program(&["run", &from, "-o", &folder.text("out.safetensors")]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    let used = if paths().contains(&"staged") { "fused" } else { "the CPU" };
    assert!(output.status.success() && stderr.contains(used), "{stderr}");
}
