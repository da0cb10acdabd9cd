//! `lora convert` and `lora merge`: the same change under other names, and inside the base's own files.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use candle_core::DType;
use darkroom::engine::{Adapter, LoraMode, Pipeline, Scales, Selected};
use models::weights::Component;

use crate::cli::{Place, Ran};
use crate::fixtures::{self, lora};

/// Every weight with the adapter at 0.7.
fn merged(pipeline: &Pipeline, path: &Path) -> BTreeMap<(Component, String), Vec<f32>> {
    let adapter = Arc::new(Adapter::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())));
    assert_eq!(adapter.report.unmatched_keys, [""; 0]);
    let mut patches = pipeline.patches();
    patches.apply(&[Selected { adapter, scales: Scales::uniform(0.7) }], LoraMode::Merge).unwrap();
    let values = |component, name: &str| {
        let (weight, _) = patches.parameter(component, name).unwrap().current().unwrap();
        weight.dense(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    patches.names().map(|(component, name)| ((component, name.to_owned()), values(component, name))).collect()
}

#[test]
fn the_same_change_under_every_programs_names() {
    let (place, pipeline) = (Place::new(), fixtures::pipeline("tiny-dev", DType::F32));
    let (mut said, mut unsaid) = (0, Vec::new());
    for name in [
        "diffusers",
        "kohya",
        "bfl",
        "peft",
        "xlabs",
        "alphas",
        "header",
        "norm_out",
        "norm_out_bfl",
        "text_encoders",
        "dora_in",
        "dora_out",
        "loha",
        "lokr",
        "diff",
    ] {
        let original = merged(&pipeline, Path::new(&lora(name)));
        for format in ["diffusers", "kohya", "comfy"] {
            let out = format!("{name}-{format}.safetensors");
            let ran = place.run(&["lora", "convert", &lora(name), &out, "--to", format]);
            if !ran.is_success() {
                assert!(ran.err().contains("cannot say") && !place.path(&out).exists(), "{}", ran.err());
                unsaid.push(format!("{name} {format}"));
                continue;
            }
            said += 1;
            let converted = merged(&pipeline, &place.path(&out));
            for (tensor, values) in &original {
                let largest = values.iter().fold(0f32, |max, v| max.max(v.abs()));
                let apart = values.iter().zip(&converted[tensor]).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
                assert!(apart <= 2e-6 * largest, "{out}: {tensor:?} differs by {apart}");
            }
        }
    }
    // diffusers reads low-rank changes of matrices only.
    let expected = ["dora_in diffusers", "dora_out diffusers", "loha diffusers", "lokr diffusers", "diff diffusers"];
    assert_eq!(unsaid, expected, "{said} were said");
}

#[test]
fn there_and_back_is_the_same_size_again() {
    let place = Place::new();
    let convert = |from: &str, to: &str, out: &str| place.run(&["lora", "convert", from, out, "--to", to]).succeeds();
    let ranks = |path: &str| place.run(&["lora", "inspect", path, "--json"]).succeeds().json()["ranks"].clone();
    convert(&lora("kohya"), "diffusers", "there.safetensors");
    convert("there.safetensors", "kohya", "back.safetensors");
    // Members that share their down are one module again.
    assert_eq!(ranks("back.safetensors"), ranks(&lora("kohya")));
    let report = place.run(&["lora", "inspect", "there.safetensors", "--json"]).succeeds().json();
    assert_eq!(report["naming"], serde_json::json!(["diffusers"]));
    let half = place.run(&["lora", "convert", &lora("kohya"), "half.safetensors", "--to", "comfy", "--dtype", "f16"]).succeeds();
    assert_eq!(half.out().trim(), "half.safetensors");
    let report = place.run(&["lora", "inspect", "half.safetensors", "--json"]).succeeds().json();
    assert!(
        report["dtypes"]["f16"].as_u64().unwrap() > 0 && report["prefix"] == serde_json::json!(["diffusion_model."]),
        "{report}"
    );

    place.run(&["lora", "convert", &lora("kohya"), "half.safetensors", "--to", "comfy"]).fails(1, &["--force"]);
    place.run(&["lora", "convert", &lora("kohya"), "x.safetensors", "--to", "a1111"]).fails(2, &["diffusers, kohya or comfy"]);
    place.run(&["lora", "convert", &lora("kohya"), "no/x.safetensors", "--to", "comfy"]).fails(1, &["mkdir"]);
    assert_eq!(place.files(), ["back.safetensors", "half.safetensors", "there.safetensors"]);
}

#[test]
fn a_merged_base_is_the_base_with_the_lora() {
    let place = Place::new();
    let tiny = fixtures::tiny();
    let (one, two) = (format!("{}@0.6", lora("text_encoders")), format!("{}@-0.3", lora("norm_out")));
    let ran = place.run(&["lora", "merge", &tiny, &one, &two, "merged", "--json"]).succeeds().json();
    assert!(ran["tensors_changed"].as_u64().unwrap() > 0);
    let picture = |out: &str, model: &str, more: &[&str]| {
        let size = ["--width", "32", "--height", "32", "--steps", "2", "--seed", "4", "--no-metadata", "-o", out];
        let arguments = [&["generate", "a cat", "--model", model][..], &size, more].concat();
        Ran::of(&mut place.command(&arguments)).succeeds();
        fs::read(place.path(out)).unwrap()
    };
    let with = picture("with.png", &tiny, &["--lora", &one, "--lora", &two]);
    assert_eq!(picture("merged.png", "merged", &[]), with);
    assert_ne!(picture("base.png", &tiny, &[]), with);

    // The file alone is the folder's transformer.
    let ran = place.run(&["lora", "merge", &tiny, &one, &two, "alone.safetensors"]).succeeds();
    assert!(ran.err().contains("text encoders are not in a file of the transformer"), "{}", ran.err());
    let inside = place.path("merged/transformer/diffusion_pytorch_model.safetensors");
    assert_eq!(fs::read(place.path("alone.safetensors")).unwrap(), fs::read(inside).unwrap());
    // What is not touched keeps its bytes: a LoRA at scale 0 gives the base's files.
    place.run(&["lora", "merge", &tiny, &format!("{}@0", lora("kohya")), "none"]).succeeds();
    for part in ["transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "model_index.json"] {
        let values = |folder: &Path| {
            let bytes = fs::read(folder.join(part)).unwrap();
            safetensors::SafeTensors::deserialize(&bytes).map_or(bytes.clone(), |file| {
                let mut names: Vec<_> = file.names().into_iter().map(str::to_owned).collect();
                names.sort();
                names.iter().flat_map(|name| file.tensor(name).unwrap().data().to_vec()).collect()
            })
        };
        assert_eq!(values(&place.path("none")), values(&fixtures::path("tiny-dev")), "{part}");
    }

    let before = place.files();
    place.run(&["lora", "merge", &tiny, &one, "merged"]).fails(1, &["--force"]);
    place.run(&["lora", "merge", &tiny, &one, "no/where"]).fails(1, &["mkdir"]);
    place.run(&["lora", "merge", "pocket", &lora("kohya"), "x.safetensors"]).fails(1, &["does not fit"]);
    place.run(&["lora", "merge", "pocket", &lora("kohya"), "folder"]).fails(2, &["ends in .safetensors"]);
    place.run(&["lora", "merge", &tiny, "only-two"]).fails(2, &["OUT"]);
    assert_eq!(place.files(), before);
}
