//! The README's commands about LoRAs, as they stand there, with small stand-ins for what a reader has: a base, files, a hub.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::cli::{Place, Ran};
use crate::fixtures;
use crate::site::{Reply, Site};

/// What a reader has beside them.
fn prepare(place: &Place, mine: &[u8]) {
    fs::write(place.path("me.safetensors"), mine).unwrap();
    fs::write(place.path("you.safetensors"), fixtures::weights()).unwrap();
    let trained = fixtures::archive(&[("output/flux_train_replicate/lora.safetensors", mine)]);
    fs::write(place.path("trained_model.tar"), trained).unwrap();
}

/// A shell's words, as far as the README needs a shell.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted) = (Vec::new(), String::new(), false);
    for c in line.chars() {
        match c {
            '"' => quoted = !quoted,
            '#' if !quoted && word.is_empty() => break,
            ' ' if !quoted => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
            }
            c => word.push(c),
        }
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

#[test]
fn your_lora() {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let section = readme.split("\n## ").find(|section| section.starts_with("Your LoRA")).unwrap();
    let commands: Vec<Vec<String>> = section.lines().filter_map(|line| line.strip_prefix("$ darkroom ")).map(words).collect();
    assert!(commands.len() >= 7, "{commands:?}");

    let mine = fs::read(fixtures::lora("kohya")).unwrap();
    let served = mine.clone();
    let site = Site::serve(move |request| match request.path.as_str() {
        "/api/models/owner/repo/revision/main?blobs=true" => {
            Reply::json(&json!({"sha": "c1", "siblings": [{"rfilename": "a.safetensors"}]}))
        }
        _ => Reply::ok(&served),
    });
    let place = Place::new();
    prepare(&place, &mine);
    let tiny = fixtures::tiny();
    let pocket = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/pocket").display().to_string();
    for command in commands {
        let stand_in = |word: &String| match word.as_str() {
            "flux1-dev" => tiny.clone(),
            word => word.replace("https://example.com", &site.address).replace("models/pocket", &pocket),
        };
        let mut arguments: Vec<String> = command.iter().map(stand_in).collect();
        if command[0] == "generate" && command.contains(&"flux1-dev".to_owned()) {
            arguments.extend(["--width", "32", "--height", "32", "--steps", "2"].map(String::from));
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut run = place.command(&arguments);
        let ran = Ran::of(run.env("HF_ENDPOINT", &site.address).env("DARKROOM_PRIVATE_URLS", "1"));
        assert!(ran.is_success(), "{command:?}: {}{}", ran.out(), ran.err());
        // `extract` writes a name that is there already in this place.
        if command[1] == "inspect" {
            fs::remove_file(place.path("me.safetensors")).unwrap();
        }
    }
    assert_eq!(site.count("/style.safetensors"), 1);
}
