//! What `lora merge` and its like leave alone, and what is left of them when they are stopped.

use std::fs::{self, File};
use std::io::Write;
use std::ops::ControlFlow;
use std::path::Path;
use std::process::{Command, Stdio};

use darkroom::config::Config;
use darkroom::ops::Error;
use darkroom::ops::lora::{self, ConvertOrder, Format, MergeOrder, Stage};

use crate::cli::{Place, Ran};
use crate::fixtures::{self, tiny};
use crate::service::until;

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &target);
        } else {
            fs::copy(&path, &target).unwrap();
        }
    }
}

/// Every file below a folder.
fn count(folder: &Path) -> usize {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| if path.is_dir() { count(&path) } else { 1 }).sum()
}

#[test]
fn what_is_no_model_of_ones_own_is_not_replaced() {
    let place = Place::new();
    // Two folders deep, should any of it be deleted after all.
    fs::create_dir_all(place.path("deep/work")).unwrap();
    let work = place.path("deep/work");
    fs::write(work.join("thesis.txt"), "mine").unwrap();
    fs::create_dir(work.join("photos")).unwrap();
    fs::write(work.join("photos/me.jpg"), "mine").unwrap();
    copy(&fixtures::path("tiny-dev"), &work.join("models/base"));
    // A folder with a model beside it is no excuse.
    fs::write(work.join("models/model_index.json"), "{}").unwrap();
    fs::write(work.join("model_index.json"), "{}").unwrap();
    fs::create_dir(work.join("x.safetensors")).unwrap();
    let before = count(&work);
    let (base, lora) = (work.join("models/base").display().to_string(), fixtures::lora("kohya"));
    for (out, part) in [
        (".", "current folder or one that it is in"),
        ("../work", "current folder or one that it is in"),
        ("models/base", "the base or a folder that it is in"),
        ("models/../models/base/", "the base or a folder that it is in"),
        ("models", "the base or a folder that it is in"),
        ("models/base/out", "inside the base"),
        ("models/base/vae", "inside the base"),
        ("models/base/transformer/new.safetensors", "inside the base"),
        ("models/base/transformer/diffusion_pytorch_model.safetensors", "inside the base"),
        ("photos", "no model_index.json"),
        ("thesis.txt", "no model_index.json"),
        ("x.safetensors", "a folder"),
    ] {
        for force in [&["--force"][..], &[]] {
            let arguments = [&["lora", "merge", &base, &lora, out][..], force].concat();
            Ran::of(place.command(&arguments).current_dir(&work)).fails(2, &["out is ", part]);
            assert_eq!(count(&work), before, "{arguments:?}");
        }
    }
    let arguments = ["lora", "merge", &tiny(), &lora, "..", "--force"];
    Ran::of(place.command(&arguments).current_dir(&work)).fails(2, &["current folder or one that it is in"]);
    assert_eq!(fs::read(work.join("thesis.txt")).unwrap(), b"mine");
}

#[test]
fn a_model_is_replaced_whole_if_that_is_meant() {
    let place = Place::new();
    let merge = |more: &[&str]| place.run(&[&["lora", "merge", &tiny(), &fixtures::lora("kohya"), "merged"], more].concat());
    merge(&[]).succeeds();
    fs::write(place.path("merged/notes.txt"), "of the old one").unwrap();
    merge(&[]).fails(1, &["--force"]);
    assert!(place.path("merged/notes.txt").exists());
    fs::copy(fixtures::lora("kohya"), place.path("merged/me.safetensors")).unwrap();
    place.run(&["lora", "merge", &tiny(), "merged/me.safetensors", "merged", "--force"]).fails(2, &["holds a LoRA"]);
    assert!(place.path("merged/me.safetensors").exists());
    merge(&["--force"]).succeeds();
    assert_eq!(count(&place.path("merged")), count(&fixtures::path("tiny-dev")));
    assert_eq!(place.files(), ["merged"]);
}

#[test]
fn an_output_that_was_forgotten_is_not_a_lora() {
    let place = Place::new();
    for (name, to) in [("kohya", "a.safetensors"), ("bfl", "b.safetensors")] {
        fs::copy(fixtures::lora(name), place.path(to)).unwrap();
    }
    let merge = |arguments: &[&str]| place.run(&[&["lora", "merge", &tiny()], arguments].concat());
    merge(&["a.safetensors@0.5", "b.safetensors@0.5"]).fails(2, &["out is b.safetensors@0.5", "its scale", "what to write last"]);
    for more in [&["--force"][..], &[]] {
        let arguments = [&["a.safetensors", "b.safetensors"][..], more].concat();
        merge(&arguments).fails(2, &["out is b.safetensors", "perhaps a LoRA", "what to write last"]);
    }
    assert!(fs::read(place.path("b.safetensors")).unwrap() == fs::read(fixtures::lora("bfl")).unwrap());
    // What a merge wrote it may write again.
    merge(&["a.safetensors", "c.safetensors"]).succeeds();
    merge(&["b.safetensors", "c.safetensors", "--force"]).succeeds();
    assert_eq!(place.files(), ["a.safetensors", "b.safetensors", "c.safetensors"]);
}

/// `lora convert` to this name if it begins so, else `lora merge`.
fn work(place: &Place, out: &str, told: &mut dyn FnMut(Stage) -> ControlFlow<()>) -> Result<(), Box<Error>> {
    let config = Config::from_environment();
    let (reference, force) = (fixtures::lora("kohya"), false);
    if out.starts_with("convert") {
        let order = ConvertOrder { reference, out: place.path(out), format: Format::Comfy, precision: None, force };
        return lora::convert(&order, &config, told).map(drop).map_err(Box::new);
    }
    let loras = lora::parse(&[reference], None, None).map_err(Box::new)?;
    lora::merge(&MergeOrder { base: tiny(), loras, out: place.path(out), force }, &config, told).map(drop).map_err(Box::new)
}

#[test]
fn whatever_is_stopped_leaves_nothing() {
    let place = Place::new();
    for out in ["merged", "merged.safetensors", "converted.safetensors"] {
        let mut told = Vec::new();
        let done = work(&place, out, &mut |stage| {
            told.push(stage);
            ControlFlow::Continue(())
        });
        done.unwrap();
        assert!(told.len() > 10 && told.last() == Some(&Stage::Finishing), "{out}: {told:?}");
        let path = place.path(out);
        if path.is_dir() {
            fs::remove_dir_all(&path).unwrap();
        } else {
            fs::remove_file(&path).unwrap();
        }
        for stop in [0, told.len() / 2, told.len() - 1] {
            let mut heard = 0;
            let stopped = work(&place, out, &mut |_| {
                heard += 1;
                if heard > stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            assert!(stopped.unwrap_err().is_cancelled(), "{out} at {stop}");
            assert_eq!(place.files(), [""; 0], "{out} at {stop}");
        }
    }
}

/// Through the real signal: the archive comes slowly.
#[test]
#[cfg(unix)]
fn ctrl_c_in_the_middle_of_an_archive_leaves_nothing() {
    let place = Place::new();
    let pipe = place.path("slow.tar");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let mut command = place.command(&["lora", "extract", "slow.tar", "me.safetensors"]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    // This waits for its reader.
    let mut archive = File::options().write(true).open(&pipe).unwrap();
    let mut header = tar::Header::new_gnu();
    header.set_path("lora.safetensors").unwrap();
    header.set_size(1 << 30);
    header.set_mode(0o644);
    header.set_cksum();
    archive.write_all(header.as_bytes()).unwrap();
    until("it begins", 60, || place.files().iter().any(|name| name.ends_with(".part")));
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    until("it ends", 60, || archive.write_all(&[0; 512]).is_err());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(place.files(), ["slow.tar"]);
}
