//! The real binary: what it prints, what it writes, how it fails.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use crate::fixtures;

/// A folder to work in, and a home of its own.
pub(crate) struct Place {
    folder: TempDir,
    home: TempDir,
    program: PathBuf,
    environment: Vec<(&'static str, PathBuf)>,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self::of(env!("CARGO_BIN_EXE_darkroom").into(), vec![])
    }

    /// Where another build of the program is run.
    pub(crate) fn of(program: PathBuf, environment: Vec<(&'static str, PathBuf)>) -> Self {
        Self { folder: TempDir::new().unwrap(), home: TempDir::new().unwrap(), program, environment }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn home(&self) -> &Path {
        self.home.path()
    }

    /// The program in this place, with nothing of the caller's environment.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(arguments).current_dir(self.folder.path()).env_clear().stdin(Stdio::null());
        command.env("HOME", self.home()).env("XDG_CACHE_HOME", self.home().join("cache"));
        command.envs(self.environment.iter().cloned());
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Ran {
        Ran::of(&mut self.command(arguments))
    }

    /// `generate` with the tiny model, 32 x 32 and two steps, and `arguments` after it.
    pub(crate) fn generate(&self, arguments: &[&str]) -> Ran {
        let model = fixtures::tiny();
        let mut all = vec!["generate", "a cat", "--model", &model, "--steps", "2"];
        if !arguments.iter().any(|argument| ["--width", "--height", "--aspect-ratio"].contains(argument)) {
            all.extend(["--width", "32", "--height", "32"]);
        }
        // Later options do not replace earlier ones.
        for option in ["--model", "--steps"] {
            if arguments.contains(&option) {
                let at = all.iter().position(|argument| *argument == option).unwrap();
                all.drain(at..at + 2);
            }
        }
        all.extend(arguments);
        self.run(&all)
    }

    /// All files, sorted.
    pub(crate) fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// What a run left.
pub(crate) struct Ran(Output);

impl Ran {
    pub(crate) fn of(command: &mut Command) -> Self {
        Self(command.output().unwrap())
    }

    pub(crate) fn is_success(&self) -> bool {
        self.0.status.success()
    }

    pub(crate) fn out(&self) -> String {
        String::from_utf8(self.0.stdout.clone()).unwrap()
    }

    pub(crate) fn err(&self) -> String {
        String::from_utf8(self.0.stderr.clone()).unwrap()
    }

    #[track_caller]
    pub(crate) fn succeeds(self) -> Self {
        assert!(self.0.status.success(), "{}{}", self.out(), self.err());
        self
    }

    /// Exit code, and every one of `words` in the message.
    #[track_caller]
    pub(crate) fn fails(self, code: i32, words: &[&str]) -> Self {
        assert_eq!(self.0.status.code(), Some(code), "{}{}", self.out(), self.err());
        for word in words {
            assert!(self.err().contains(word), "{word:?} is not in: {}", self.err());
        }
        assert_eq!(self.out(), "");
        self
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out()).unwrap_or_else(|e| panic!("{e}: {}", self.out()))
    }
}

#[test]
fn help_is_what_was_agreed() {
    let place = Place::new();
    for (name, arguments) in [
        ("darkroom", &["--help"][..]),
        ("generate", &["generate", "--help"]),
        ("sweep", &["sweep", "--help"]),
        ("sweep-report", &["sweep", "report", "--help"]),
        ("sweep-compare", &["sweep", "compare", "--help"]),
        ("sweep-recommend", &["sweep", "recommend", "--help"]),
        ("lora", &["lora", "--help"]),
        ("lora-inspect", &["lora", "inspect", "--help"]),
        ("lora-convert", &["lora", "convert", "--help"]),
        ("lora-merge", &["lora", "merge", "--help"]),
        ("lora-verify", &["lora", "verify", "--help"]),
        ("models", &["models", "--help"]),
        ("models-pull", &["models", "pull", "--help"]),
        ("serve", &["serve", "--help"]),
        ("keys", &["keys", "create", "--help"]),
        ("doctor", &["doctor", "--help"]),
    ] {
        let ran = place.run(arguments).succeeds();
        assert_eq!(ran.err(), "");
        let expected = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/it/help/{name}.txt"));
        if update() {
            fs::create_dir_all(expected.parent().unwrap()).unwrap();
            fs::write(&expected, ran.out()).unwrap();
        }
        let expected = fs::read_to_string(expected).unwrap();
        assert_eq!(ran.out(), expected, "if this is meant, run the test with UPDATE_HELP=1 and look at the difference");
    }
}

#[expect(clippy::disallowed_methods, reason = "a switch of the tests, not of the program")]
fn update() -> bool {
    std::env::var("UPDATE_HELP").is_ok()
}

#[test]
fn the_path_and_nothing_else_is_printed() {
    let place = Place::new();
    let ran = place.generate(&["--seed", "7"]).succeeds();
    assert_eq!((ran.out().as_str(), ran.err().as_str()), ("darkroom-7.png\n", ""));
    assert_eq!(place.files(), ["darkroom-7.png"]);
    // The name was generated, so the next free one is taken.
    assert_eq!(place.generate(&["--seed", "7"]).succeeds().out(), "darkroom-7-2.png\n");
    let same = |name| fs::read(place.path(name)).unwrap();
    assert_eq!(same("darkroom-7.png"), same("darkroom-7-2.png"), "the same job gives the same bytes");
}

#[test]
fn json_says_what_was_done() {
    let place = Place::new();
    let ran =
        place.generate(&["--seed", "7", "--num-outputs", "2", "--json", "-o", "cat.webp", "--save-latents", "cat.safetensors"]);
    let report = ran.succeeds().json();
    assert_eq!(report["files"], serde_json::json!(["cat-1.webp", "cat-2.webp"]));
    assert_eq!(report["seeds"], serde_json::json!([7, 8]));
    assert_eq!((&report["width"], &report["steps"], &report["guidance"]), (&32.into(), &2.into(), &3.5.into()));
    assert_eq!((&report["device"], &report["dtype"]), (&"cpu".into(), &"f32".into()));
    assert_eq!(report["model"]["sha256"].as_str().unwrap().len(), 64);
    for stage in ["load", "encode", "denoise", "decode", "write"] {
        assert!(report["timings"][stage].as_f64().unwrap() >= 0.0, "{stage}");
    }
    let latents = candle_core::safetensors::load(place.path("cat.safetensors"), &candle_core::Device::Cpu).unwrap();
    assert_eq!(latents.keys().collect::<Vec<_>>(), ["latents"]);
    assert_eq!((latents["latents"].dims(), latents["latents"].dtype()), (&[2, 16, 4, 4][..], candle_core::DType::F32));
    assert_eq!(place.files(), ["cat-1.webp", "cat-2.webp", "cat.safetensors"]);
}

#[test]
fn what_was_cut_off_is_said() {
    let place = Place::new();
    let model = fixtures::tiny();
    let prompt = "word ".repeat(600);
    let arguments = ["generate", &prompt, "--model", &model, "--steps", "1", "--width", "32", "--height", "32", "--json"];
    let ran = place.run(&arguments).succeeds();
    let truncated = ran.json()["truncated"].clone();
    assert!(truncated.as_array().unwrap().iter().any(|cut| cut["encoder"] == "clip" && cut["limit"] == 77), "{truncated}");
    assert!(ran.err().contains("it did not see"), "{}", ran.err());
    let quiet = place.command(&arguments).arg("--quiet").output().unwrap();
    assert_eq!(String::from_utf8(quiet.stderr).unwrap(), "");
}

#[test]
fn pictures_carry_their_settings() {
    let place = Place::new();
    place.generate(&["--seed", "7", "-o", "a.png", "--true-cfg", "2", "--negative-prompt", "dogs"]).succeeds();
    let text = texts(&place.path("a.png"));
    let parameters = text.iter().find(|(key, _)| key == "parameters").unwrap().1.as_str();
    assert!(parameters.starts_with("a cat\nNegative prompt: dogs\nSteps: 2, Sampler: Euler, CFG scale: 2, "), "{parameters}");
    assert!(parameters.contains("Seed: 7, Size: 32x32, Model hash: "), "{parameters}");
    assert!(parameters.contains("Model: tiny-dev,"), "no folders of this machine: {parameters}");
    let exact: Value = serde_json::from_str(&text.iter().find(|(key, _)| key == "darkroom").unwrap().1).unwrap();
    assert_eq!((&exact["prompt"], &exact["seed"], &exact["true_cfg"]), (&"a cat".into(), &7.into(), &2.0.into()));

    place.generate(&["-o", "b.png", "--no-metadata"]).succeeds();
    assert_eq!(texts(&place.path("b.png")), []);
}

fn texts(path: &Path) -> Vec<(String, String)> {
    let reader = png::Decoder::new(BufReader::new(fs::File::open(path).unwrap())).read_info().unwrap();
    let chunks = reader.info().utf8_text.iter();
    chunks.map(|chunk| (chunk.keyword.clone(), chunk.get_text().unwrap())).collect()
}

#[test]
fn one_of_several_outputs_can_be_made_again_alone() {
    let place = Place::new();
    place.generate(&["--seed", "7", "--num-outputs", "2"]).succeeds();
    place.generate(&["--seed", "8", "-o", "alone.png"]).succeeds();
    assert_eq!(fs::read(place.path("darkroom-8.png")).unwrap(), fs::read(place.path("alone.png")).unwrap());
}

#[test]
fn pictures_can_start_from_a_picture() {
    let place = Place::new();
    place.generate(&["--seed", "1", "-o", "from.jpg"]).succeeds();
    place
        .generate(&["--seed", "2", "-o", "to.png", "--image", "from.jpg", "--mask", "from.jpg", "--prompt-strength", "0.5"])
        .succeeds();
    assert!(place.path("to.png").exists());
}

#[test]
fn files_are_replaced_only_with_force() {
    let place = Place::new();
    fs::write(place.path("a.png"), "old").unwrap();
    place.generate(&["-o", "a.png"]).fails(1, &["a.png", "--force"]);
    assert_eq!(fs::read(place.path("a.png")).unwrap(), b"old");
    place.generate(&["-o", "a.png", "--force"]).succeeds();
    assert!(fs::read(place.path("a.png")).unwrap().starts_with(b"\x89PNG"));
    // One file for two things would be one of them.
    place
        .generate(&["-o", "a.png", "--save-latents", "./a.png", "--force"])
        .fails(2, &["save-latents is ./a.png", "another name"]);
    let several = ["-o", "s.png", "--num-outputs", "2", "--save-latents", "s-1.png"];
    place.generate(&several).fails(2, &["save-latents is s-1.png"]);
    assert!(fs::read(place.path("a.png")).unwrap().starts_with(b"\x89PNG"));
    fs::write(place.path("l.safetensors"), "old").unwrap();
    place.generate(&["-o", "b.png", "--save-latents", "l.safetensors"]).fails(1, &["l.safetensors", "--force"]);
    assert_eq!(place.files(), ["a.png", "l.safetensors"]);
}

#[test]
fn wrong_requests_name_field_value_and_remedy() {
    let place = Place::new();
    fs::write(place.path("text.png"), "no picture").unwrap();
    fs::write(place.path("half.png"), &fs::read(fixtures::path("e2e/photo.png")).unwrap()[..300]).unwrap();
    let cases: &[(&[&str], i32, &[&str])] = &[
        (&["--width", "100"], 2, &["width is 100", "multiple of 16", "nearest is 96"]),
        (&["--height", "0"], 2, &["height is 0", "nearest is 16"]),
        (&["--width", "-16"], 2, &["-16", "--width"]),
        (&["--width", "65536", "--height", "65536"], 1, &["65536 x 65536", "need about", "this machine has"]),
        (&["--steps", "0"], 2, &["steps is 0", "from 1 to 1000"]),
        (&["--steps", "2000"], 2, &["steps is 2000", "from 1 to 1000"]),
        (&["--guidance", "NaN"], 2, &["guidance is NaN", "from 0 to 100"]),
        (&["--guidance", "inf"], 2, &["guidance is inf"]),
        (&["--guidance", "-1"], 2, &["guidance is -1"]),
        (&["--guidance", "much"], 2, &["much", "--guidance"]),
        (&["--true-cfg", "0"], 2, &["true-cfg is 0", "from 1 to 100"]),
        (&["--num-outputs", "0"], 2, &["num-outputs is 0"]),
        (&["--seed", "-1"], 2, &["-1", "--seed"]),
        (&["--aspect-ratio", "5:7"], 2, &["5:7", "16:9"]),
        (&["--aspect-ratio", "1:1", "--width", "64"], 2, &["aspect-ratio", "width or height"]),
        (&["--megapixels", "1"], 2, &["megapixels", "aspect-ratio"]),
        (&["--megapixels", "2", "--aspect-ratio", "1:1"], 2, &["2", "1 or 0.25"]),
        (&["--mask", "text.png"], 2, &["mask", "without image"]),
        (&["--prompt-strength", "0.5"], 2, &["prompt-strength", "without image"]),
        (&["--image", "no.png"], 1, &["image no.png"]),
        (&["--image", "text.png"], 1, &["image text.png", "no picture format"]),
        (&["--image", "half.png"], 1, &["image half.png", "damaged"]),
        (&["--output-quality", "101", "--output-format", "jpg"], 2, &["output-quality is 101", "from 0"]),
        (&["--output-quality", "50"], 2, &["output-quality", "png is lossless"]),
        (&["--output-format", "gif"], 2, &["gif", "png, jpg, webp"]),
        (&["-o", "a.gif"], 2, &[".gif", ".png"]),
        (&["-o", "a.png", "--output-format", "jpg"], 2, &["output-format is jpg", ".png"]),
        (&["-o", "no/a.png"], 1, &["folder no", "mkdir -p"]),
        (&["--save-latents", "no/a.safetensors"], 1, &["save-latents", "mkdir -p"]),
        (&["--device", "tpu"], 2, &["tpu", "cuda:N"]),
        (&["--dtype", "f64"], 2, &["f64", "bf16"]),
        (&["--noise", "gpu"], 2, &["gpu", "cpu or cuda"]),
        (&["--model", "flux1-dve"], 2, &["flux1-dve", "flux1-dev", "models list"]),
        (&["--model", "flux1-dev"], 1, &["flux1-dev", "darkroom models pull flux1-dev"]),
        (&["--model", "text.png"], 1, &["text.png"]),
    ];
    for (arguments, code, words) in cases {
        place.generate(arguments).fails(*code, words);
    }
    // In range only with a picture.
    for strength in ["0", "1.5", "NaN"] {
        let photo = fixtures::path("e2e/photo.png");
        let arguments = ["--image", photo.to_str().unwrap(), "--prompt-strength", strength];
        place.generate(&arguments).fails(2, &["prompt-strength", "above 0"]);
    }
    place.run(&["generate"]).fails(2, &["<PROMPT>"]);
    assert_eq!(place.files(), ["half.png", "text.png"], "nothing was written");
}

#[test]
fn files_that_are_no_model_are_called_by_their_name() {
    let place = Place::new();
    let whole = fs::read(fixtures::path("tiny-dev/transformer/diffusion_pytorch_model.safetensors")).unwrap();
    let cases: [(&str, &[u8], &str); 5] = [
        ("page.safetensors", b"<!DOCTYPE html><html>", "a web page"),
        ("pointer.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("pickle.safetensors", b"\x80\x02}q\x00", "pickle"),
        ("pickle.ckpt", b"PK\x03\x04..archive/data.pkl", "pickle"),
        ("half.safetensors", &whole[..whole.len() / 2], "half.safetensors"),
    ];
    for (name, bytes, word) in cases {
        fs::write(place.path(name), bytes).unwrap();
        place.generate(&["--model", name]).fails(1, &[name, word]);
    }
    fs::create_dir(place.path("empty")).unwrap();
    place.generate(&["--model", "empty"]).fails(1, &["empty"]);
}

#[cfg(not(feature = "cuda"))]
#[test]
fn a_device_that_is_not_in_this_build_says_how_to_build_it() {
    Place::new().generate(&["--device", "cuda:1"]).fails(1, &["cuda", "--features cuda"]);
}

#[test]
#[cfg(unix)]
fn a_folder_that_cannot_be_written_to_is_found_before_the_work() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new();
    fs::create_dir(place.path("closed")).unwrap();
    fs::set_permissions(place.path("closed"), fs::Permissions::from_mode(0o500)).unwrap();
    if fs::write(place.path("closed/probe"), "").is_ok() {
        // Permissions do not bind this user; a folder in the kernel's tree binds everyone.
        place.generate(&["-o", "/proc/a.png"]).fails(1, &["/proc", "cannot be written to"]);
    } else {
        place.generate(&["-o", "closed/a.png"]).fails(1, &["closed", "cannot be written to"]);
    }
}

#[test]
#[cfg(unix)]
fn ctrl_c_stops_within_a_step_and_leaves_nothing() {
    let place = Place::new();
    let model = fixtures::tiny();
    let arguments = ["generate", "a cat", "--model", &model, "--steps", "1000", "--width", "512", "--height", "512"];
    let mut command = place.command(&arguments);
    let mut child = command.env("RUST_LOG", "info").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("loaded") {
        line.clear();
        assert!(log.read_line(&mut line).unwrap() > 0, "the model was not loaded");
    }
    std::thread::sleep(std::time::Duration::from_millis(300));
    let begun = std::time::Instant::now();
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let status = child.wait().unwrap();
    let mut rest = String::new();
    log.read_to_string(&mut rest).unwrap();
    assert_eq!(status.code(), Some(130), "{rest}");
    assert!(rest.contains("nothing was written"), "{rest}");
    assert!(begun.elapsed().as_secs() < 20, "{:?}", begun.elapsed());
    assert_eq!(place.files(), [""; 0]);
}

#[test]
#[cfg(target_os = "linux")]
fn names_that_are_no_text_are_answered_as_they_can_be() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let place = Place::new();
    let model = fixtures::path("tiny-dev");
    let json = |verb: &str, name: &[u8]| {
        let arguments = [
            verb,
            "a cat",
            "--model",
            model.to_str().unwrap(),
            "--width",
            "32",
            "--height",
            "32",
            "--steps",
            "1",
            "-q",
            "--json",
            "-o",
        ];
        Ran::of(place.command(&arguments).arg(OsStr::from_bytes(name))).succeeds().json()
    };
    assert_eq!(json("generate", b"caf\xe9.png")["files"], serde_json::json!(["caf\u{fffd}.png"]));
    assert!(place.path("").join(OsStr::from_bytes(b"caf\xe9.png")).exists());
    assert_eq!(json("sweep", b"caf\xe9")["html"], "caf\u{fffd}/report.html");
}

#[test]
fn a_reader_that_has_enough_is_no_failure() {
    let place = Place::new();
    for arguments in [&["generate", "--help"][..], &["--version"], &["completions", "bash"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let status = place.command(arguments).stdout(writer).stderr(Stdio::null()).status().unwrap();
        assert_eq!(status.code(), Some(0), "{arguments:?}");
    }
}

#[test]
fn completions_know_the_options() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = place.run(&["completions", shell]).succeeds().out();
        assert!(script.contains("aspect-ratio") && script.contains("verify"), "{shell}");
    }
    assert!(place.run(&["--version"]).succeeds().out().starts_with("darkroom 0."));
}

#[cfg(feature = "pocket")]
#[test]
fn the_embedded_model_needs_nothing() {
    let place = Place::new();
    let ran = place
        .run(&["generate", "a portrait of a person", "--steps", "2", "--seed", "3", "--aspect-ratio", "3:4", "--json"])
        .succeeds();
    let report = ran.json();
    assert_eq!((&report["model"]["name"], &report["width"], &report["height"]), (&"pocket".into(), &112.into(), &144.into()));
    assert_eq!(place.files(), ["darkroom-3.png"]);
}

#[test]
fn variables_that_mean_nothing_are_said() {
    let wrong = vec![("DARKROOM_KERNELS", "fusd".into()), ("DARKROOM_LORA_CACHE_GB", "much".into())];
    let place = Place::of(env!("CARGO_BIN_EXE_darkroom").into(), wrong);
    place.run(&["models", "list"]).fails(2, &["DARKROOM_KERNELS=fusd: must be fused or plain", "DARKROOM_LORA_CACHE_GB=much"]);
    place.run(&["--version"]).succeeds();
}

#[test]
fn how_loras_act_cannot_be_chosen_where_they_are_merged_before_rounding() {
    let place = Place::new();
    place
        .generate(&["--dtype", "fp8-merged", "--lora-mode", "branch"])
        .fails(2, &["lora_mode", "branch", "fp8-merged", "fp8-products"]);
    assert_eq!(std::fs::read_dir(place.path("")).unwrap().count(), 0);
}
