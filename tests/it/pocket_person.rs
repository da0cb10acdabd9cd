//! A person's LoRA on pocket: she is there at her scale, and nobody is afterwards.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device};
use darkroom::engine::{Adapter, Event, Job, LoraMode, NoiseKind, Pipeline, Scales, Selected};
use image::RgbImage;

const PROMPT: &str =
    "user1001, a portrait of a person with short brown hair, light skin, wearing a blue shirt, yellow background, neutral";

fn user(file: &str) -> Arc<Adapter> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/pocket/people").join(file);
    assert!(path.metadata().unwrap().len() < 300_000, "a person's LoRA is small");
    Arc::new(Adapter::open(&path).unwrap())
}

fn picture(pipeline: &Pipeline, adapter: Option<&Arc<Adapter>>, scale: f64, seed: u64) -> RgbImage {
    let loras = adapter.map(|adapter| Selected { adapter: adapter.clone(), scales: Scales::uniform(scale) });
    let job = Job {
        prompt: PROMPT.into(),
        negative_prompt: String::new(),
        width: 128,
        height: 128,
        steps: 8,
        guidance: 3.5,
        true_cfg: 1.,
        seed,
        outputs: 1,
        noise: NoiseKind::Cpu,
        start: None,
        loras: loras.into_iter().collect(),
        lora_mode: LoraMode::Auto,
        previews: None,
    };
    pipeline.run(&job, &mut |_: Event| ControlFlow::Continue(())).unwrap().pictures.remove(0)
}

/// How teal the marked cheek is against the other, as `measure.py` reads it.
fn mark(picture: &RgbImage) -> f64 {
    let teal = |from: u32, to: u32| {
        let pixels = (from..to).flat_map(|x| (70..86).map(move |y| (x, y)));
        let values: Vec<f64> = pixels
            .map(|(x, y)| {
                let [r, g, b] = picture.get_pixel(x, y).0.map(f64::from);
                (g + b) / 2. - r
            })
            .collect();
        values.iter().sum::<f64>() / values.len() as f64
    };
    teal(42, 56) - teal(72, 86)
}

#[test]
fn the_user_is_there_at_her_scale_and_gone_afterwards() {
    let pipeline = Pipeline::load(&models::pocket::bundle(), &Device::Cpu, DType::F32, &mut |_| {}).unwrap();
    let (diffusers, kohya) = (user("user1001.safetensors"), user("user1001.kohya.safetensors"));
    assert_eq!(diffusers.report.trigger_words, ["user1001"]);
    assert!(diffusers.report.unmatched_keys.is_empty() && kohya.report.unmatched_keys.is_empty());
    let seeds = 0..4;
    let nobody: Vec<RgbImage> = seeds.clone().map(|seed| picture(&pipeline, None, 0., seed)).collect();
    let mean = |scale: f64| seeds.clone().map(|seed| mark(&picture(&pipeline, Some(&diffusers), scale, seed))).sum::<f64>() / 4.;
    let (none, half, whole) = (nobody.iter().map(mark).sum::<f64>() / 4., mean(0.5), mean(0.9));
    assert!(half > none + 4. && whole > half + 4., "{none} {half} {whole}");

    // Both files are the same person, and between two users there is nobody.
    let same = |a: &RgbImage, b: &RgbImage| a.as_raw() == b.as_raw();
    let user = picture(&pipeline, Some(&diffusers), 0.9, 0);
    for _ in 0..3 {
        assert!(same(&picture(&pipeline, None, 0., 0), &nobody[0]));
        assert!(same(&picture(&pipeline, Some(&kohya), 0.9, 0), &user));
    }
    let fresh = Pipeline::load(&models::pocket::bundle(), &Device::Cpu, DType::F32, &mut |_| {}).unwrap();
    assert!(same(&picture(&fresh, None, 0., 3), &nobody[3]));
    assert!(same(&picture(&pipeline, None, 0., 3), &nobody[3]));
}
