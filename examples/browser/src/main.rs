//! Builds the page and serves it: `scripts/browser --help`.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Parser;
use tiny_http::{Header, Request, Response, Server};

/// Attention in a browser: a page that runs each kernel and random problems of the test suite against the oracle.
#[derive(Parser)]
#[command(name = "scripts/browser")]
struct Args {
    /// Opens the page in a Chromium without a window, on its software adapter; the exit code is 1 unless all is right.
    #[arg(long)]
    check: bool,
    /// Port on 127.0.0.1 (any that is free if 0).
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// How many random problems.
    #[arg(long, default_value_t = 20)]
    draws: u32,
    /// Seed of the first of them; a new one each time if left out.
    #[arg(long, value_parser = seed)]
    seed: Option<u64>,
}

/// How long a browser may be silent: its software adapter compiles for seconds.
const SILENCE: Duration = Duration::from_secs(120);

fn seed(text: &str) -> Result<u64, std::num::ParseIntError> {
    text.strip_prefix("0x").map_or_else(|| text.parse(), |hex| u64::from_str_radix(hex, 16))
}

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let args = Args::parse();
    let browser = if args.check { Some(browser()?) } else { None };
    let site = build()?;
    let server = Server::http(("127.0.0.1", args.port)).map_err(|e| e as Box<dyn Error>)?;
    let address = format!("http://{}/", server.server_addr());
    let seed = args.seed.unwrap_or_else(|| {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
    });
    // As text: JavaScript's numbers have 53 bits.
    let options = format!(r#"{{"draws": {}, "seed": "{seed}"}}"#, args.draws);
    println!("{address}");
    let _window = browser.map(|browser| open(browser, &site, &address)).transpose()?;
    loop {
        let request = if args.check {
            server.recv_timeout(SILENCE)?.ok_or("the browser says nothing more")?
        } else {
            server.recv()?
        };
        let report = match answer(request, &site, &options) {
            Ok(Some(report)) => report,
            Ok(None) => continue,
            Err(error) => {
                eprintln!("a request that broke off: {error}");
                continue;
            }
        };
        match report.strip_prefix("END ") {
            Some(how) if args.check => return Ok(ExitCode::from(u8::from(how != "right"))),
            Some(_) => {}
            None => println!("{report}"),
        }
    }
}

/// Builds the page: the folder with its files.
fn build() -> Result<PathBuf, Box<dyn Error>> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/browser");
    let cargo = std::env::var_os("CARGO").unwrap_or("cargo".into());
    let built = Command::new(cargo)
        .args(["build", "--release", "--lib", "--target", "wasm32-unknown-unknown", "--manifest-path"])
        .arg(&manifest)
        .arg("--target-dir")
        .arg(&target)
        .status()?;
    if !built.success() {
        return Err("the page did not build (above)".into());
    }
    let site = target.join("site");
    std::fs::create_dir_all(&site)?;
    wasm_bindgen_cli_support::Bindgen::new()
        .input_path(target.join("wasm32-unknown-unknown/release/page.wasm"))
        .web(true)?
        .typescript(false)
        .generate(&site)?;
    Ok(site)
}

/// A browser that has WebGPU without a window.
fn browser() -> Result<&'static str, String> {
    let names = ["chromium", "chromium-browser", "google-chrome"];
    let there = |name: &&str| {
        Command::new(name).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
    };
    names.into_iter().find(there).ok_or(format!("--check needs one of {}", names.join(", ")))
}

/// A window that closes with the program.
struct Window(Child);

impl Drop for Window {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn open(browser: &str, site: &Path, address: &str) -> std::io::Result<Window> {
    // A profile of its own, new each time: a browser that is already running would only be told the address.
    let profile = site.with_file_name("profile");
    let _ = std::fs::remove_dir_all(&profile);
    let child = Command::new(browser)
        .args(["--headless=new", "--no-sandbox", "--enable-unsafe-webgpu", "--enable-features=Vulkan"])
        .arg("--use-webgpu-adapter=swiftshader")
        .arg(format!("--user-data-dir={}", profile.display()))
        .arg(address)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    Ok(Window(child))
}

/// Answers one request; gives what the page reports by it.
fn answer(mut request: Request, site: &Path, options: &str) -> std::io::Result<Option<String>> {
    let mut report = None;
    let (kind, body) = match request.url() {
        "/" => ("text/html", include_bytes!("index.html").to_vec()),
        "/options" => ("application/json", options.as_bytes().to_vec()),
        "/page.js" => ("text/javascript", std::fs::read(site.join("page.js"))?),
        "/page_bg.wasm" => ("application/wasm", std::fs::read(site.join("page_bg.wasm"))?),
        "/report" => {
            report = Some(std::io::read_to_string(request.as_reader())?);
            ("text/plain", Vec::new())
        }
        _ => {
            request.respond(Response::empty(404))?;
            return Ok(None);
        }
    };
    let header = Header::from_bytes("Content-Type", kind).expect("ASCII");
    request.respond(Response::from_data(body).with_header(header))?;
    Ok(report)
}
