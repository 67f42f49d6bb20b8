//! What the other commands print and write.

mod common;

use common::*;

const COLUMNS: [&str; 15] = [
    "path",
    "kernel",
    "adapter",
    "dtype",
    "shape",
    "options",
    "ms_median",
    "ms_min",
    "ms_first",
    "gpu_ms",
    "gflops",
    "max_error",
    "scratch_bytes",
    "kv_gb_s",
    "of_copy",
];

fn data(name: &str) -> String {
    format!("{}/tests/data/{name}", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn bench_writes_what_it_promises() {
    let folder = Folder::new();
    let paths = paths();
    let list = paths.join(",");
    let (json, csv, plot) = (folder.text("b.json"), folder.text("b.csv"), folder.text("b.svg"));
    let stdout = succeed(&[
        "bench",
        "--shapes",
        "1x2x33x16,1x4/2x5/40x8/4",
        "--path",
        &list,
        "--repeat",
        "2",
        "--dtype",
        "f32,f16",
        "--causal",
        "bottom-right",
        "--window",
        "-,0",
        "--with",
        "mask,sinks",
        "--json",
        &json,
        "--csv",
        &csv,
        "--plot",
        &plot,
    ]);
    let rows: Vec<serde_json::Map<String, serde_json::Value>> =
        serde_json::from_slice(&std::fs::read(folder.path("b.json")).unwrap()).unwrap();
    assert_eq!(rows.len(), 4 * paths.len(), "two shapes, two types, every path");
    for row in &rows {
        let mut keys: Vec<&str> = row.keys().map(String::as_str).collect();
        let mut want = COLUMNS;
        keys.sort_unstable();
        want.sort_unstable();
        assert_eq!(keys, want);
        for text in ["path", "kernel", "adapter", "dtype", "shape", "options"] {
            assert!(row[text].as_str().is_some_and(|text| !text.is_empty()), "{text}: {row:?}");
        }
        for number in ["ms_median", "ms_min", "ms_first", "gflops", "kv_gb_s"] {
            assert!(row[number].as_f64().is_some_and(|x| x > 0.0), "{number}: {row:?}");
        }
        assert!(row["max_error"].as_f64().is_some_and(|x| x < 0.01), "{row:?}");
        assert!(row["gpu_ms"].is_null() || row["gpu_ms"].as_f64().is_some_and(|x| x > 0.0), "{row:?}");
        assert!(row["scratch_bytes"].as_u64().is_some(), "{row:?}");
        assert!(row["ms_min"].as_f64() <= row["ms_median"].as_f64());
        assert!(stdout.contains(row["shape"].as_str().unwrap()), "{stdout}");
        assert_eq!(row["options"], "causal=bottom-right window=-,0 mask sinks");
    }
    let text = std::fs::read_to_string(folder.path("b.csv")).unwrap();
    let mut lines = text.lines();
    assert_eq!(lines.next().unwrap().split(',').collect::<Vec<_>>(), COLUMNS);
    assert_eq!(lines.count(), rows.len());
    assert!(
        text.contains("\"causal=bottom-right window=-,0 mask sinks\""),
        "a comma inside is quoted: {text}"
    );
    let picture = std::fs::read_to_string(folder.path("b.svg")).unwrap();
    assert!(picture.starts_with("<svg ") && picture.contains("GFLOP/s") && picture.ends_with("</svg>\n"));
}

#[test]
fn bench_without_an_adapter_says_how_to_get_one() {
    let stdout = succeed(&["bench", "--shapes", "1x1x8x8", "--repeat", "1"]);
    if !paths().contains(&"staged") {
        assert!(
            stdout.starts_with("no adapter") && stdout.contains("scripts/adapters setup lavapipe"),
            "{stdout}"
        );
        assert!(stdout.lines().next().unwrap().contains("mesa-vulkan-drivers"), "one line: {stdout}");
        refuse("asked for", &["bench", "--shapes", "1x1x8x8", "--path", "staged"]);
    }
    assert!(stdout.contains("1x1x8x8") && stdout.contains("cpu"), "{stdout}");
}

/// Bytes of k and v, from their rate and the time on the device's clock or on ours.
fn bytes_read(row: &serde_json::Value) -> f64 {
    let ms = row["gpu_ms"].as_f64().or(row["ms_median"].as_f64()).unwrap();
    row["kv_gb_s"].as_f64().unwrap() * ms * 1e6
}

#[test]
fn decoding_is_measured_in_bytes() {
    let folder = Folder::new();
    let json = folder.text("b.json");
    let more = ["--decode", "--shapes", "1x4/2x1/64x16", "--repeat", "2", "--json", &json];
    let stdout = succeed(&[&["bench"], &more[..]].concat());
    assert!(stdout.contains("K, V GB/s") && stdout.contains("of a copy"), "{stdout}");
    let rows: Vec<serde_json::Value> = serde_json::from_str(&std::fs::read_to_string(json).unwrap()).unwrap();
    for row in &rows {
        // 2 heads x 64 keys x (16 + 16) numbers of four bytes.
        let bytes = bytes_read(row);
        assert!((bytes - 16384.0).abs() < 1.0, "{row:?}");
        assert_eq!(row["of_copy"].is_null(), row["path"] == "cpu", "{row:?}");
    }
    assert_eq!(rows.len(), if paths().contains(&"fused") { 2 } else { 1 });
}

/// What counts are the keys that queries see, in the type that they are stored in.
#[test]
fn decoding_against_a_cache_counts_what_is_read() {
    let folder = Folder::new();
    let json = folder.text("b.json");
    let bench = |more: &[&str]| {
        let args = ["bench", "--decode", "--shapes", "2x4/2x1/70x16", "--repeat", "1", "--json", &json];
        succeed(&[&args, more].concat());
        let rows: Vec<serde_json::Value> =
            serde_json::from_str(&std::fs::read_to_string(&json).unwrap()).unwrap();
        rows
    };
    // 2 entries x 2 heads x 2 for k and v x keys x bytes of a row of 16.
    for (flags, options, bytes) in [
        (&["--cache", "paged:16"][..], "cache=paged:16 kv=f32", 8 * 70 * 64),
        (&["--cache", "paged:16", "--kv-dtype", "f16"], "cache=paged:16 kv=f16", 8 * 70 * 32),
        (&["--cache", "paged:7", "--kv-dtype", "int8"], "cache=paged:7 kv=int8", 8 * 70 * 20),
        (&["--kv-dtype", "int4", "--dtype", "f16"], "kv=int4", 8 * 70 * 12),
        (
            &["--cache", "ring:33", "--window", "31,0", "--kv-dtype", "bf16"],
            "window=31,0 cache=ring:33 kv=bf16",
            8 * 32 * 32,
        ),
    ] {
        for row in bench(flags) {
            assert_eq!(row["options"], options, "{row:?}");
            let got = bytes_read(&row);
            assert!((got - f64::from(bytes)).abs() < 1.0, "{got} bytes, not {bytes}: {row:?}");
        }
    }
    // With lengths fewer are read than there are places.
    for row in bench(&["--cache", "paged:16", "--with", "kv-lens"]) {
        let got = bytes_read(&row);
        assert!((8.0 * 35.0 * 64.0 - 1.0..8.0 * 70.0 * 64.0 - 1.0).contains(&got), "{row:?}");
    }
}

#[test]
fn verify_passes_and_repeats() {
    let all = paths().contains(&"staged");
    let args = |more: &[&'static str]| {
        let mut args = vec!["verify", "--quiet", "--seed", "7"];
        args.extend(if all { &[][..] } else { &["--path", "cpu"] });
        args.extend(more);
        succeed(&args)
    };
    let first = args(&["--cases", "12"]);
    assert!(first.contains("cpu") && first.contains("bf16") && first.contains("seed 7"), "{first}");
    assert_eq!(all, first.contains("softmax_row"), "{first}");
    assert_eq!(first, args(&["--cases", "12"]), "the same seed, the same results");
    args(&["--only", "5"]);
    assert!(
        args(&["--cases", "4"]).lines().any(|line| line.contains(" results; ") && !line.starts_with("0 "))
    );
    // Where nothing is compared, nothing is verified.
    let line = refuse("nothing", &["verify", "--quiet", "--path", "cpu", "--seconds", "0"]);
    assert!(line.contains("nothing was compared"), "{line}");
    if !all {
        let line = refuse("no adapter", &["verify"]);
        assert!(line.contains("--path cpu"), "{line}");
    }
}

#[test]
fn explain_needs_no_adapter() {
    let plain =
        succeed(&["explain", "1x32/8x100/300x64", "--minimal", "--dtype", "f16", "--causal", "top-left"]);
    assert!(plain.contains("path fused") && !plain.contains("@compute"), "{plain}");
    let shaders = succeed(&["explain", "1x8x64x64", "--minimal", "--path", "staged", "--wgsl"]);
    assert!(shaders.matches("@compute").count() >= 3, "{shaders}");
    let cached = ["explain", "2x8/2x1/100x64", "--minimal", "--cache", "paged:16", "--kv-dtype", "int8"];
    let cached = succeed(&cached);
    assert!(cached.contains("14 pages of 16 rows, int8"), "{cached}");
    let ring = ["explain", "1x8/2x1/100x64", "--minimal", "--cache", "ring:32"];
    let line = refuse("a ring that is too small", &ring);
    assert!(line.contains("a ring of 32 rows, where queries see 100 keys"), "{line}");
    let ring = succeed(&[&ring[..], &["--window", "31,0"]].concat());
    assert!(ring.contains("a ring of 32 rows, f32"), "{ring}");
    succeed(&["explain", "1x8x64x64"]);
}

/// A table is made, others are read beside it, and each command that takes one says so.
#[test]
fn tune_makes_a_table_that_plans_follow() {
    let folder = Folder::new();
    let table = folder.text("t.tsv");
    let args = ["tune", "--quiet", "--shapes", "1x1x40x16", "--dtype", "f32", "--seconds", "4", "-o", &table];
    if !paths().contains(&"fused") {
        refuse("no adapter", &args);
        assert!(folder.files().is_empty());
        return;
    }
    let foreign = "a card\tits driver\tvulkan\tf32\t16\t16\t6\t6\tfused:tile:lanes=4\n";
    folder.write("t.tsv", foreign);
    let stdout = succeed(&args);
    assert!(stdout.contains("1x1x40x16 f32") && stdout.contains("the planner's own choice"), "{stdout}");
    assert!(stdout.contains("candidates timed") && stdout.contains("1.00 x"), "{stdout}");
    let made = std::fs::read_to_string(&table).unwrap();
    assert!(made.starts_with("# ") && made.contains(foreign.trim_end()), "{made}");

    // An entry for this adapter, whatever was fastest.
    let (adapter, driver, backend) = {
        let attention = pollster::block_on(wgpu_attention::Attention::request(&Default::default())).unwrap();
        let caps = attention.caps();
        (caps.adapter.clone(), caps.driver.clone(), caps.backend.to_string())
    };
    let entry = |tile: &str| format!("{adapter}\t{driver}\t{backend}\tf32\t16\t16\t6\t6\t{tile}\n");
    folder.write("t.tsv", entry("fused:tile:lanes=4:rows=2"));
    let plan = succeed(&["explain", "1x1x40x16", "--tuning", &table]);
    assert!(plan.contains("tuning table: taken") && plan.contains("fused_tile"), "{plan}");
    let bench = ["bench", "--shapes", "1x1x40x16", "--repeat", "1", "--path", "fused", "--tuning", &table];
    assert!(succeed(&bench).contains("fused_tile"));
    folder.write("t.tsv", entry("fused:tile:lanes=32:slice=128"));
    let plan = succeed(&["explain", "1x1x40x16", "--tuning", &table]);
    assert!(plan.contains("from the tuning table do not fit") && plan.contains("bytes"), "{plan}");

    for (damage, word) in
        [("fused:till", "line 1"), ("fused:row\tmore", "9 fields"), ("fused:row:rows=x", "rows")]
    {
        folder.write("t.tsv", entry(damage));
        let line = refuse(damage, &bench);
        assert!(line.contains("t.tsv") && line.contains(word), "{line}");
        assert_eq!(refuse(damage, &args), line, "a damaged table is not written over");
    }
    let line = refuse("no table", &["explain", "1x1x40x16", "--tuning", &folder.text("none.tsv")]);
    assert!(line.contains("none.tsv"), "{line}");
}

/// Sizes after a kernel's name are forced, and those that make no kernel are refused.
#[test]
fn kernels_take_sizes() {
    let explain = |tile: &str| succeed(&["explain", "1x8x512x64", "--minimal", "--family", tile]);
    assert!(explain("fused:tile:lanes=4:rows=2:threads=64").contains("32 queries x 16 keys"));
    assert!(explain("fused:row:rows=1:keys=4").contains("8 queries x 4 keys"));
    for (tile, word) in [
        ("fused:tile:lanes=5", "lanes = 5"),
        ("fused:tile:lanes=16:slice=64", "workgroup memory"),
        ("fused:row:lanes=4", "no size lanes"),
        ("fused:row:rows", "no kernel family"),
        ("fused:row:rows=", "no number"),
    ] {
        let line = refuse(tile, &["explain", "1x8x512x64", "--minimal", "--family", tile]);
        assert!(line.contains(word), "{line}");
    }
}

#[test]
fn heatmaps_are_the_same_every_time() {
    let folder = Folder::new();
    let tokens = data("minilm-tokens.txt");
    let draw = |name: &str, more: &[&str]| {
        let to = folder.text(name);
        let mut args = vec!["heatmap", "--quiet", "-o", &to];
        args.extend(more);
        succeed(&args);
        std::fs::read_to_string(folder.path(name)).unwrap()
    };
    let model = data("minilm-layer0.safetensors");
    let first = draw("1.svg", &[&model, "--tokens", &tokens]);
    assert_eq!(first, draw("2.svg", &[&model, "--tokens", &tokens]));
    assert_eq!(first.matches(">head ").count(), 12);
    // The left edge of three rows and the lower edge of four columns.
    assert_eq!(first.matches(">graphics<").count(), 3 + 4);

    // One label a line, with markup in it, for fewer queries than keys.
    let few = folder.write("few.safetensors", file(&qkv([1, 2, 2, 4], [1, 1, 3, 4], [1, 1, 3, 4])));
    let lines = folder.write("lines.txt", "a <b>\n\"c\" & d\n\u{1}e f\n");
    let picture = draw("3.svg", &[&few, "--tokens", &lines, "--causal", "bottom-right", "--title", "<&>"]);
    for words in [">a &lt;b&gt;<", "&quot;c&quot; &amp; d", "\u{fffd}e f", ">&lt;&amp;&gt;<", "weight 0"] {
        assert!(picture.contains(words), "{words}: {picture}");
    }
    assert!(!picture.contains("<b>"));

    // Long sequences are gathered; the file stays small.
    let long = folder.write("long.safetensors", file(&qkv([1, 3, 700, 4], [1, 3, 1000, 4], [1, 3, 1000, 4])));
    let picture = draw("4.svg", &[&long, "--path", "cpu"]);
    assert!(picture.contains("the largest of") && picture.len() < 2_000_000, "{} bytes", picture.len());
    let row = folder.write("row.safetensors", file(&qkv([1, 1, 1, 4], [1, 1, 300, 4], [1, 1, 300, 4])));
    assert!(draw("5.svg", &[&row]).contains(">head 0<"));
}

/// Width, height and the pixels of a PNG without transparency.
fn pixels(path: &std::path::Path) -> (usize, usize, Vec<[u8; 3]>) {
    let file = std::io::BufReader::new(std::fs::File::open(path).unwrap());
    let mut reader = png::Decoder::new(file).read_info().unwrap();
    let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut bytes).unwrap();
    assert_eq!((info.color_type, info.bit_depth), (png::ColorType::Rgba, png::BitDepth::Eight));
    assert!(bytes.chunks_exact(4).all(|pixel| pixel[3] == 255));
    let pixels = bytes.chunks_exact(4).map(|pixel| [pixel[0], pixel[1], pixel[2]]).collect();
    (info.width as usize, info.height as usize, pixels)
}

/// A PNG is what the SVG shows, its letters too, and the same every time.
#[test]
fn a_png_is_the_svg_in_pixels() {
    let folder = Folder::new();
    let (model, tokens) = (data("minilm-layer0.safetensors"), data("minilm-tokens.txt"));
    let draw = |name: &str, title: &str| {
        let to = folder.text(name);
        succeed(&["heatmap", "--quiet", &model, "--tokens", &tokens, "--title", title, "-o", &to]);
        std::fs::read(to).unwrap()
    };
    let svg = String::from_utf8(draw("1.svg", "Weights")).unwrap();
    assert_eq!(draw("1.png", "Weights"), draw("2.PNG", "Weights"));
    let (width, height, picture) = pixels(&folder.path("1.png"));
    let side = |name: &str| {
        let after = svg.split_once(&format!(" {name}=\"")).unwrap().1;
        (after.split_once('"').unwrap().0.parse::<f64>().unwrap() * 2.0).ceil() as usize
    };
    assert_eq!((width, height), (side("width"), side("height")));

    // Each run of cells has its colour where the SVG places it.
    let numbers = |text: &str| -> Vec<f64> {
        text.split(|c: char| !c.is_ascii_digit() && c != '.').filter_map(|n| n.parse().ok()).collect()
    };
    let mut runs = 0;
    for panel in svg.split("<g transform=").skip(1) {
        let place = numbers(panel.split_once(" shape-rendering").unwrap().0);
        for path in panel.split("<path fill=\"#").skip(1) {
            let colour = u32::from_str_radix(&path[..6], 16).unwrap().to_be_bytes();
            for run in path.split('M').skip(1) {
                let at = numbers(run.split_once('h').unwrap().0);
                let [x, y] = [0, 1].map(|i| ((place[i] + (at[i] + 0.5) * place[2 + i]) * 2.0) as usize);
                assert_eq!(picture[y * width + x], colour[1..], "{run} at {x} {y}");
                runs += 1;
            }
        }
    }
    assert!(runs > 1000, "{runs} runs");

    // In units of the SVG. Nothing but text is dark at the left and above the panels.
    let dark = |picture: &[[u8; 3]], [left, top, right, bottom]: [usize; 4]| {
        let rows = picture.chunks_exact(width).skip(2 * top).take(2 * (bottom - top));
        let all = rows.flat_map(|row| &row[2 * left..2 * right]);
        all.filter(|pixel| pixel.iter().all(|&level| level < 100)).count()
    };
    let (title, labels) = ([20, 22, 300, 44], [20, 100, 70, 300]);
    assert!(dark(&picture, title) > 500 && dark(&picture, labels) > 500);
    draw("3.png", " ");
    let (.., untitled) = pixels(&folder.path("3.png"));
    assert_eq!((untitled.len(), dark(&untitled, title)), (picture.len(), 0));
    assert_eq!(dark(&untitled, labels), dark(&picture, labels));
    draw("4.png", "Weighed");
    let (.., other) = pixels(&folder.path("4.png"));
    assert_ne!(dark(&other, title), dark(&picture, title), "other letters");

    // Scripts that the program has no letters for, with and without fonts on the machine.
    draw("5.png", "\u{6ce8}\u{610f}\u{529b} \u{1f600} \u{639}\u{631}\u{628}\u{64a}");
    assert_eq!(pixels(&folder.path("5.png")).2.len(), picture.len());
}

/// A name says what is written, or nothing is.
#[test]
fn heatmaps_end_in_what_they_are() {
    let (folder, out) = (Folder::new(), Folder::new());
    let from = folder.write("in.safetensors", file(&qkv([1, 1, 2, 4], [1, 1, 3, 4], [1, 1, 3, 4])));
    for name in ["out", "out.gif", "out.jpg", "out.svgz", "out.png.txt", "out.", ".png", "png"] {
        let line = refuse(name, &["heatmap", &from, "-o", &out.text(name)]);
        assert!(line.contains(".svg, .png or .html"), "{line}");
        // Before the input is looked at.
        assert_eq!(refuse(name, &["heatmap", "nowhere", "-o", &out.text(name)]), line);
    }
    let wide = "m".repeat(1000);
    let line = refuse("a wide picture", &["heatmap", &from, "--title", &wide, "-o", &out.text("out.png")]);
    assert!(line.contains("16384 a side at most") && line.contains("OUT.svg"), "{line}");
    assert!(out.files().is_empty(), "nothing is written");

    for (name, start) in [
        ("1.svg", &b"<svg "[..]),
        ("2.SVG", b"<svg "),
        ("3.png", b"\x89PNG\r\n"),
        ("4.Png", b"\x89PNG\r\n"),
        ("5.html", b"<!doctype html>"),
        ("6.HTM", b"<!doctype html>"),
    ] {
        succeed(&["heatmap", "--quiet", &from, "-o", &out.text(name)]);
        assert!(std::fs::read(out.path(name)).unwrap().starts_with(start), "{name}");
    }
    succeed(&["heatmap", "--quiet", &from, "--title", &wide, "-o", &out.text("1.svg")]);
}

#[test]
fn help_and_version_are_answers() {
    for args in [&["--help"][..], &["--version"], &["run", "--help"], &["bench", "-h"], &["help", "verify"]] {
        let output = program(args);
        assert!(output.status.success() && !output.stdout.is_empty() && output.stderr.is_empty(), "{args:?}");
    }
}
