//! The embedded model: the same latents as diffusers gives with the same folder, and pictures that obey the prompt.

use std::ops::ControlFlow;

use candle_core::{DType, Device, Tensor};
use darkroom::engine::{Event, Job, Pipeline};
use darkroom::image::measure::ssim;
use models::pocket::people;
use models::pocket::probe::{ATTRIBUTES, Probe, asked};
use models::vae::Autoencoder;
use models::weights::Component;

use crate::fixtures::{self, Fixture, component, relative_l2};

const PROMPT: &str = "a portrait of a person with long red hair and glasses, smiling, wearing a blue shirt, yellow background";

/// As pocket is measured.
fn job(prompt: &str, seed: u64) -> Job {
    Job { guidance: 3., seed, ..fixtures::job(prompt, models::pocket::SIDE, models::pocket::SIDE, 20) }
}

fn load() -> Pipeline {
    Pipeline::load(&models::pocket::bundle(), &Device::Cpu, DType::F32, &mut |_| {}).unwrap()
}

fn picture(pipeline: &Pipeline, job: &Job) -> image::RgbImage {
    pipeline.run(job, &mut |_| ControlFlow::Continue(())).unwrap().pictures.remove(0)
}

#[test]
fn latents_equal_those_of_diffusers() {
    let pipeline = load();
    assert_eq!(pipeline.text_tokens(), 64);
    let job = Job { outputs: 2, ..job(PROMPT, 3) };
    let finished = pipeline.run(&job, &mut |_| ControlFlow::Continue(())).unwrap();
    let error = relative_l2(&finished.latents, &Fixture::open("pocket/pocket.safetensors").get("latents"));
    println!("pocket: {error:.1e}");
    assert!(error <= 1e-3, "{error:e}");
    assert!(finished.truncated.is_empty());
}

/// How far apart two pictures are, mean of 255, at the size of the smaller one.
fn apart(small: &image::RgbImage, large: &image::RgbImage) -> f64 {
    let shrunk = image::imageops::resize(large, small.width(), small.height(), image::imageops::FilterType::Triangle);
    fixtures::apart(small.as_raw(), shrunk.as_raw())
}

#[test]
fn previews_show_what_is_to_come() {
    let pipeline = load();
    let job = Job { steps: 8, previews: Some(std::time::Duration::ZERO), ..job(PROMPT, 3) };
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

/// The first of the held-out prompts; `probe.py` measures 500 of them (figures: the model card).
#[test]
fn pictures_show_what_the_prompt_says() {
    let text = std::fs::read(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/pocket/probe.json")).unwrap();
    let probe: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let (pipeline, reader) = (load(), Probe::load().unwrap());
    let (mut asked, mut right, mut whole) = ([0; 10], [0; 10], 0);
    for row in probe["prompts"].as_array().unwrap().iter().take(20) {
        let job = job(row["prompt"].as_str().unwrap(), row["seed"].as_u64().unwrap());
        let seen = reader.look(picture(&pipeline, &job).as_raw()).unwrap().attributes;
        let before: usize = right.iter().sum::<usize>() + 10 - asked.iter().sum::<usize>();
        for (i, (name, _)) in ATTRIBUTES.iter().enumerate() {
            let Some(want) = row["attributes"][name].as_str() else { continue };
            asked[i] += 1;
            right[i] += usize::from(seen[i] == want);
        }
        whole += usize::from(right.iter().sum::<usize>() + 10 - asked.iter().sum::<usize>() == before);
    }
    println!("{right:?} of {asked:?}, all at once {whole} of 20");
    for ((right, asked), (name, _)) in right.into_iter().zip(asked).zip(ATTRIBUTES) {
        assert!(right * 10 >= asked * 8, "{name}: right {right} of {asked}");
    }
    assert!(whole >= 12, "everything right in {whole} of 20");
}

/// How many of the attributes that a prompt names are seen, and how many it names.
fn shown(seen: &[&str; 10], prompt: &str) -> (usize, usize) {
    let wants = asked(prompt);
    let place = |name: &str| ATTRIBUTES.iter().position(|(known, _)| *known == name).unwrap();
    (wants.iter().filter(|(name, value)| seen[place(name)] == *value).count(), wants.len())
}

#[test]
fn other_words_and_another_order_ask_for_the_same() {
    let (pipeline, reader) = (load(), Probe::load().unwrap());
    let prompts = [
        PROMPT,
        "yellow backdrop, a happy woman in a blue sweater, glasses, ginger long hair",
        "A PORTRAIT OF A MAN WITH LONG RED HAIR, GLASSES, SMILING, IN FRONT OF A YELLOW WALL, BLUE T-SHIRT",
        "Blue top, on a yellow background: character with a smile, long ginger hair and glasses",
    ];
    let mut found = (0, 0);
    for (i, prompt) in prompts.iter().enumerate() {
        let seen = reader.look(picture(&pipeline, &job(prompt, i as u64)).as_raw()).unwrap().attributes;
        let (right, wanted) = shown(&seen, prompt);
        assert!(wanted == 6, "{prompt}");
        found = (found.0 + right, found.1 + wanted);
    }
    println!("{found:?}");
    assert!(found.0 * 10 >= found.1 * 9, "{found:?}");
}

/// Wide pictures show the portrait in the middle, at their height; high ones at their width.
#[test]
fn other_shapes_of_the_same_area() {
    let (pipeline, reader) = (load(), Probe::load().unwrap());
    let side = models::pocket::SIDE as u32;
    let mut found = (0, 0);
    for (i, (width, height)) in [(112, 144), (144, 112), (176, 96), (96, 176)].into_iter().enumerate() {
        let wide = picture(&pipeline, &Job { width, height, ..job(PROMPT, i as u64) });
        assert_eq!(wide.dimensions(), (width as u32, height as u32));
        // The square that the drawings of this shape hold the portrait in; beyond the edge it goes on as at the edge.
        let square = height.min(128) as i64;
        let (left, top) = ((width as i64 - square) / 2, (height as i64 - square) / 2);
        let near = |at: i64, size: usize| at.clamp(0, size as i64 - 1) as u32;
        let portrait = image::RgbImage::from_fn(square as u32, square as u32, |x, y| {
            *wide.get_pixel(near(left + i64::from(x), width), near(top + i64::from(y), height))
        });
        let portrait = image::imageops::resize(&portrait, side, side, image::imageops::FilterType::Triangle);
        let (right, wanted) = shown(&reader.look(portrait.as_raw()).unwrap().attributes, PROMPT);
        found = (found.0 + right, found.1 + wanted);
    }
    println!("{found:?}");
    assert!(found.0 * 10 >= found.1 * 8, "{found:?}");
}

/// The eyes, glasses, marks and mouths of eight drawings are still there after the autoencoder.
#[test]
fn a_drawn_portrait_survives_the_autoencoder() {
    let (source, config) = component("../../models/pocket/weights", "vae", Component::Vae);
    let vae = Autoencoder::load(&source, Some(&config)).unwrap();
    let side = models::pocket::SIDE;
    let alike = (0..8).map(|i| {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("models/pocket/reference/{i}.png"));
        let drawing = image::open(path).unwrap().to_rgb8();
        let x = Tensor::from_slice(drawing.as_raw(), (1, side, side, 3), &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
        let x = ((x / 127.5).unwrap() - 1.).unwrap().permute((0, 3, 1, 2)).unwrap().contiguous().unwrap();
        let y = vae.decode(&vae.encode(&x).unwrap().mean).unwrap().clamp(-1f32, 1f32).unwrap();
        let y = ((y + 1.).unwrap() * 127.5).unwrap().round().unwrap().to_dtype(DType::U8).unwrap();
        let bytes = y.permute((0, 2, 3, 1)).unwrap().flatten_all().unwrap().to_vec1::<u8>().unwrap();
        ssim(&drawing, &image::RgbImage::from_raw(side as u32, side as u32, bytes).unwrap()).unwrap()
    });
    let alike: Vec<f64> = alike.collect();
    println!("{alike:.3?}");
    assert!(alike.iter().sum::<f64>() / 8. >= 0.95, "{alike:?}");
}

/// Eight drawings: people and strangers. What the network says of them in PyTorch, and who is recognised.
#[test]
fn the_probe_reads_as_the_reference_does() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/pocket");
    let json = |name: &str| -> serde_json::Value { serde_json::from_slice(&std::fs::read(folder.join(name)).unwrap()).unwrap() };
    let cases = json("reference.json");
    let probe = Probe::load().unwrap();
    for case in cases.as_array().unwrap() {
        let bytes = std::fs::read(folder.join(case["file"].as_str().unwrap())).unwrap();
        let picture = darkroom::image::decode_picture(&bytes, darkroom::image::Limits::default()).unwrap();
        let seen = probe.look(picture.as_raw()).unwrap();
        for ((name, _), value) in ATTRIBUTES.iter().zip(seen.attributes) {
            assert_eq!(case["attributes"][name], value, "{name} of {}", case["file"]);
        }
        for (name, expected) in case["distances"].as_object().unwrap() {
            let (distance, expected) = (people::distance(&seen.face, name).unwrap(), expected.as_f64().unwrap());
            assert!((distance - expected).abs() < 1e-3, "{} to {name}: {distance}, not {expected}", case["file"]);
        }
        assert_eq!(case["identity"], people::recognise(&seen.face).unwrap_or("nobody"));
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
        let found: std::collections::BTreeMap<_, _> = asked(prompt).into_iter().collect();
        for (name, value) in &found {
            assert_eq!(row["attributes"][name], *value, "{name} of {prompt:?}");
        }
        // What nobody mentions is absent.
        let left_out = row["attributes"].as_object().unwrap().iter().filter(|(name, _)| !found.contains_key(name.as_str()));
        left_out.for_each(|(name, value)| assert_eq!(*value, "none", "{name} of {prompt:?}"));
    }
}
