//! The embedded model: the same latents as diffusers gives with the same folder, and pictures that obey the prompt.

use std::ops::ControlFlow;

use candle_core::{DType, Device};
use darkroom::engine::{Event, Job, LoraMode, NoiseKind, Pipeline};

use crate::fixtures::{Fixture, relative_l2};

const PROMPT: &str = "a portrait of a person with long red hair and glasses, smiling, wearing a blue shirt, yellow background";

#[test]
fn latents_equal_those_of_diffusers() {
    let pipeline = Pipeline::load(&models::pocket::bundle(), &Device::Cpu, DType::F32, &mut |_| {}).unwrap();
    assert_eq!(pipeline.traits().text_tokens, 64);
    let job = Job {
        prompt: PROMPT.into(),
        negative_prompt: String::new(),
        width: models::pocket::SIDE,
        height: models::pocket::SIDE,
        steps: 20,
        guidance: 3.,
        true_cfg: 1.,
        seed: 3,
        outputs: 2,
        noise: NoiseKind::Cpu,
        start: None,
        loras: Vec::new(),
        lora_mode: LoraMode::Auto,
        previews: None,
    };
    let finished = pipeline.run(&job, &mut |_| ControlFlow::Continue(())).unwrap();
    let error = relative_l2(&finished.latents, &Fixture::open("pocket/pocket.safetensors").get("latents"));
    println!("pocket: {error:.1e}");
    assert!(error <= 1e-3, "{error:e}");
    assert!(finished.truncated.is_empty());
}

/// How far apart two pictures are, mean of 255, at the size of the smaller one.
fn apart(small: &image::RgbImage, large: &image::RgbImage) -> f64 {
    let shrunk = image::imageops::resize(large, small.width(), small.height(), image::imageops::FilterType::Triangle);
    let sum: f64 = small.as_raw().iter().zip(shrunk.as_raw()).map(|(a, b)| f64::from(a.abs_diff(*b))).sum();
    sum / small.as_raw().len() as f64
}

#[test]
fn previews_show_what_is_to_come() {
    let pipeline = Pipeline::load(&models::pocket::bundle(), &Device::Cpu, DType::F32, &mut |_| {}).unwrap();
    let job = Job {
        prompt: PROMPT.into(),
        negative_prompt: String::new(),
        width: models::pocket::SIDE,
        height: models::pocket::SIDE,
        steps: 8,
        guidance: 3.,
        true_cfg: 1.,
        seed: 3,
        outputs: 1,
        noise: NoiseKind::Cpu,
        start: None,
        loras: Vec::new(),
        lora_mode: LoraMode::Auto,
        previews: Some(std::time::Duration::ZERO),
    };
    let mut previews = Vec::new();
    let finished = pipeline.run(&job, &mut |event| {
        if let Event::Preview { picture, .. } = event {
            previews.push(picture.clone());
        }
        ControlFlow::Continue(())
    });
    let finished = finished.unwrap();
    let far: Vec<f64> = previews.iter().map(|preview| apart(preview, &finished.pictures[0])).collect();
    println!("{far:.1?} of 255 apart, step by step");
    assert!(far.len() == 8 && previews[0].dimensions() == (16, 16));
    assert!(far[7] < 25.0 && far[7] < far[0], "{far:?}");
    // Another picture is further away: it is this one that is shown.
    let other = pipeline.run(&Job { seed: 4, previews: None, ..job.clone() }, &mut |_| ControlFlow::Continue(())).unwrap();
    assert!(apart(&previews[7], &other.pictures[0]) > far[7]);
    let plain = pipeline.run(&Job { previews: None, ..job }, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(plain.pictures, finished.pictures, "watching changes nothing");
}

/// The first of the 200 held-out prompts; `probe.py` measures all of them (figures: the model card).
#[test]
fn pictures_have_the_colours_of_the_prompt() {
    let text = std::fs::read(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/pocket/probe.json")).unwrap();
    let probe: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let pipeline = Pipeline::load(&models::pocket::bundle(), &Device::Cpu, DType::F32, &mut |_| {}).unwrap();
    let reader = models::pocket::probe::Probe::load().unwrap();
    let (mut asked, mut right) = ([0; 3], [0; 3]);
    for row in probe["prompts"].as_array().unwrap().iter().take(20) {
        let job = Job {
            prompt: row["prompt"].as_str().unwrap().into(),
            negative_prompt: String::new(),
            width: models::pocket::SIDE,
            height: models::pocket::SIDE,
            steps: probe["steps"].as_u64().unwrap() as usize,
            guidance: probe["guidance"].as_f64().unwrap(),
            true_cfg: 1.,
            seed: row["seed"].as_u64().unwrap(),
            outputs: 1,
            noise: NoiseKind::Cpu,
            start: None,
            loras: Vec::new(),
            lora_mode: LoraMode::Auto,
            previews: None,
        };
        let picture = &pipeline.run(&job, &mut |_| ControlFlow::Continue(())).unwrap().pictures[0];
        let seen = reader.look(picture.as_raw()).unwrap().attributes;
        for (i, name) in ["background", "shirt", "hair"].into_iter().enumerate() {
            let Some(want) = row["attributes"][name].as_str() else { continue };
            asked[i] += 1;
            right[i] += usize::from(seen[i] == want);
        }
    }
    println!("background, shirt, hair: {right:?} of {asked:?}");
    for (right, asked) in right.into_iter().zip(asked) {
        assert!(asked >= 10 && right * 10 >= asked * 7, "right {right} of {asked}");
    }
}

/// Eight drawings: people and strangers. What the network says of them in PyTorch, and who is recognised.
#[test]
fn the_probe_reads_as_the_reference_does() {
    use models::pocket::probe::{Face, Probe};
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/pocket");
    let json = |name: &str| -> serde_json::Value { serde_json::from_slice(&std::fs::read(folder.join(name)).unwrap()).unwrap() };
    let (cases, people) = (json("reference.json"), json("people.json"));
    let number = |value: &serde_json::Value| value.as_f64().unwrap();
    let face = |person: &serde_json::Value| {
        let kind = |name: &str| person["kinds"][name].as_u64().unwrap() as usize;
        let kinds = ["eye_color", "mark", "nose_shape", "brows", "skin"].map(kind);
        Face::known(std::array::from_fn(|i| number(&person["features"][i])), kinds)
    };
    let probe = Probe::load().unwrap();
    for case in cases.as_array().unwrap() {
        let bytes = std::fs::read(folder.join(case["file"].as_str().unwrap())).unwrap();
        let picture = darkroom::image::decode_picture(&bytes, darkroom::image::Limits::default()).unwrap();
        let seen = probe.look(picture.as_raw()).unwrap();
        for ((name, _), value) in models::pocket::probe::ATTRIBUTES.iter().zip(seen.attributes) {
            assert_eq!(case["attributes"][name], value, "{name} of {}", case["file"]);
        }
        let mut nearest = ("nobody", number(&people["threshold"]));
        for (name, person) in people["people"].as_object().unwrap() {
            let distance = seen.face.distance(&face(person));
            let expected = number(&case["distances"][name]);
            assert!((distance - expected).abs() < 1e-3, "{} to {name}: {distance}, not {expected}", case["file"]);
            if distance < nearest.1 {
                nearest = (name, distance);
            }
        }
        assert_eq!(case["identity"], nearest.0);
    }
}

/// The prompts that pocket is measured with: whatever they ask for is found in their words.
#[test]
fn prompts_ask_for_what_they_were_written_from() {
    let text = std::fs::read(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/pocket/probe.json")).unwrap();
    let probe: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let prompts = probe["prompts"].as_array().unwrap();
    for row in prompts {
        let prompt = row["prompt"].as_str().unwrap();
        let found: std::collections::BTreeMap<_, _> = models::pocket::probe::asked(prompt).into_iter().collect();
        for (name, value) in &found {
            assert_eq!(row["attributes"][name], *value, "{name} of {prompt:?}");
        }
        // What nobody mentions is absent.
        let left_out = row["attributes"].as_object().unwrap().iter().filter(|(name, _)| !found.contains_key(name.as_str()));
        left_out.for_each(|(name, value)| assert_eq!(*value, "none", "{name} of {prompt:?}"));
    }
}
