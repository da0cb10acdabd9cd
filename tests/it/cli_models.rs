//! `darkroom models` and `--model`, against a hub on this machine that speaks as much of the protocol as is used.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::cli::{Place, Ran};
use crate::fixtures;
use crate::hub::{Fault, Hub};

const REPO: &str = "somebody/tiny";

const FILES: [(&str, &str); 12] = [
    ("transformer", "transformer/diffusion_pytorch_model.safetensors"),
    ("transformer-config", "transformer/config.json"),
    ("t5", "text_encoder_2/model.safetensors"),
    ("t5-config", "text_encoder_2/config.json"),
    ("clip", "text_encoder/model.safetensors"),
    ("clip-config", "text_encoder/config.json"),
    ("vae", "vae/diffusion_pytorch_model.safetensors"),
    ("vae-config", "vae/config.json"),
    ("scheduler", "scheduler/scheduler_config.json"),
    ("clip-vocab", "tokenizer/vocab.json"),
    ("clip-merges", "tokenizer/merges.txt"),
    ("t5-tokenizer", "tokenizer_2/tokenizer.json"),
];

/// A place with a card of the tiny model, and a hub that has its files.
struct Setting {
    place: Place,
    hub: Hub,
}

impl Setting {
    fn new() -> Self {
        let place = Place::new();
        let mut card = "name = \"tiny\"\nwhat = \"a tiny model\"\nlicence = \"MIT\"\ngated = true\n".to_owned();
        card += "[defaults]\nsteps = 2\nguidance = 3.5\nwidth = 32\nheight = 32\n";
        for (role, path) in FILES {
            card += &format!("[[files]]\nrole = \"{role}\"\nrepo = \"{REPO}\"\npath = \"{path}\"\n");
        }
        fs::write(place.path("tiny.toml"), card).unwrap();
        Self { place, hub: Hub::serve(REPO, &fixtures::path("tiny-dev")) }
    }

    fn run_with(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Ran {
        let mut command = self.place.command(arguments);
        command.env("HF_ENDPOINT", self.hub.address()).env("HF_HOME", self.place.home().join("hf"));
        Ran::of(command.envs(environment.iter().copied()))
    }

    fn run(&self, arguments: &[&str]) -> Ran {
        self.run_with(arguments, &[])
    }

    /// A file in the cache, as Python would find it.
    fn cached(&self, path: &str) -> std::path::PathBuf {
        self.place.home().join("hf/hub/models--somebody--tiny/snapshots").join(Hub::COMMIT).join(path)
    }
}

#[test]
fn a_model_is_pulled_used_verified_and_removed() {
    let setting = Setting::new();
    setting.run(&["generate", "a cat", "--model", "tiny.toml"]).fails(1, &["tiny", "12 of its files", "models pull"]);
    let pulled = setting.run(&["models", "pull", "tiny.toml", "--json"]).succeeds().json();
    assert_eq!((&pulled["fetched"], &pulled["present"]), (&12.into(), &0.into()));
    let vae = "vae/diffusion_pytorch_model.safetensors";
    assert_eq!(fs::read(setting.cached(vae)).unwrap(), fs::read(fixtures::path("tiny-dev").join(vae)).unwrap());

    let report = setting.run(&["generate", "a cat", "--model", "tiny.toml", "--seed", "7", "--json"]).succeeds().json();
    assert_eq!(report["model"]["name"], "tiny");
    // The same weights as a folder: the same digest and the same bytes.
    let arguments = ["generate", "a cat", "--model", &fixtures::tiny(), "--seed", "7", "--json", "--steps", "2"];
    let alike = setting.run(&[&arguments[..], &["--width", "32", "--height", "32", "--save-latents", "f.safetensors"]].concat());
    assert_eq!(alike.succeeds().json()["model"]["sha256"], report["model"]["sha256"]);

    let again = setting.run(&["models", "pull", "tiny.toml", "--json"]).succeeds().json();
    assert_eq!((&again["fetched"], &again["present"]), (&0.into(), &12.into()));

    let rows = setting.run(&["models", "verify", "tiny.toml", "--json"]).succeeds().json();
    assert!(rows.as_array().unwrap().iter().all(|row| row["state"] == "sound" || row["state"] == "no-digest"), "{rows}");
    flip_a_bit(&setting.cached(vae));
    let verdict = setting.run(&["models", "verify", "tiny.toml"]);
    assert!(verdict.out().contains(&format!("{vae}: DAMAGED")), "{}", verdict.out());
    assert!(verdict.err().contains("1 of 12 files") && !verdict.is_success());

    let removed = setting.run(&["models", "remove", "tiny.toml", "--json"]).succeeds().json();
    assert!(removed["freed_bytes"].as_u64().unwrap() > 100_000, "{removed}");
    assert!(!setting.cached(vae).exists());
    setting.run(&["generate", "a cat", "--model", "tiny.toml"]).fails(1, &["12 of its files"]);
}

fn flip_a_bit(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_closed_repository_says_how_to_get_in() {
    let setting = Setting::new();
    setting.hub.fault(Fault::NeedsToken("hf_right"));
    let pull = ["models", "pull", "tiny.toml"];
    let page = format!("{}/{REPO}", setting.hub.address());
    setting.run(&pull).fails(1, &["401", "accept the licence", &page, "settings/tokens", "HF_TOKEN="]);
    let wrong = setting.run_with(&pull, &[("HF_TOKEN", "hf_wrong")]).fails(1, &["refused the token", "settings/tokens"]);
    assert!(!wrong.err().contains("hf_wrong"), "a token is never shown");
    setting.hub.fault(Fault::Forbidden);
    setting.run_with(&pull, &[("HF_TOKEN", "hf_right")]).fails(1, &["403", "accept the licence", "MIT", &page]);
    setting.hub.fault(Fault::NeedsToken("hf_right"));
    setting.run_with(&pull, &[("HF_TOKEN", "hf_right")]).succeeds();
    let file = setting.place.path("token");
    fs::write(&file, "hf_right\n").unwrap();
    setting.run(&["models", "remove", "tiny.toml"]).succeeds();
    setting.run_with(&pull, &[("HF_TOKEN_PATH", file.to_str().unwrap())]).succeeds();
}

#[test]
fn what_arrives_wrong_is_thrown_away() {
    for (fault, words) in [
        (Fault::CutOff, &["broke off"][..]),
        (Fault::Altered, &["arrived wrong", "SHA-256"]),
        (Fault::ErrorPage, &["arrived wrong", "bytes arrived"]),
    ] {
        let setting = Setting::new();
        setting.hub.fault(fault);
        setting.run(&["models", "pull", "tiny.toml"]).fails(1, words);
        let broken = "transformer/diffusion_pytorch_model.safetensors";
        assert!(!setting.cached(broken).exists(), "{fault:?}");
        // The connection is good again: what was fetched is kept, the rest comes.
        setting.hub.fault(Fault::None);
        setting.run(&["models", "pull", "tiny.toml"]).succeeds();
        assert_eq!(fs::read(setting.cached(broken)).unwrap(), fs::read(fixtures::path("tiny-dev").join(broken)).unwrap());
    }
}

#[test]
fn a_published_size_or_digest_binds() {
    let setting = Setting::new();
    let path = setting.place.path("tiny.toml");
    let card = fs::read_to_string(&path).unwrap();
    let line = "path = \"transformer/diffusion_pytorch_model.safetensors\"\n";
    fs::write(&path, card.replace(line, &format!("{line}bytes = 5\n"))).unwrap();
    setting.run(&["models", "pull", "tiny.toml"]).fails(1, &["but 5 in the card", "not fetched"]);
    fs::write(&path, card.replace(line, &format!("{line}sha256 = \"{}\"\n", "0".repeat(64)))).unwrap();
    setting.run(&["models", "pull", "tiny.toml"]).fails(1, &["arrived wrong", "000 is published"]);
    fs::write(&path, card.replace("diffusion_pytorch_model", "nothing")).unwrap();
    setting.run(&["models", "pull", "tiny.toml"]).fails(1, &["has no file", "404"]);
}

#[test]
fn offline_fetches_nothing() {
    let setting = Setting::new();
    setting.run_with(&["models", "pull", "tiny.toml"], &[("HF_HUB_OFFLINE", "1")]).fails(1, &["HF_HUB_OFFLINE", "12 files"]);
    assert_eq!(setting.hub.requests(), 0);
    setting.run(&["models", "pull", "tiny.toml"]).succeeds();
    setting.run_with(&["models", "pull", "tiny.toml"], &[("HF_HUB_OFFLINE", "1")]).succeeds();
    setting.run_with(&["generate", "a cat", "--model", "tiny.toml"], &[("HF_HUB_OFFLINE", "1")]).succeeds();
}

#[test]
fn a_hub_that_is_not_there_is_named() {
    let setting = Setting::new();
    let dead = [("HF_ENDPOINT", "http://127.0.0.1:9")];
    setting.run_with(&["models", "pull", "tiny.toml"], &dead).fails(1, &["http://127.0.0.1:9", "cannot be reached"]);
    setting.run_with(&["models", "pull", "tiny.toml"], &[("HF_ENDPOINT", "nonsense")]).fails(1, &["HF_ENDPOINT", "nonsense"]);
}

#[test]
fn the_list_says_what_is_here() {
    let place = Place::new();
    let rows = place.run(&["models", "list", "--json"]).succeeds().json();
    let row = |name: &str| rows.as_array().unwrap().iter().find(|row| row["name"] == name).unwrap().clone();
    assert_eq!(row("flux1-dev")["installed"], "no");
    assert_eq!(row("flux1-dev")["gated"], true);
    assert!(row("flux1-dev")["bytes"].as_u64().unwrap() > 33_000_000_000);
    assert_eq!(row("pocket")["installed"], if cfg!(feature = "pocket") { json!("embedded") } else { json!("no") });
    assert!(place.run(&["models", "list"]).succeeds().out().contains("flux1-dev-q8-gguf"));
}

#[test]
fn unknown_models_and_cards_are_refused() {
    let place = Place::new();
    for verb in ["pull", "verify", "remove"] {
        place.run(&["models", verb, "flux1-shnell"]).fails(2, &["flux1-shnell", "flux1-schnell"]);
    }
    place.run(&["models", "pull", "pocket"]).fails(2, &["pocket", "part of the program"]);
    fs::write(place.path("bad.toml"), "name = 1").unwrap();
    place.run(&["models", "pull", "bad.toml"]).fails(2, &["bad.toml", "flux1-dev.toml"]);
}
