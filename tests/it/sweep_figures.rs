//! What `darkroom sweep` says of its pictures: comparisons, advice, people and prompts.

use std::fs;
use std::path::{Path, PathBuf};

use crate::cli::Place;
use crate::fixtures;
use crate::sweep::rows;

fn run_of(place: &Place, folder: &str, more: &[&str]) -> PathBuf {
    let model = fixtures::tiny();
    let mut all = vec!["sweep", "a cat", "--model", &model, "--width", "32", "--height", "32", "-q", "-o", folder];
    all.extend(more);
    place.run(&all).succeeds();
    place.path(folder)
}

#[test]
fn two_runs_are_compared_seed_by_seed() {
    let place = Place::new();
    run_of(&place, "one", &["--steps", "1,3", "--guidance", "1", "--seeds", "6"]);
    run_of(&place, "two", &["--steps", "1,3", "--guidance", "50", "--seeds", "5"]);
    let json = place.run(&["sweep", "compare", "one", "two", "--json"]).succeeds().json();
    assert_eq!((json["pairs"].as_u64(), json["seeds"].as_u64()), (Some(10), Some(5)));
    assert_eq!(json["differs"], serde_json::json!([["guidance", "1.0", "50.0"]]));
    let figures = json["figures"].as_array().unwrap();
    let named = |name: &str| figures.iter().find(|figure| figure["name"] == name).unwrap();
    // The mean over seeds of the means over steps, and differences of the same seeds.
    for name in ["sharpness", "denoise_s"] {
        let mean = |run: &str| {
            let rows = rows(&place.path(run));
            let of_pairs: Vec<f64> =
                rows.iter().filter(|row| row["seed"].as_u64() < Some(6)).map(|row| row[name].as_f64().unwrap()).collect();
            of_pairs.iter().sum::<f64>() / of_pairs.len() as f64
        };
        let figure = named(name);
        let close = |key: &str, expected: f64| {
            let value = figure[key].as_f64().unwrap();
            assert!((value - expected).abs() <= 1e-9 * expected.abs().max(1e-3), "{name} {key}: {value}, not {expected}");
        };
        close("a", mean("one"));
        close("b", mean("two"));
        close("mean", mean("two") - mean("one"));
        assert_eq!(figure["n"], 5);
    }
    // Two LoRAs over the same scales: paired by the scale as it was given.
    let (one, two) = (fixtures::lora("diffusers"), fixtures::lora("kohya"));
    let scales = ["--steps", "1", "--lora-scale", "0.5,1", "--seeds", "2"];
    run_of(&place, "l1", &[&["--lora", &one, "--trigger-word", "user1"][..], &scales].concat());
    run_of(&place, "l2", &[&["--lora", &two, "--trigger-word", "user2"][..], &scales].concat());
    let ran = place.run(&["sweep", "compare", "l1", "l2", "--json"]).succeeds().json();
    assert_eq!((ran["pairs"].as_u64(), ran["few"].as_bool()), (Some(4), Some(true)));
    let differs: Vec<_> = ran["differs"].as_array().unwrap().iter().map(|row| row[0].as_str().unwrap()).collect();
    assert_eq!(differs, ["loras", "prompt"]);
    let text = place.run(&["sweep", "compare", "one", "two"]).succeeds().out();
    assert!(text.contains("guidance: 1.0 in A, 50.0 in B") && text.contains("10 pairs of pictures, 5 seeds"), "{text}");
    let same = place.run(&["sweep", "compare", "one", "one", "--json"]).succeeds().json();
    let figures = same["figures"].as_array().unwrap();
    assert!(figures.iter().all(|figure| figure["verdict"] == "no difference shown" && figure["mean"] == 0.));
    run_of(&place, "three", &["--steps", "1,3", "--seed", "99"]);
    place.run(&["sweep", "compare", "one", "three"]).fails(1, &["same seeds"]);
}

#[test]
fn the_cheapest_setting_that_is_good_enough_is_recommended() {
    let place = Place::new();
    run_of(&place, "run", &["--steps", "1,2,8,16", "--guidance", "2", "--seeds", "4"]);
    let json = place.run(&["sweep", "recommend", "run", "--json"]).succeeds().json();
    assert_eq!(json["metric"], "ssim");
    let settings = json["settings"].as_array().unwrap();
    assert_eq!(settings.len(), 3, "the most steps are what is compared with");
    let best = settings.iter().max_by(|a, b| a["mean"].as_f64().unwrap().total_cmp(&b["mean"].as_f64().unwrap())).unwrap();
    assert!(best["against_best"].is_null());
    assert_eq!(settings.iter().filter(|setting| setting["recommended"] == true).count(), 1);
    assert!(json["said"].as_str().unwrap().contains("4 seeds, which is few"), "{json}");
    // Any loss allowed: the cheapest.
    let json = place.run(&["sweep", "recommend", "run", "--margin", "2", "--json"]).succeeds().json();
    assert_eq!(json["settings"][0]["recommended"], true);
    let text = place.run(&["sweep", "recommend", "run", "--metric", "latent_distance"]).succeeds().out();
    assert!(text.starts_with("Use steps ") && text.contains("<-"), "{text}");
    place.run(&["sweep", "recommend", "run", "--metric", "beauty"]).fails(2, &["beauty", "ssim"]);
    place.run(&["sweep", "recommend", "run", "--metric", "sharpness"]).fails(2, &["sharpness"]);
    place.run(&["sweep", "recommend", "run", "--margin", "-1"]).fails(2, &["margin"]);
    run_of(&place, "flat", &["--steps", "2", "--seeds", "2"]);
    place.run(&["sweep", "recommend", "flat"]).fails(2, &["metric"]);
}

#[test]
fn people_and_prompts_are_measured_where_there_is_a_model_for_it() {
    let place = Place::new();
    let clip = fixtures::path("sweep/clip").display().to_string();
    run_of(&place, "run", &["--steps", "1,2", "--judge", &clip]);
    assert!(rows(&place.path("run")).iter().all(|row| row["clip_score"].as_f64().is_some() && row.get("identity").is_none()));
    // The pictures themselves as references: each is most like its own.
    let pictures = fs::read_dir(place.path("run/pictures")).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    for (name, picture) in ["one", "two"].iter().zip(&pictures) {
        fs::create_dir(place.path(name)).unwrap();
        fs::copy(picture, place.path(name).join("me.PNG")).unwrap();
    }
    place.run(&["sweep", "report", "run", "--judge", &clip, "--identity", "one", "--others", "two"]).succeeds();
    for row in rows(&place.path("run")) {
        let is_one = pictures[0].ends_with(row["picture"].as_str().unwrap().trim_start_matches("pictures/"));
        let (own, other) = if is_one { ("identity", "leakage") } else { ("leakage", "identity") };
        assert!((row[own].as_f64().unwrap() - 1.).abs() < 1e-6 && row[other].as_f64().unwrap() < 1., "{row}");
    }
    // A later report keeps the references.
    let json = place.run(&["sweep", "recommend", "run", "--metric", "identity", "--json"]).succeeds().json();
    assert_eq!(json["metric"], "identity");
    fs::create_dir(place.path("empty")).unwrap();
    place.run(&["sweep", "report", "run", "--identity", "empty"]).fails(2, &["identity", ".png, .jpg or .webp"]);
    place.run(&["sweep", "report", "run", "--judge", "nothing"]).fails(2, &["judge", "clip-vit-l14"]);
    place.run(&["generate", "a cat", "--model", "clip-vit-l14"]).fails(2, &["makes none"]);
}

#[test]
fn portraits_are_read_by_pockets_own_probe() {
    let place = Place::new();
    for (name, picture) in [("one", "0.png"), ("two", "1.png")] {
        fs::create_dir(place.path(name)).unwrap();
        let drawn = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/pocket/reference").join(picture);
        fs::copy(drawn, place.path(name).join(picture)).unwrap();
    }
    let more = ["--steps", "4", "--identity", "one", "--others", "two", "-q", "-o", "run"];
    place.run(&[&["sweep", "portrait of a person with red hair, green shirt", "a lighthouse"][..], &more].concat()).succeeds();
    let rows = rows(&place.path("run"));
    // Of two things that are asked for none, one or both are there; a lighthouse asks for nothing that it knows.
    let adherence = rows[0]["adherence"].as_f64().unwrap();
    assert!([0., 0.5, 1.].contains(&adherence), "{adherence}");
    assert!(rows[1]["adherence"].is_null());
    for row in &rows {
        for name in ["identity", "leakage"] {
            let likeness = row[name].as_f64().unwrap();
            assert!(likeness > 0. && likeness < 1., "{name} {likeness}");
        }
    }
    // The probe was made for squares.
    place.run(&["sweep", "red hair", "--width", "144", "--height", "112", "--steps", "1", "-q", "-o", "wide"]).succeeds();
    let text = fs::read_to_string(place.path("wide/results.jsonl")).unwrap();
    assert!(!text.contains("adherence"), "{text}");
}
