//! LoRAs through the real binary.

use std::fs;
use std::path::PathBuf;

use sha2::{Digest, Sha256};

use crate::cli::Place;
use crate::fixtures::{archive, lora, tiny, weights};

/// An archive as Replicate's trainer gives it.
fn trained_model(place: &Place) -> PathBuf {
    let path = place.path("trained_model.tar");
    let members: [(&str, &[u8]); 3] = [
        ("output/flux_train_replicate/config.yaml", b"job: extension\n"),
        ("output/flux_train_replicate/captions/a_photo_of_me.txt", b"me"),
        ("output/flux_train_replicate/lora.safetensors", &weights()),
    ];
    fs::write(&path, archive(&members)).unwrap();
    path
}

#[test]
fn pockets_people_are_known_by_name() {
    let place = Place::new();
    let json = |lora: &str| {
        let prompt = "portrait of user1003, wearing a green shirt, red top hat";
        place
            .run(&["generate", prompt, "--lora", lora, "--steps", "2", "--seed", "1", "--json", "--force", "-o", "x.png"])
            .succeeds()
            .json()
    };
    let shipped = json("user1003@0.9");
    assert_eq!(shipped["loras"][0]["scale"], 0.9);
    let path = |name: &str| format!("{}/models/pocket/people/{name}.safetensors", env!("CARGO_MANIFEST_DIR"));
    let digest = json(&path("user1003"))["loras"][0]["digest"].clone();
    assert_eq!(shipped["loras"][0]["digest"], digest);
    assert!(place.run(&["lora", "inspect", "user1001-retrained"]).succeeds().out().contains("user1001"));
    // A user's own file of that name comes first, a folder does not.
    fs::create_dir(place.path("user1003")).unwrap();
    assert_eq!(json("user1003")["loras"][0]["digest"], digest);
    fs::remove_dir(place.path("user1003")).unwrap();
    fs::copy(path("user1004"), place.path("user1003")).unwrap();
    assert_ne!(json("user1003")["loras"][0]["digest"], digest);
}

#[test]
fn a_lora_changes_the_picture_and_is_told() {
    let place = Place::new();
    let json =
        |arguments: &[&str]| place.generate(&[&["--seed", "5", "--json", "--quiet"], arguments].concat()).succeeds().json();
    let base = json(&["-o", "base.png"]);
    assert_eq!(base["loras"], serde_json::json!([]));
    let reference = format!("{}@0.5", lora("diffusers"));
    let with = json(&["-o", "with.png", "--lora", &reference, "--trigger-word", "user42"]);
    let digest: String = Sha256::digest(weights()).iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(with["loras"][0]["digest"], digest);
    assert_eq!(with["loras"][0]["scale"], 0.5);
    assert_eq!(with["prompt"], "user42, a cat");
    assert_eq!((&base["pristine"], &with["pristine"]), (&serde_json::Value::Null, &"device".into()));
    assert!(with["timings"]["switch"].as_f64().unwrap() > 0.0);
    assert_ne!(fs::read(place.path("base.png")).unwrap(), fs::read(place.path("with.png")).unwrap());

    // The archive of the trainer is the same LoRA; a scale of 0 is none.
    let archive = trained_model(&place);
    let again =
        json(&["-o", "tar.png", "--no-metadata", "--lora", &format!("{}@0.5", archive.display()), "--trigger-word", "user42"]);
    assert_eq!(again["loras"][0]["digest"], digest);
    json(&["-o", "plain.png", "--no-metadata", "--lora", &reference, "--trigger-word", "user42"]);
    assert_eq!(fs::read(place.path("tar.png")).unwrap(), fs::read(place.path("plain.png")).unwrap());
    json(&["-o", "zero.png", "--no-metadata", "--lora", &format!("{}@0", lora("diffusers"))]);
    json(&["-o", "none.png", "--no-metadata"]);
    assert_eq!(fs::read(place.path("zero.png")).unwrap(), fs::read(place.path("none.png")).unwrap());
    // Two at once; the pictures carry them.
    json(&["-o", "two.png", "--lora", &reference, "--lora", &format!("{}@-0.3", lora("kohya")), "--lora-blocks", "double:0=0.5"]);
    let two = fs::read(place.path("two.png")).unwrap();
    let has = |needle: &str| two.windows(needle.len()).any(|window| window == needle.as_bytes());
    assert!(has(&format!("<lora:{}:0.5>", &digest[..10])) && has("Lora hashes") && has(&digest));
}

#[test]
fn wrong_loras_are_refused_before_anything_is_written() {
    let place = Place::new();
    fs::write(place.path("page.safetensors"), "<!doctype html><html></html>").unwrap();
    fs::write(place.path("x.tar"), "no archive").unwrap();
    let before = place.files();
    for (arguments, code, part) in [
        (&["--lora", "absent.safetensors"][..], 1, "absent.safetensors cannot be read"),
        (&["--lora", "page.safetensors"], 1, "web page"),
        (&["--lora", "x.tar"], 1, "x.tar is no LoRA"),
        (&["--lora", "x@nan"], 2, "finite"),
        (&["--lora-blocks", "double:0=1"], 2, "without lora"),
        (&["--lora", "page.safetensors", "--lora-blocks", "double:99=1"], 2, "0 to 18"),
        (&["--lora", "page.safetensors", "--lora-mode", "both"], 2, "auto, merge or branch"),
        (&["--lora", &lora("diffusers"), "--model", "pocket"], 1, "does not fit this base model"),
    ] {
        place.generate(arguments).fails(code, &[part]);
        assert_eq!(place.files(), before, "{arguments:?}");
    }
    let ran = place.generate(&["--trigger-word", "me", "-o", "a.png"]).succeeds();
    assert!(ran.err().contains("no effect without a lora"), "{}", ran.err());
}

#[test]
fn a_folder_is_the_lora_in_it() {
    let place = Place::new();
    let inspect = |reference: &str| place.run(&["lora", "inspect", reference, "--json"]).succeeds().json();
    // As PEFT writes it: what scales the factors is in the other file.
    let peft = crate::fixtures::path("lora/writers/peft");
    let whole = inspect(peft.join("adapter_model.safetensors").to_str().unwrap());
    fs::create_dir(place.path("me")).unwrap();
    for name in ["adapter_model.safetensors", "adapter_config.json"] {
        fs::copy(peft.join(name), place.path("me").join(name)).unwrap();
    }
    fs::write(place.path("me/._adapter_model.safetensors"), "Mac OS X").unwrap();
    assert_eq!(inspect("me"), whole);
    fs::copy(lora("kohya"), place.path("me/optimizer.safetensors")).unwrap();
    assert_eq!(inspect("me/"), whole);
    fs::remove_file(place.path("me/adapter_model.safetensors")).unwrap();
    assert_eq!(inspect("me")["digest"], inspect(&lora("kohya"))["digest"]);
    place.generate(&["--lora", "me@0.5", "-o", "a.png"]).succeeds();
    fs::copy(lora("bfl"), place.path("me/other.safetensors")).unwrap();
    place.generate(&["--lora", "me"]).fails(1, &["several", "name one of them: optimizer.safetensors, other.safetensors"]);
    fs::create_dir(place.path("none")).unwrap();
    place.generate(&["--lora", "none"]).fails(1, &["folder none holds no .safetensors file", "nothing"]);
    fs::write(place.path("none/lora.bin"), "x").unwrap();
    place.generate(&["--lora", "none"]).fails(1, &["it holds lora.bin"]);
}

#[test]
fn a_zip_is_called_a_zip() {
    let place = Place::new();
    fs::write(place.path("me.zip"), b"PK\x03\x04..me/lora.safetensors").unwrap();
    let ran = place.generate(&["--lora", "me.zip"]).fails(1, &["zip", "unpack"]);
    assert!(!ran.err().contains("pickle"), "{}", ran.err());
}

#[test]
fn inspect_extract_and_verify() {
    let place = Place::new();
    let report = place.run(&["lora", "inspect", &lora("lokr"), "--json"]).succeeds().json();
    assert_eq!(report["algorithms"], serde_json::json!({ "lokr": 3 }));
    assert_eq!(report["prefix"], serde_json::json!(["lycoris_"]));
    let shown = place.run(&["lora", "inspect", &lora("kohya")]).succeeds().out();
    assert!(shown.contains("kohya sd-scripts") && shown.contains("lora x 7"), "{shown}");
    fs::write(place.path("me.bin"), b"PK\x03\x04..archive/data.pkl").unwrap();
    // A refused file has a report as well.
    let ran = place.run(&["lora", "inspect", "me.bin", "--json"]);
    assert!(!ran.is_success() && ran.err().contains("pickle"), "{}", ran.err());
    assert_eq!(ran.json()["refused"]["code"], "not_safetensors");

    let archive = trained_model(&place).display().to_string();
    place.run(&["lora", "extract", &archive, "me.safetensors"]).succeeds();
    assert_eq!(fs::read(place.path("me.safetensors")).unwrap(), weights());
    place.run(&["lora", "extract", &archive, "me.safetensors"]).fails(1, &["--force"]);
    place.run(&["lora", "extract", &archive, "me.safetensors", "--force"]).succeeds();
    place.run(&["lora", "extract", &archive, "no/where.safetensors"]).fails(1, &["mkdir"]);
    let left = place.files();
    assert_eq!(left, ["me.bin", "me.safetensors", "trained_model.tar"]);

    let (one, two) = (format!("{}@0.7", lora("kohya")), lora("dora_in"));
    for mode in ["merge", "branch"] {
        let arguments = ["lora", "verify", &one, &two, "--model", &tiny(), "--switches", "30", "--lora-mode", mode, "--json"];
        let verified = place.run(&arguments).succeeds().json();
        assert_eq!(verified["switches"], 31);
        let states = verified["states"].as_array().unwrap();
        assert_eq!(states.len(), 3);
        assert_eq!(states[0]["weights"], verified["base"]);
        assert!(states[1..].iter().all(|state| state["weights"] != verified["base"]));
    }
    let shown = place.run(&["lora", "verify", &one, "--model", &tiny()]).succeeds().out();
    assert!(shown.contains("equal bit for bit"), "{shown}");
}
