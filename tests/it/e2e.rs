//! Whole jobs against diffusers' pipelines: txt2img, img2img, inpainting, true CFG, dev and schnell.

use std::ops::ControlFlow;
use std::sync::LazyLock;

use candle_core::{DType, IndexOp, Tensor};
use darkroom::engine::{Event, Job, LoraMode, NoiseKind, Pipeline, Start};
use serde::Deserialize;

use crate::fixtures::{self, Fixture, apart, relative_l2};

/// Largest relative L2 error of the final latents.
const LATENTS: f64 = 5e-5;
/// Largest mean difference of a picture's bytes.
const PICTURE: f64 = 0.02;

#[derive(Debug, Clone, Deserialize)]
struct Case {
    name: String,
    model: String,
    prompt: String,
    negative_prompt: Option<String>,
    width: usize,
    height: usize,
    steps: usize,
    guidance: f64,
    true_cfg: f64,
    seed: u64,
    num_outputs: usize,
    strength: Option<f64>,
    image: Option<String>,
    mask: Option<String>,
}

static DEV: LazyLock<Pipeline> = LazyLock::new(|| fixtures::pipeline("tiny-dev", DType::F32));
static SCHNELL: LazyLock<Pipeline> = LazyLock::new(|| fixtures::pipeline("tiny-schnell", DType::F32));

impl Case {
    fn pipeline(&self) -> &'static Pipeline {
        if self.model == "dev" { &DEV } else { &SCHNELL }
    }

    fn job(&self) -> Job {
        let picture = |name: &String| image::open(fixtures::path(&format!("e2e/{name}.png"))).unwrap();
        let start = self.image.as_ref().map(|image| Start {
            image: picture(image).to_rgb8(),
            mask: self.mask.as_ref().map(|mask| picture(mask).to_luma8()),
            strength: self.strength.unwrap(),
        });
        Job {
            prompt: self.prompt.clone(),
            negative_prompt: self.negative_prompt.clone().unwrap_or_default(),
            width: self.width,
            height: self.height,
            steps: self.steps,
            guidance: self.guidance,
            true_cfg: self.true_cfg,
            seed: self.seed,
            outputs: self.num_outputs,
            noise: NoiseKind::Cpu,
            start,
            loras: Vec::new(),
            lora_mode: LoraMode::Auto,
            previews: None,
        }
    }
}

fn cases() -> Vec<Case> {
    serde_json::from_value(fixtures::json("e2e/cases.json")).unwrap()
}

fn quiet(_: Event) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn check(pipeline_name: &str) {
    let truth = Fixture::open("e2e/e2e.safetensors");
    let all = fixtures::json("e2e/cases.json");
    let mut failures = Vec::new();
    let mut count = 0;
    for (case, raw) in cases().into_iter().zip(all.as_array().unwrap()) {
        if raw["pipeline"] != pipeline_name {
            continue;
        }
        count += 1;
        let finished = case.pipeline().run(&case.job(), &mut quiet).unwrap();
        // diffusers lets all outputs share the first one's autoencoder sample; here each output draws its own.
        let comparable = if case.image.is_some() { 1 } else { case.num_outputs };
        let at = |key: &str| truth.get(&format!("{}.{key}", case.name));
        let first = |x: &Tensor| x.narrow(0, 0, comparable).unwrap();
        let latents = relative_l2(&first(&finished.latents), &first(&at("latents")));
        let pictures = at("image");
        let mut worst = 0f64;
        for (i, picture) in finished.pictures.iter().take(comparable).enumerate() {
            let want: Vec<u8> = pictures.i(i).unwrap().permute((1, 2, 0)).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            worst = worst.max(apart(picture.as_raw(), &want));
        }
        println!("{}: latents {latents:.1e}, pictures {worst:.3}", case.name);
        if latents > LATENTS || worst > PICTURE || latents.is_nan() || finished.pictures.len() != case.num_outputs {
            failures.push(format!("{}: latents {latents:.2e}, pictures {worst:.2}", case.name));
        }
    }
    assert!(count >= 5, "only {count} cases of {pipeline_name}");
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn text_to_image() {
    check("txt2img");
}

#[test]
fn image_to_image() {
    check("img2img");
}

#[test]
fn inpainting() {
    check("inpaint");
}

#[test]
fn one_of_several_outputs_can_be_made_alone() {
    let case = cases().into_iter().find(|case| case.name == "dev_three").unwrap();
    let all = case.pipeline().run(&case.job(), &mut quiet).unwrap();
    let job = Job { seed: case.seed + 2, outputs: 1, ..case.job() };
    let alone = case.pipeline().run(&job, &mut quiet).unwrap();
    assert_eq!(alone.pictures[0], all.pictures[2]);
    assert_eq!(relative_l2(&alone.latents, &all.latents.narrow(0, 2, 1).unwrap()), 0.);
}

#[test]
fn later_outputs_of_image_to_image_equal_the_output_alone() {
    let case = cases().into_iter().find(|case| case.name == "img2img_three").unwrap();
    let all = case.pipeline().run(&case.job(), &mut quiet).unwrap();
    let alone = case.pipeline().run(&Job { seed: case.seed + 1, outputs: 1, ..case.job() }, &mut quiet).unwrap();
    assert_eq!(relative_l2(&alone.latents, &all.latents.narrow(0, 1, 1).unwrap()), 0.);
}

#[test]
fn what_was_cut_off_is_reported() {
    let case = cases().into_iter().find(|case| case.name == "dev_long_prompt").unwrap();
    let finished = case.pipeline().run(&case.job(), &mut quiet).unwrap();
    let t5 = finished.truncated.iter().find(|cut| cut.encoder == "t5").expect("T5 was cut");
    assert_eq!((t5.field, t5.limit), ("prompt", 512));
    assert!(case.prompt.ends_with(t5.lost.trim()), "lost: {}", t5.lost);
    assert!(finished.truncated.iter().any(|cut| cut.encoder == "clip" && cut.limit == 77));
}

#[test]
fn a_job_stops_between_two_steps() {
    let case = cases().into_iter().find(|case| case.name == "dev_tall").unwrap();
    let mut steps = 0;
    let mut stop_at_two = |event: Event| match event {
        Event::Step { .. } if steps == 1 => ControlFlow::Break(()),
        Event::Step { .. } => {
            steps += 1;
            ControlFlow::Continue(())
        }
        _ => ControlFlow::Continue(()),
    };
    let result = case.pipeline().run(&case.job(), &mut stop_at_two);
    assert!(matches!(result, Err(darkroom::engine::Error::Cancelled)));
    assert_eq!(steps, 1);
}
