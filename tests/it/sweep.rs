//! `darkroom sweep` through the real binary.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};

use crate::cli::{Place, Ran};
use crate::fixtures::{self, lora, tiny};
use crate::service::until;

/// The tiny model at 32 x 32, quietly, into the folder `run`.
fn arguments<'a>(model: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut all = vec!["sweep", "a cat", "--model", model, "--width", "32", "--height", "32", "-q", "-o", "run"];
    all.extend(more);
    all
}

fn sweep(place: &Place, more: &[&str]) -> Ran {
    let model = tiny();
    place.run(&arguments(&model, more))
}

pub(crate) fn rows(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("results.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

pub(crate) fn names(folder: &Path) -> BTreeSet<String> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn modified(folder: &Path) -> BTreeMap<String, std::time::SystemTime> {
    let time = |name: String| (name.clone(), fs::metadata(folder.join(name)).unwrap().modified().unwrap());
    names(folder).into_iter().map(time).collect()
}

#[test]
fn a_grid_becomes_a_folder_that_can_be_read() {
    let place = Place::new();
    let json = sweep(&place, &["--guidance", "1:3:1", "--steps", "1,2", "--seeds", "2", "--json"]).succeeds().json();
    assert_eq!((json["made"].as_u64(), json["kept"].as_u64(), json["rows"].as_u64()), (Some(12), Some(0), Some(12)));
    let run = place.path("run");
    let expected = [
        ".lock",
        "environment.json",
        "latents",
        "ledger.jsonl",
        "manifest.json",
        "pictures",
        "plots",
        "references.json",
        "report.html",
        "results.csv",
        "results.jsonl",
        "sheets",
    ];
    assert_eq!(names(&run), expected.map(str::to_owned).into());
    let environment: Value = serde_json::from_slice(&fs::read(run.join("environment.json")).unwrap()).unwrap();
    assert_eq!((&environment["device"], &environment["kernels"]), (&json!("cpu"), &json!("plain")));
    let rows = rows(&run);
    // The grid's order: guidance, then steps, then the seed.
    let place_of =
        |row: &Value| (row["guidance"].as_f64().unwrap(), row["steps"].as_u64().unwrap(), row["seed"].as_u64().unwrap());
    let all: Vec<_> = [1., 2., 3.].into_iter().flat_map(|g| [1, 2].map(|s| [1, 2].map(|seed| (g, s, seed)))).flatten().collect();
    assert_eq!(rows.iter().map(place_of).collect::<Vec<_>>(), all);
    assert_eq!(names(&run.join("sheets")).len(), 2, "one for each seed");
    // Compared with the most steps, which have nothing to be compared with.
    for row in &rows {
        let compared = row["ssim"].as_f64();
        assert_eq!(compared.is_none(), row["steps"] == 2, "{row}");
        assert_eq!(row["latent_distance"].as_f64().is_none(), row["steps"] == 2);
        assert!(row["sharpness"].as_f64().is_some() && row["adherence"].is_null() && row.get("identity").is_none());
        assert!(row["denoise_s"].as_f64().unwrap() > 0. && row["peak_memory_bytes"].as_u64().unwrap() > 1_000_000);
    }
    let csv = fs::read_to_string(run.join("results.csv")).unwrap();
    assert_eq!(csv.lines().count(), 13);
}

/// What programs rely on. A change here is a change for everyone who reads results.
#[test]
fn the_columns_are_these() {
    let place = Place::new();
    sweep(&place, &["--steps", "1,2", "--bench", "2"]).succeeds();
    let csv = fs::read_to_string(place.path("run/results.csv")).unwrap();
    let expected = "id,picture,model,model_sha256,dtype,device,prompt,prompt_read,negative_prompt,width,height,steps,guidance,true_cfg,\
                    strength,seed,noise,lora,lora_scale,trigger_policy,loras,lora_mode,image,mask,switch_s,encode_s,denoise_s,decode_s,total_s,\
                    denoise_spread,denoise_s_of_repeats,peak_memory_bytes,peak_device_bytes,ssim,pixel_distance,latent_distance,sharpness,saturation,\
                    clipped,made,notes,command";
    assert_eq!(csv.lines().next(), Some(expected));
    let first: Value = rows(&place.path("run")).remove(0);
    let times: Vec<f64> = first["denoise_s_of_repeats"].as_array().unwrap().iter().map(|time| time.as_f64().unwrap()).collect();
    assert_eq!(times.len(), 2, "--bench 2");
    let median = f64::midpoint(times[0], times[1]);
    assert!((first["denoise_s"].as_f64().unwrap() - median).abs() < 1e-9);
    assert!((first["denoise_spread"].as_f64().unwrap() - (times[0] - times[1]).abs() / median).abs() < 1e-9);
    // JSON's reader sorts; the text does not.
    let text = fs::read_to_string(place.path("run/results.jsonl")).unwrap();
    let positions: Vec<_> = expected.split(',').map(|name| text.find(&format!("\"{name}\":")).expect(name)).collect();
    assert!(positions.is_sorted());
}

#[test]
fn every_command_makes_its_picture_again_byte_for_byte() {
    let place = Place::new();
    let lora = format!("{}@0.5", lora("diffusers"));
    let mut more = vec!["--lora", "none", "--lora", &lora, "--lora-scale", "0.5,1", "--steps", "2", "--trigger-word", "it's me"];
    // What begins with a dash is no flag, and what is said of LoRAs is not said of the base alone.
    more.extend(["--true-cfg", "2", "--negative-prompt=-hat", "--lora-text-scale=-0.5", "--prompts", "prompts.txt"]);
    fs::write(place.path("prompts.txt"), "-blue hair\n").unwrap();
    sweep(&place, &more).succeeds();
    let mut rows = rows(&place.path("run"));
    assert_eq!(rows.len(), 8, "two prompts");
    rows.retain(|row| row["prompt"] == "-blue hair");
    assert_eq!(rows[0]["id"], rows[1]["id"], "the base alone is one picture, whatever the scale");
    let mut seen = BTreeSet::new();
    for row in &rows {
        let command = row["command"].as_str().unwrap();
        let words = shlex::split(command).unwrap();
        let mut words: Vec<&str> = words.iter().map(String::as_str).collect();
        assert_eq!(words.remove(0), "darkroom");
        let end = words.iter().position(|word| *word == "--").unwrap();
        words.splice(end..end, ["-o", "again.png", "--force", "-q"]);
        place.run(&words).succeeds();
        let made = fs::read(place.path("run").join(row["picture"].as_str().unwrap())).unwrap();
        assert!(made == fs::read(place.path("again.png")).unwrap(), "{command}");
        seen.insert(row["id"].as_str().unwrap().to_owned());
    }
    assert_eq!(seen.len(), 3);
    assert_eq!(names(&place.path("run/pictures")).len(), 6);
}

#[test]
fn what_is_there_is_not_made_again_and_more_values_are_added() {
    let place = Place::new();
    let counts = |ran: Ran| {
        let json = ran.succeeds().json();
        (json["made"].as_u64().unwrap(), json["kept"].as_u64().unwrap(), json["rows"].as_u64().unwrap())
    };
    assert_eq!(counts(sweep(&place, &["--guidance", "1,2", "--steps", "2", "--json"])), (2, 0, 2));
    let pictures = place.path("run/pictures");
    let before = modified(&pictures);
    assert_eq!(counts(sweep(&place, &["--guidance", "1,2", "--steps", "2", "--json"])), (0, 2, 2));
    assert_eq!(counts(sweep(&place, &["--guidance", "1,2,4", "--steps", "2", "--json"])), (1, 2, 3));
    let after = modified(&pictures);
    assert!(before.iter().all(|(name, time)| after[name] == *time), "not written again");
    // A smaller grid shows less and loses nothing.
    assert_eq!(counts(sweep(&place, &["--guidance", "4", "--steps", "2", "--json"])), (0, 1, 1));
    assert_eq!(names(&pictures).len(), 3);
    // Another model is other pictures.
    let schnell = fixtures::path("tiny-schnell").display().to_string();
    let json = place.run(&arguments(&schnell, &["--guidance", "1,2", "--steps", "2", "--json"])).succeeds().json();
    assert_eq!(json["made"], 1, "it has no guidance: both cells are one picture");
    assert!(json["remarks"].to_string().contains("no guidance embedding"), "{json}");
}

/// Whatever else decides a model's pictures is part of their names, and times that were asked for are taken.
#[test]
fn another_schedule_and_more_repeats_are_made_anew() {
    let place = Place::new();
    let model = place.path("model");
    let copy = std::process::Command::new("cp").arg("-r").arg(fixtures::path("tiny-dev")).arg(&model).status().unwrap();
    assert!(copy.success());
    let model = model.display().to_string();
    let made = |more: &[&str]| {
        let json = place.run(&arguments(&model, &[&["--steps", "4", "--json"], more].concat())).succeeds().json();
        (json["made"].as_u64().unwrap(), json["kept"].as_u64().unwrap())
    };
    assert_eq!(made(&[]), (1, 0));
    assert_eq!(made(&["--bench", "2"]), (1, 0), "it was not timed twice");
    assert_eq!(made(&["--bench", "2"]), (0, 1));
    assert_eq!(made(&[]), (0, 1));
    let path = place.path("model/scheduler/scheduler_config.json");
    let text = fs::read_to_string(&path).unwrap();
    let changed = text.replace("\"use_dynamic_shifting\": true", "\"use_dynamic_shifting\": false");
    assert!(changed != text, "{text}");
    fs::write(&path, changed).unwrap();
    assert_eq!(made(&[]), (1, 0), "another schedule");
}

#[test]
fn a_run_that_is_refused_changes_nothing_of_the_one_before() {
    let place = Place::new();
    sweep(&place, &["--steps", "1,2"]).succeeds();
    let manifest = fs::read(place.path("run/manifest.json")).unwrap();
    let model = tiny();
    let long = [
        "sweep", "a cat", "--model", &model, "--width", "256", "--height", "256", "--steps", "900:1000", "--seeds", "9", "-q",
        "-o", "run",
    ];
    place.run(&long).fails(2, &["pictures to make", "--yes"]);
    assert!(fs::read(place.path("run/manifest.json")).unwrap() == manifest);
}

/// Figures of a part are not figures of something else.
#[test]
fn what_is_missing_is_not_compared_with() {
    let place = Place::new();
    sweep(&place, &["--steps", "1,2,4", "--seeds", "2"]).succeeds();
    let run = place.path("run");
    let before = rows(&run);
    let of = |rows: &[Value], steps: u64, seed: u64| {
        rows.iter().find(|row| row["steps"] == steps && row["seed"] == seed).map(|row| row["ssim"].as_f64())
    };
    let most = before.iter().find(|row| row["steps"] == 4 && row["seed"] == 1).unwrap();
    fs::remove_file(run.join(most["picture"].as_str().unwrap())).unwrap();
    place.run(&["sweep", "report", "run"]).succeeds();
    let after = rows(&run);
    assert_eq!(after.len(), 5);
    assert_eq!((of(&after, 1, 1), of(&after, 2, 1)), (Some(None), Some(None)), "not with fewer steps instead");
    assert_eq!(of(&after, 1, 2), of(&before, 1, 2));
}

#[test]
fn a_damaged_picture_is_named_and_made_again() {
    let place = Place::new();
    let more = ["--steps", "1", "--seeds", "2"];
    sweep(&place, &more).succeeds();
    let name = names(&place.path("run/pictures")).pop_first().unwrap();
    let path = place.path("run/pictures").join(&name);
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    place.run(&["sweep", "report", "run"]).fails(1, &[&format!("run/pictures/{name}"), "makes it again"]);
    let json = sweep(&place, &[&more[..], &["--json"]].concat()).succeeds().json();
    assert_eq!((&json["made"], &json["kept"], &json["rows"]), (&json!(1), &json!(1), &json!(2)));
    assert!(fs::read(&path).unwrap() == whole);
}

/// Killed at any moment and started again, until it is done: the same pictures, each once, each whole.
#[test]
#[cfg(unix)]
fn a_killed_sweep_goes_on() {
    let place = Place::new();
    let more = ["--guidance", "1:4:1", "--steps", "1,2", "--seeds", "4"];
    let model = tiny();
    let mut kills = 0;
    loop {
        let mut child = place.command(&arguments(&model, &more)).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // Moments that drift over the whole of a run: loading, making, writing, reporting.
        std::thread::sleep(Duration::from_millis(40 + 37 * kills));
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success());
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
        assert!(kills < 200, "it never ends");
    }
    assert!(kills > 3, "killed {kills} times");
    let killed = place.path("run");
    let other = Place::new();
    sweep(&other, &more).succeeds();
    let whole = other.path("run");
    let content = |run: &Path| -> BTreeMap<String, Vec<u8>> {
        names(&run.join("pictures"))
            .into_iter()
            .map(|name| (name.clone(), fs::read(run.join("pictures").join(name)).unwrap()))
            .collect()
    };
    assert!(content(&killed) == content(&whole), "the same pictures as without a kill");
    let ids = |run: &Path| rows(run).iter().map(|row| row["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>();
    assert_eq!(ids(&killed), ids(&whole));
    let ledger = fs::read_to_string(killed.join("ledger.jsonl")).unwrap();
    let keys: BTreeSet<_> = ledger.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["key"].to_string()).collect();
    assert_eq!((ledger.lines().count(), keys.len()), (32, 32), "no picture was made twice once it was in the ledger");
    let left: Vec<_> =
        names(&killed).into_iter().chain(names(&killed.join("latents"))).filter(|name| name.contains(".part")).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
#[cfg(unix)]
fn ctrl_c_stops_it_and_keeps_what_is_done() {
    let place = Place::new();
    let model = tiny();
    let more = ["--guidance", "1:90:1", "--steps", "10"];
    let child = place.command(&arguments(&model, &more)).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let ledger = place.path("run/ledger.jsonl");
    until("two pictures are made", 60, || fs::read_to_string(&ledger).unwrap_or_default().lines().count() >= 2);
    std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stderr).contains("goes on with it"));
    let done = fs::read_to_string(&ledger).unwrap().lines().count();
    assert!((2..90).contains(&done), "{done}");
    // What is there can be looked at.
    let shown = place.run(&["sweep", "report", "run"]).succeeds();
    assert!(shown.out().trim().ends_with("report.html"));
    assert_eq!(rows(&place.path("run")).len(), done);
    assert!(fs::read_to_string(place.path("run/report.html")).unwrap().contains(&format!("{done} of 90 pictures are made")));
}

#[test]
fn a_file_says_what_flags_say_and_flags_count_more() {
    let place = Place::new();
    let model = tiny();
    fs::create_dir(place.path("set")).unwrap();
    fs::write(place.path("set/prompts.txt"), "\u{feff}a cat\n\n a dog \n").unwrap();
    fs::copy(lora("diffusers"), place.path("set/me.safetensors")).unwrap();
    let text = format!(
        "lora = \"me.safetensors@0.5\"\nmodel = {model:?}\nprompts = \"prompts.txt\"\nguidance = [1, 2.5]\nsteps = \"1:2\"\nwidth = 32\nheight = 32\n\
         seeds = 3\nzip = \"guidance,steps\"\nnegative-prompt = \"dogs\"\ntrue-cfg = 2\nnoise = \"cuda\"\n"
    );
    fs::write(place.path("set/sweep.toml"), &text).unwrap();
    place.run(&["sweep", "--file", "set/sweep.toml", "--seed", "9", "-q", "-o", "run"]).succeeds();
    let rows = rows(&place.path("run"));
    let facts = |row: &Value| {
        let text = |name: &str| row[name].to_string();
        ["prompt", "guidance", "steps", "seed", "negative_prompt", "true_cfg", "noise"].map(text).join(" ")
    };
    assert_eq!(
        rows.iter().map(facts).collect::<Vec<_>>(),
        [
            r#""a cat" 1.0 1 9 "dogs" 2.0 "cuda""#,
            r#""a cat" 2.5 2 9 "dogs" 2.0 "cuda""#,
            r#""a dog" 1.0 1 9 "dogs" 2.0 "cuda""#,
            r#""a dog" 2.5 2 9 "dogs" 2.0 "cuda""#,
        ]
    );
    let fails = |text: &str, words: &[&str]| {
        fs::write(place.path("bad.toml"), text).unwrap();
        place.run(&["sweep", "a cat", "--file", "bad.toml", "-o", "bad"]).fails(2, words);
        assert!(!place.path("bad").exists());
    };
    fails("guidence = 1\n", &["bad.toml", "guidence"]);
    fails("noise = \"blue\"\n", &["cpu or cuda"]);
    fails("steps = true\n", &["steps", "list"]);
    fails("steps = [1\n", &["bad.toml"]);
    place.run(&["sweep", "--file", "no.toml"]).fails(1, &["no.toml"]);
}

#[test]
fn models_and_number_formats_are_axes_too() {
    let place = Place::new();
    let schnell = fixtures::path("tiny-schnell").display().to_string();
    sweep(&place, &["--model", &schnell, "--dtype", "f32,bf16", "--steps", "1", "--seeds", "2"]).succeeds();
    let rows = rows(&place.path("run"));
    let facts =
        |row: &Value| format!("{} {}", row["model"].as_str().unwrap().ends_with("schnell"), row["dtype"].as_str().unwrap());
    let expected = ["false f32", "false f32", "false bf16", "false bf16", "true f32", "true f32", "true bf16", "true bf16"];
    assert_eq!(rows.iter().map(facts).collect::<Vec<_>>(), expected);
    let pixels = |row: &Value| fs::read(place.path("run").join(row["picture"].as_str().unwrap())).unwrap();
    assert!(pixels(&rows[0]) != pixels(&rows[2]), "another number format is another picture");
}

#[test]
fn wrong_sweeps_are_refused_before_anything_is_written() {
    let place = Place::new();
    let fails = |more: &[&str], words: &[&str]| {
        sweep(&place, more).fails(2, words);
        assert!(!place.path("run").exists() || names(&place.path("run/pictures")).is_empty(), "{more:?}");
    };
    fails(&["--guidance", "5:1:0.5"], &["guidance", "leads from first to last"]);
    fails(&["--guidance", "1:5:0"], &["step other than 0"]);
    fails(&["--steps", "0"], &["steps", "from 1 to 1000"]);
    fails(&["--steps", "4,4"], &["steps", "4 twice"]);
    fails(&["--steps", "2.5"], &["whole numbers"]);
    fails(&["--guidance", "NaN"], &["guidance"]);
    fails(&["--guidance", "101"], &["guidance", "from 0 to 100"]);
    fails(&["--steps", "1", "--width", "100"], &["--width"]);
    fails(&["--seeds", "0"], &["seeds", "at least 1"]);
    fails(&["--seeds", "2", "--seed", "3"], &["seeds", "which ones"]);
    fails(&["--lora-scale", "0.5"], &["lora-scale", "without lora"]);
    fails(&["--strength", "0.5"], &["prompt-strength", "image"]);
    fails(&["--dtype", "int4"], &["dtype", "bf16"]);
    fails(&["--zip", "steps,guidance"], &["zip", "no values"]);
    fails(&["--zip", "stepps,guidance"], &["zip", "names of axes"]);
    fails(&["--rows", "seed", "--columns", "seed"], &["two different axes"]);
    fails(&["--rows", "lora"], &["rows"]);
    fails(&["--identity", "nowhere"], &["identity", "a folder of pictures"]);
    fails(&["--steps", "1:1000", "--guidance", "0:99.9:0.1", "--seeds", "2", "--yes"], &["2000000 cells", "several runs"]);
    fails(&["--steps", "1:100", "--guidance", "0:99.9:0.1", "--seeds", "10"], &["1000000 pictures", "--yes"]);
    let lora = format!("{}@nan", lora("diffusers"));
    fails(&["--lora", &lora], &["finite scale"]);
    sweep(&place, &["--lora", "no.safetensors"]).fails(1, &["no.safetensors"]);
    place.run(&["sweep"]).fails(2, &["prompt"]);
    fs::create_dir(place.path("closed")).unwrap();
    fs::set_permissions(place.path("closed"), std::os::unix::fs::PermissionsExt::from_mode(0o555)).unwrap();
    // A superuser may write everywhere.
    if fs::write(place.path("closed/try"), "").is_err() {
        place.run(&["sweep", "a cat", "-o", "closed"]).fails(1, &["closed", "cannot be written to"]);
        place.run(&["sweep", "a cat", "-o", "closed/run"]).fails(1, &["closed", "cannot be written to"]);
    }
    place.run(&["sweep", "report", "nowhere"]).fails(1, &["holds no sweep"]);
    place.run(&["sweep", "a cat", "-o", "no/run"]).fails(1, &["mkdir -p"]);
    fs::create_dir(place.path("mine")).unwrap();
    fs::write(place.path("mine/photo.jpg"), "mine").unwrap();
    place.run(&["sweep", "a cat", "-o", "mine"]).fails(1, &["not empty and holds no sweep"]);
    fs::write(place.path("mine/manifest.json"), r#"{"format": 7, "software": "darkroom 3.0.0"}"#).unwrap();
    place.run(&["sweep", "a cat", "-o", "mine"]).fails(1, &["darkroom 3.0.0", "format 7"]);
    assert_eq!(names(&place.path("mine")).len(), 2);
}
