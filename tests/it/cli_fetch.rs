//! LoRAs from elsewhere, through the real binary.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::json;

use crate::cli::{Place, Ran};
use crate::fixtures::{lora, tiny, weights};
use crate::site::{Reply, Site};

/// Allowed to reach this machine, where the tests' sites are.
fn command(place: &Place, arguments: &[&str]) -> Command {
    let mut command = place.command(arguments);
    command.env("DARKROOM_PRIVATE_URLS", "1");
    command
}

fn blobs(place: &Place) -> Vec<PathBuf> {
    let folder = place.home().join("cache/darkroom/loras/blobs");
    fs::read_dir(folder).map_or_else(|_| Vec::new(), |entries| entries.map(|entry| entry.unwrap().path()).collect())
}

fn partial(place: &Place) -> Option<(PathBuf, u64)> {
    let entries = fs::read_dir(place.home().join("cache/darkroom/loras/partial")).ok()?;
    let mut files = entries.map(|entry| entry.unwrap().path()).filter(|path| path.extension().is_none());
    files.next().map(|path| (path.clone(), fs::metadata(path).map_or(0, |data| data.len())))
}

#[test]
fn a_picture_with_a_lora_of_the_hub() {
    let site = Site::serve(|request| match request.path.as_str() {
        "/api/models/me/mine/revision/main?blobs=true" => {
            Reply::json(&json!({"sha": "c0ffee", "siblings": [{"rfilename": "lora.safetensors"}]}))
        }
        "/me/mine/resolve/c0ffee/lora.safetensors" => Reply::new("200 OK", &[("ETag", "\"x\"")], &weights()),
        _ => Reply::new("404 Not Found", &[], b""),
    });
    let place = Place::new();
    let model = tiny();
    let generate = |out: &str, lora: &str| {
        let arguments =
            ["generate", "a cat", "--model", &model, "--width", "32", "--height", "32", "--steps", "2", "--seed", "3"];
        let more = ["--no-metadata", "--json", "-o", out, "--lora", lora];
        let ran = Ran::of(command(&place, &[&arguments[..], &more].concat()).env("HF_ENDPOINT", &site.address));
        ran.succeeds().json()
    };
    let report = generate("hub.png", "me/mine@0.5");
    assert_eq!(report["loras"][0]["reference"], "me/mine");
    generate("own.png", &format!("{}@0.5", lora("diffusers")));
    assert_eq!(fs::read(place.path("hub.png")).unwrap(), fs::read(place.path("own.png")).unwrap());
    assert_eq!((blobs(&place).len(), site.count("/me/mine/")), (1, 1));

    // A disk that has changed a byte of the weights, or lost the end of them, is noticed; the file is fetched again.
    let blob = blobs(&place).remove(0);
    for damage in [|bytes: &mut Vec<u8>| *bytes.last_mut().unwrap() ^= 1, |bytes: &mut Vec<u8>| bytes.truncate(bytes.len() / 2)] {
        let mut bytes = weights();
        damage(&mut bytes);
        fs::write(&blob, &bytes).unwrap();
        generate("again.png", "me/mine@0.5");
        assert_eq!(fs::read(place.path("again.png")).unwrap(), fs::read(place.path("own.png")).unwrap());
        assert_eq!(fs::read(&blob).unwrap(), weights());
        fs::remove_file(place.path("again.png")).unwrap();
    }
    assert_eq!(site.count("/me/mine/"), 3);
}

#[test]
fn a_killed_download_goes_on() {
    let first = AtomicUsize::new(0);
    let site = Site::serve(move |request| {
        let body = weights();
        match request.header("range").and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok()) {
            Some(start) => {
                let range = format!("bytes {start}-{}/{}", body.len() - 1, body.len());
                Reply::new("206 Partial Content", &[("Content-Range", &range), ("ETag", "\"x\"")], &body[start..])
            }
            None if first.fetch_add(1, Ordering::SeqCst) == 0 => {
                Reply::new("200 OK", &[("ETag", "\"x\"")], &body).slowly(body.len() / 100, Duration::from_millis(100))
            }
            None => Reply::new("200 OK", &[("ETag", "\"x\"")], &body),
        }
    });
    let place = Place::new();
    let link = site.url("/me.safetensors");
    let mut child = command(&place, &["lora", "inspect", &link]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let mut waited = 0;
    while partial(&place).is_none_or(|(_, length)| length < 1000) && waited < 3000 {
        std::thread::sleep(Duration::from_millis(10));
        waited += 1;
    }
    // SIGKILL.
    child.kill().unwrap();
    child.wait().unwrap();
    let (_, length) = partial(&place).expect("a part is there");
    assert!(length >= 1000 && length < weights().len() as u64 && blobs(&place).is_empty());
    let report = Ran::of(&mut command(&place, &["lora", "inspect", &link, "--json"])).succeeds().json();
    assert_eq!(report["bytes"], weights().len());
    let range = site.requests().last().unwrap().header("range").map(str::to_owned);
    assert!(range.is_some_and(|range| range.starts_with("bytes=")));
    assert!(partial(&place).is_none() && blobs(&place).len() == 1);
}

#[test]
fn refusals_name_the_place_without_its_secrets() {
    let site = Site::serve(|request| match request.path.as_str() {
        path if path.starts_with("/page") => Reply::new("200 OK", &[("Content-Type", "text/html")], b"<html>log in</html>"),
        // A safetensors file of something else is refused by its reader, and not kept either.
        path if path.starts_with("/foreign") => Reply::ok(&foreign()),
        _ => Reply::new("403 Forbidden", &[], b""),
    });
    let place = Place::new();
    for (path, part) in
        [("/private.safetensors", "wants permission"), ("/page", "gives a web page"), ("/foreign.safetensors", "not an adapter")]
    {
        let link = site.url(&format!("{path}?X-Amz-Signature=canary"));
        let ran = Ran::of(
            command(&place, &["generate", "a cat", "--lora", &link]).env("HF_TOKEN", "hf_canary").env("RUST_LOG", "trace"),
        );
        assert!(!ran.is_success() && ran.err().contains(part), "{}", ran.err());
        assert!(!ran.err().contains("canary"), "{}", ran.err());
        assert!(blobs(&place).is_empty() && partial(&place).is_none() && place.files().is_empty());
    }
    // Without the operator's word nothing on this machine is asked.
    let asked = site.requests().len();
    place.run(&["generate", "a cat", "--lora", &site.url("/me.safetensors")]).fails(1, &["not allowed", "DARKROOM_PRIVATE_URLS"]);
    assert_eq!(site.requests().len(), asked);
    let offline = Ran::of(command(&place, &["generate", "a cat", "--lora", "me/mine"]).env("HF_HUB_OFFLINE", "1"));
    offline.fails(1, &["me/mine", "HF_HUB_OFFLINE"]);
    place.run(&["generate", "a cat", "--lora", "ftp://x.example/a.safetensors"]).fails(1, &["give a file's path"]);
}

fn foreign() -> Vec<u8> {
    let header = br#"{"some.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.extend([0, 0, 128, 63]);
    bytes
}

/// Nothing but the cache is written to.
#[test]
fn the_cache_is_where_the_user_said() {
    let site = Site::serve(|_| Reply::ok(&weights()));
    let place = Place::new();
    let elsewhere = tempfile::tempdir().unwrap();
    let link = site.url("/me.safetensors");
    let mut inspect = command(&place, &["lora", "inspect", &link]);
    Ran::of(inspect.env("XDG_CACHE_HOME", elsewhere.path())).succeeds();
    assert!(elsewhere.path().join("darkroom/loras/blobs").is_dir() && !Path::new(&place.home().join("cache")).exists());
}
