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

/// The colour that `models/pocket/probe.py` reads in a region: each pixel votes for the nearest colour.
fn colour(picture: &image::RgbImage, rule: &serde_json::Value) -> String {
    let numbers =
        |value: &serde_json::Value| -> Vec<i64> { value.as_array().unwrap().iter().map(|n| n.as_i64().unwrap()).collect() };
    let named: Vec<(Option<&String>, Vec<i64>)> =
        rule["palette"].as_object().unwrap().iter().map(|(name, rgb)| (Some(name), numbers(rgb))).collect();
    let others = rule["others"].as_array().unwrap().iter().map(|rgb| (None, numbers(rgb)));
    let colours: Vec<_> = named.into_iter().chain(others).collect();
    let mut votes = vec![0; colours.len()];
    for area in rule["boxes"].as_array().unwrap() {
        let area = numbers(area);
        for (y, x) in (area[1]..area[3]).flat_map(|y| (area[0]..area[2]).map(move |x| (y, x))) {
            let pixel = picture.get_pixel(x as u32, y as u32).0;
            let distance = |rgb: &[i64]| -> i64 { rgb.iter().zip(pixel).map(|(a, b)| (a - i64::from(b)).pow(2)).sum() };
            let nearest = (0..colours.len()).min_by_key(|i| distance(&colours[*i].1)).unwrap();
            votes[nearest] += 1;
        }
    }
    let named = (0..colours.len()).filter(|i| colours[*i].0.is_some() && votes[*i] > 0);
    named.max_by_key(|i| votes[*i]).and_then(|i| colours[i].0.cloned()).unwrap_or("unknown".into())
}

/// The first of the 200 held-out prompts; `probe.py` measures all of them (figures: the model card).
#[test]
fn pictures_have_the_colours_of_the_prompt() {
    let text = std::fs::read(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/pocket/probe.json")).unwrap();
    let probe: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let pipeline = Pipeline::load(&models::pocket::bundle(), &Device::Cpu, DType::F32, &mut |_| {}).unwrap();
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
        for (i, name) in ["background", "shirt", "hair"].into_iter().enumerate() {
            let Some(want) = row["attributes"][name].as_str() else { continue };
            asked[i] += 1;
            right[i] += usize::from(colour(picture, &probe["rules"][name]) == want);
        }
    }
    println!("background, shirt, hair: {right:?} of {asked:?}");
    for (right, asked) in right.into_iter().zip(asked) {
        assert!(asked >= 10 && right * 10 >= asked * 7, "right {right} of {asked}");
    }
}
