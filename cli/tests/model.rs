//! Models of the BERT family: their forward pass, and pictures of what they attend to.

mod common;

#[path = "../src/bert/mod.rs"]
#[allow(dead_code, reason = "the program uses the rest")]
mod bert;

use bert::{Bert, Checkpoint};
use common::bert::{HIDDEN, LAYERS, TinyBert};
use common::*;
use wgpu_attention::{Attention, DeviceRequest};

/// Three texts of a ragged batch, one of them as long as the model takes.
const TEXTS: [&str; 3] = ["The cats sat on a mat", "cat", "a cat on the mat sat on the cats"];

fn has_adapter() -> bool {
    paths().contains(&"staged")
}

#[test]
fn hidden_states_are_those_of_f64() {
    let (folder, model) = (Folder::new(), TinyBert::new());
    let folder = std::path::PathBuf::from(model.write(&folder));
    // Without an adapter nothing is left to hold.
    if !has_adapter() {
        return;
    }
    let checkpoint = Checkpoint::read(&folder).unwrap();
    let tokens: Vec<_> = TEXTS.iter().map(|text| checkpoint.tokens(text).unwrap()).collect();
    assert_eq!(tokens[0].words, ["[CLS]", "the", "cat", "##s", "sat", "on", "a", "mat", "[SEP]"]);
    assert_eq!(tokens[2].ids.len(), 12, "neither cut nor filled up");
    let attention = pollster::block_on(Attention::request(&DeviceRequest::default())).unwrap();
    let got = Bert::new(checkpoint, attention).unwrap().hidden(&tokens, LAYERS).unwrap();
    assert_eq!(got.len(), LAYERS + 1);
    for (text, range) in tokens.iter().zip(bert::ranges(&tokens)) {
        let (want, _) = model.forward(&text.ids);
        for (layer, (got, want)) in got.iter().zip(&want).enumerate() {
            let got: Vec<f64> =
                got[range.start * HIDDEN..range.end * HIDDEN].iter().map(|&x| x.into()).collect();
            let error = distance(&got, want);
            assert!(error <= 1e-5, "{:?}, before layer {layer}: off by {error:e}", text.words);
        }
    }
}

#[test]
fn an_embedding_is_the_mean_of_tokens_of_length_one() {
    assert_eq!(bert::host::mean_of_rows(&[1.0, 2.0, 5.0, 6.0], 2), [0.6, 0.8]);
    assert_eq!(bert::host::mean_of_rows(&[0.0, 0.0], 2), [0.0, 0.0]);
}

/// Whatever is wrong with a folder, it is one line that names it.
#[test]
fn bad_models_are_refused_by_name() {
    let good = TinyBert::new();
    let refused = |model: &TinyBert, text: &str| {
        let folder = Folder::new();
        let path = std::path::PathBuf::from(model.write(&folder));
        match Checkpoint::read(&path) {
            Ok(checkpoint) => checkpoint.tokens(text).err().unwrap_or_default(),
            Err(why) => why,
        }
    };
    let says = |why: &str, words: &[&str]| {
        assert!(words.iter().all(|word| why.contains(word)) && !why.contains('\n'), "{words:?}: {why}");
    };
    assert_eq!(refused(&good, "cat"), "");
    says(&refused(&good, ""), &["empty"]);
    says(&refused(&good, " \n "), &["empty"]);
    says(&refused(&good, &"cat ".repeat(11)), &["13 tokens", "12", "max_position_embeddings"]);
    let config = |key: &str, value: serde_json::Value| {
        let mut model = good.clone();
        model.config[key] = value;
        model
    };
    says(&refused(&config("model_type", "llama".into()), "cat"), &["config.json", "llama", "bert"]);
    says(&refused(&config("model_type", 1.into()), "cat"), &["config.json", "model_type"]);
    says(&refused(&config("hidden_act", "relu".into()), "cat"), &["hidden_act", "relu", "gelu"]);
    says(&refused(&config("position_embedding_type", "relative_key".into()), "cat"), &["relative_key"]);
    says(&refused(&config("num_attention_heads", 5.into()), "cat"), &["24", "num_attention_heads 5"]);
    says(&refused(&config("num_attention_heads", 0.into()), "cat"), &["num_attention_heads is 0"]);
    says(&refused(&config("hidden_size", "wide".into()), "cat"), &["config.json", "wide"]);
    says(&refused(&config("num_hidden_layers", 3.into()), "cat"), &["encoder.layer.2", "not there"]);
    says(
        &refused(&config("vocab_size", 99.into()), "cat"),
        &["word_embeddings.weight", "[12, 24]", "[99, 24]"],
    );
    says(&refused(&config("intermediate_size", (1u64 << 60).into()), "cat"), &["intermediate.dense.weight"]);

    let tensor = |name: &str, tensor: Option<Stored>| {
        let mut model = good.clone();
        match tensor {
            Some(tensor) => model.tensors.insert(name.into(), tensor),
            None => model.tensors.remove(name),
        };
        model
    };
    let key = "encoder.layer.1.attention.self.key.weight";
    says(&refused(&tensor(key, None), "cat"), &[key, "not there"]);
    let short = Stored::f32(&[HIDDEN, 2], &[0.0; 2 * HIDDEN]);
    says(&refused(&tensor(key, Some(short)), "cat"), &[key, "[24, 2]", "[24, 24]"]);
    let norm = "encoder.layer.0.output.LayerNorm.bias";
    says(&refused(&tensor(norm, Some(Stored::i64(&[0; HIDDEN]))), "cat"), &[norm, "I64"]);
    says(&refused(&tensor(norm, Some(Stored::f16(&[1], &[0.0]))), "cat"), &[norm, "[1]", "[24]"]);
    let mut larger = good.clone();
    larger.tokenizer["model"]["vocab"]["dog"] = 12.into();
    says(&refused(&larger, "a dog"), &["12", "vocab_size"]);
    larger.tokenizer["model"]["type"] = "Unheard".into();
    says(&refused(&larger, "cat"), &["tokenizer.json"]);

    let folder = Folder::new();
    let path = std::path::PathBuf::from(good.write(&folder));
    folder.write("model.safetensors", b"\x05");
    says(&Checkpoint::read(&path).err().unwrap(), &["model.safetensors", "not a safetensors file"]);
    std::fs::remove_file(path.join("tokenizer.json")).unwrap();
    says(&Checkpoint::read(&path).err().unwrap(), &["tokenizer.json"]);
    says(&Checkpoint::read(&path.join("nowhere")).err().unwrap(), &["nowhere", "not a folder"]);
}

/// Checkpoints in half the bytes, with the model's name before each tensor, and TensorFlow's names of norms.
#[test]
fn checkpoints_differ_in_names_and_types() {
    let mut model = TinyBert::new();
    model.tensors = model
        .tensors
        .iter()
        .map(|(name, tensor)| {
            let values: Vec<f32> = tensor.values().into_iter().map(|x| x as f32).collect();
            let name = name.replace("LayerNorm.weight", "LayerNorm.gamma");
            let name = name.replace("LayerNorm.bias", "LayerNorm.beta");
            (format!("bert.{name}"), Stored::bf16(&tensor.shape, &values))
        })
        .collect();
    let folder = Folder::new();
    let checkpoint = Checkpoint::read(std::path::Path::new(&model.write(&folder))).unwrap();
    assert_eq!(checkpoint.layers.len(), LAYERS);
    assert_eq!(
        f64::from(checkpoint.layers[1].up.0[7]),
        model.tensors["bert.encoder.layer.1.intermediate.dense.weight"].values()[7]
    );
    let norm = &checkpoint.layers[1].norm_output;
    for (got, name) in [(norm.gain[3], "gamma"), (norm.bias[3], "beta")] {
        let want = model.tensors[&format!("bert.encoder.layer.1.output.LayerNorm.{name}")].values()[3];
        assert_eq!(f64::from(got), want, "{name}");
    }
}

/// The model's weights on the first text, by the test's own forward pass.
fn expected(model: &TinyBert) -> (Vec<String>, Vec<Vec<f64>>) {
    let words = ["[CLS]", "the", "cat", "##s", "sat", "on", "</script><i>", "[SEP]"];
    let weights = model.forward(&[2, 4, 5, 7, 6, 8, 11, 3]).1;
    (words.map(String::from).to_vec(), weights)
}

const TEXT: &str = "The cats sat on </script><i>";

/// Runs `heatmap` on a tiny model and gives the file.
fn picture(name: &str, flags: &[&str]) -> String {
    let folder = Folder::new();
    let (model, to) = (TinyBert::new().write(&folder), folder.text(name));
    let args = [&["heatmap", "--quiet", "--model", &model, "--text", TEXT, "-o", &to], flags].concat();
    assert_eq!(succeed(&args), "");
    std::fs::read_to_string(to).unwrap()
}

fn data_of(page: &str) -> serde_json::Value {
    let after = page.split_once("<script type=\"application/json\" id=\"data\">").unwrap().1;
    serde_json::from_str(after.split_once("</script>").unwrap().0).unwrap()
}

fn from_base64(text: &str) -> Vec<u8> {
    let value = |c: u8| match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let digits: Vec<u8> = text.bytes().filter(|&c| c != b'=').map(value).collect();
    let four =
        |d: &[u8]| d.iter().fold(0u32, |word, &digit| word << 6 | u32::from(digit)) << (6 * (4 - d.len()));
    let bytes = |d: &[u8]| four(d).to_be_bytes()[1..d.len()].to_vec();
    digits.chunks(4).flat_map(bytes).collect()
}

/// A page is one file: it has all weights, loads nothing, and takes no token for markup.
#[test]
fn a_page_holds_the_weights_of_every_layer() {
    if !has_adapter() {
        return;
    }
    let page = picture("out.html", &["--title", "<T> @DATA@"]);
    for outside in ["http:", "https:", "src=", "url(", "@import", "<link", "fetch("] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert!(page.starts_with("<!doctype html>") && page.ends_with("</html>\n"));
    assert!(
        page.contains("<h1>&lt;T&gt; &#64;DATA&#64;</h1>") && page.contains("prefers-color-scheme: dark")
    );
    assert_eq!(page.matches("</script>").count(), 2, "no token ends an element");
    assert_eq!(["@TITLE@", "@SUBTITLE@", "@DATA@"].map(|name| page.contains(name)), [false; 3]);

    let (words, want) = expected(&TinyBert::new());
    let data = data_of(&page);
    assert_eq!(data["tokens"], serde_json::json!(words));
    assert_eq!(
        (&data["layers"], &data["heads"]),
        (&serde_json::json!([0, 1]), &serde_json::json!([0, 1, 2]))
    );
    for (layer, want) in want.iter().enumerate() {
        let steps = from_base64(data["weights"][layer].as_str().unwrap());
        assert_eq!(steps.len(), want.len());
        for (&step, want) in steps.iter().zip(want) {
            // Only what is excluded has a step of 0.
            let want = want.sqrt().max(1.0 / 255.0);
            assert!((f64::from(step) / 255.0 - want).abs() < 0.51 / 255.0, "{step} for {want}");
        }
    }
}

#[test]
fn layers_and_heads_are_chosen() {
    if !has_adapter() {
        return;
    }
    let all = data_of(&picture("all.html", &["--layer", "all"]));
    let one = data_of(&picture("one.HTML", &["--layer", "1", "--head", "2", "--path", "cpu"]));
    assert_eq!((&one["layers"], &one["heads"]), (&serde_json::json!([1]), &serde_json::json!([2])));
    let steps = |data: &serde_json::Value, at: usize| from_base64(data["weights"][at].as_str().unwrap());
    let near = |a: &[u8], b: &[u8]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.abs_diff(*b) <= 1);
    assert!(near(&steps(&one, 0), &steps(&all, 1)[2 * 64..]));

    let first = picture("out.svg", &[]);
    assert!(first.starts_with("<svg ") && first.contains("layer 0, 3 heads") && first.contains("##s"));
    assert!(first.contains("&lt;/script&gt;&lt;i&gt;") && first.contains(">head 2<"));
    let last = picture("out.svg", &["--layer", "1", "--head", "2"]);
    assert!(last.contains("layer 1, 1 head;") && last.contains(">head 2<") && !last.contains(">head 0<"));
    assert_ne!(first, last);
}

/// Inputs in a file make a page as well, and their heads can be chosen.
#[test]
fn a_file_makes_a_page() {
    let folder = Folder::new();
    let from = folder.write("in.safetensors", file(&qkv([1, 2, 3, 4], [1, 2, 5, 4], [1, 2, 5, 4])));
    let to = folder.text("out.html");
    succeed(&["heatmap", &from, "-o", &to, "--quiet", "--causal", "bottom-right"]);
    let data = data_of(&std::fs::read_to_string(&to).unwrap());
    assert_eq!((&data["queries"], &data["keys"]), (&3.into(), &5.into()));
    assert_eq!(data["tokens"], serde_json::json!(["0", "1", "2", "3", "4"]));
    let steps = from_base64(data["weights"][0].as_str().unwrap());
    let excluded: Vec<usize> = (0..30).filter(|&i| steps[i] == 0).map(|i| i % 15).collect();
    assert_eq!(excluded, [3, 4, 9, 3, 4, 9]);
    succeed(&["heatmap", &from, "-o", &to, "--quiet", "--head", "1"]);
    assert_eq!(data_of(&std::fs::read_to_string(&to).unwrap())["heads"], serde_json::json!([1]));
    refuse("--head 2", &["heatmap", &from, "-o", &to, "--head", "2"]);
    let long = folder.write("long.safetensors", file(&qkv([1, 1, 3, 4], [1, 1, 2, 4], [1, 1, 2, 4])));
    assert!(refuse("queries", &["heatmap", &long, "-o", &to]).contains("3 queries over 2 keys"));
}

#[test]
fn the_program_refuses_in_one_line() {
    let (folder, out) = (Folder::new(), Folder::new());
    let (model, to) = (TinyBert::new().write(&folder), out.text("out.svg"));
    let with = |flags: &[&str], words: &str| {
        let line = refuse(words, &[&["heatmap", "-o", &to], flags].concat());
        assert!(line.contains(words), "{words}: {line}");
    };
    let cat = &["--model", &model, "--text", "cat"][..];
    let and = |flags: &[&'static str]| [cat, flags].concat();
    with(&[], "IN.safetensors");
    with(&["--model", &model], "--text");
    with(&["--text", "cat", "in.safetensors"], "IN.safetensors");
    with(&and(&["in.safetensors"]), "IN.safetensors");
    with(&and(&["--layer", "2"]), "--layer 2: there are 2");
    with(&and(&["--layer", "all"]), "--layer all");
    with(&and(&["--layer", "-1"]), "-1");
    with(&and(&["--head", "3"]), "--head 3: there are 3");
    with(&and(&["--head", "x"]), "all");
    with(&and(&["--causal", "top-left"]), "--model");
    with(&and(&["--tokens", "x"]), "--tokens");
    with(&["--model", &model, "--text", " "], "empty");
    with(&["--model", &model, "--text", &"cat ".repeat(11)], "13 tokens");
    with(&["--model", &out.text("nowhere"), "--text", "cat"], "nowhere");
    std::fs::remove_file(folder.path("model.safetensors")).unwrap();
    with(cat, "model.safetensors");
    assert!(out.files().is_empty(), "nothing is left behind");
}

/// A browser without a window.
fn browser() -> Option<&'static str> {
    let names = ["chromium", "chromium-browser", "google-chrome"];
    let works = |name: &&str| std::process::Command::new(name).arg("--version").output().is_ok();
    names.into_iter().find(works)
}

/// In a browser the page shows what a token attends to, in light and in dark.
#[test]
fn a_browser_shows_the_page() {
    if !has_adapter() {
        return;
    }
    let page = picture("out.html", &[]);
    let Some(browser) = browser() else {
        // Past the capture of output, which a test that passes has.
        let line = "\nNOT TESTED: no chromium, chromium-browser or google-chrome to open the page of a heatmap with\n";
        std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes()).unwrap();
        return;
    };
    let folder = Folder::new();
    let file = folder.write("page.html", &page);
    let open = |file: &str, what: &[&str], link: &str| {
        let mut command = std::process::Command::new(browser);
        // A software adapter's libraries are not for the browser.
        for name in ["LD_LIBRARY_PATH", "VK_DRIVER_FILES", "VK_ICD_FILENAMES"] {
            command.env_remove(name);
        }
        command.args(["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"]);
        command.arg(format!("--user-data-dir={}", folder.text("profile"))).args(what);
        command.arg(format!("file://{file}#{link}")).output().unwrap()
    };
    let (words, want) = expected(&TinyBert::new());
    let n = words.len();
    // The last one points at a token, when the page has another in its address.
    let hover = "<script>document.querySelectorAll('#tokens button')[4]\
                 .dispatchEvent(new PointerEvent('pointerenter'));</script></body>";
    assert!(page.contains("</body>"));
    let hovered = folder.write("hovered.html", page.replace("</body>", hover));
    for (file, layer, head, token, link) in [(&file, 0, 0, 1, 1), (&file, 1, 2, 6, 6), (&hovered, 1, 1, 4, 2)]
    {
        let dom = open(file, &["--dump-dom"], &format!("layer={layer}&head={head}&token={link}"));
        let dom = String::from_utf8(dom.stdout).unwrap();
        let tokens = dom.split_once("<div id=\"tokens\">").expect(&dom).1.split_once("</div>").unwrap().0;
        let buttons: Vec<&str> = tokens.split("<button").skip(1).collect();
        assert_eq!(buttons.len(), n, "{tokens}");
        let row = &want[layer][(head * n + token) * n..][..n];
        for (i, (button, want)) in buttons.iter().zip(row).enumerate() {
            let shown: f64 = button.split("data-weight=\"").nth(1).unwrap()[..6].parse().unwrap();
            assert!(
                (shown - want).abs() < 0.005,
                "layer {layer}, head {head}, {token} to {i}: {shown}, {want}"
            );
            assert_eq!(button.contains("aria-current=\"true\""), i == token, "{button}");
            assert!(button.contains(&words[i].replace('<', "&lt;").replace('>', "&gt;")), "{button}");
        }
        let most = (0..n).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
        let says = dom.split_once("id=\"says\"").unwrap().1.split_once("</div>").unwrap().0;
        let words = [token, most].map(|i| words[i].replace('<', "&lt;").replace('>', "&gt;"));
        assert!(words.iter().all(|word| says.contains(word)) && says.contains("attends most to"), "{says}");
    }
    let shots = ["1", "0"].map(|scheme| {
        let to = folder.text(&format!("{scheme}.png"));
        let scheme = format!("--blink-settings=preferredColorScheme={scheme}");
        open(&file, &[&scheme, &format!("--screenshot={to}")], "layer=1");
        std::fs::read(to).expect("a screenshot")
    });
    for shot in &shots {
        assert_eq!((&shot[..8], &shot[16..20]), (&b"\x89PNG\r\n\x1a\n"[..], &1200u32.to_be_bytes()[..]));
        // A page of one colour makes a picture of a few thousand bytes.
        assert!(shot.len() > 20_000, "{} bytes", shot.len());
    }
    assert_ne!(shots[0], shots[1], "light and dark differ");
}
