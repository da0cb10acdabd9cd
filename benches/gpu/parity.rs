//! The tiny fixtures and pocket, on the device, against the reference and against the CPU.

use std::ops::ControlFlow;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use darkroom::engine::{Job, LoraMode, NoiseKind, Pipeline};
use models::bundle::Bundle;

/// One comparison.
#[derive(Debug)]
pub(crate) struct Check {
    pub(crate) name: String,
    pub(crate) error: f64,
    pub(crate) bound: f64,
}

impl Check {
    pub(crate) fn passes(&self) -> bool {
        self.error <= self.bound
    }
}

/// Final latents of whole jobs differ by at most this from the reference's, in f32.
const F32: f64 = 1e-3;
/// bf16 has 8 bits of mantissa; a few steps of a random tiny model amplify its rounding.
const BF16: f64 = 0.15;

/// Tells of each comparison when it is made.
pub(crate) fn run(device: &Device, fixtures: &Path, told: &mut dyn FnMut(Check) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let truth = candle_core::safetensors::load(fixtures.join("e2e/e2e.safetensors"), &Device::Cpu)?;
    let cases: serde_json::Value = serde_json::from_slice(&std::fs::read(fixtures.join("e2e/cases.json"))?)?;
    let dtypes = if device.is_cpu() { vec![(DType::F32, F32)] } else { vec![(DType::F32, F32), (DType::BF16, BF16)] };
    for (dtype, bound) in &dtypes {
        for model in ["dev", "schnell"] {
            let bundle = Bundle::from_folder(&fixtures.join(format!("tiny-{model}")))?;
            let pipeline = Pipeline::load(&bundle, device, *dtype, &mut |_| {})?;
            for case in cases.as_array().into_iter().flatten() {
                if case["model"] != model || case["pipeline"] != "txt2img" {
                    continue;
                }
                let latents = latents(&pipeline, &job(case))?;
                let name = case["name"].as_str().unwrap_or_default();
                let error = relative_l2(&latents, &truth[&format!("{name}.latents")])?;
                told(Check { name: format!("{name}, {dtype:?}, against diffusers"), error, bound: *bound })?;
            }
        }
    }
    #[cfg(feature = "pocket")]
    if !device.is_cpu() {
        let bundle = models::pocket::bundle();
        let mut job = job(&cases[0]);
        job.prompt = "a portrait of a person with long red hair and glasses, wearing a blue shirt, yellow background".into();
        (job.width, job.height, job.steps) = (models::pocket::SIDE, models::pocket::SIDE, 20);
        let reference = latents(&Pipeline::load(&bundle, &Device::Cpu, DType::F32, &mut |_| {})?, &job)?;
        for (dtype, bound) in &dtypes {
            let got = latents(&Pipeline::load(&bundle, device, *dtype, &mut |_| {})?, &job)?;
            let error = relative_l2(&got, &reference)?;
            told(Check { name: format!("pocket, {dtype:?}, against the CPU"), error, bound: *bound })?;
        }
    }
    Ok(())
}

fn job(case: &serde_json::Value) -> Job {
    let number = |name: &str| case[name].as_u64().unwrap_or_default();
    let text = |name: &str| case[name].as_str().unwrap_or_default().to_string();
    Job {
        prompt: text("prompt"),
        negative_prompt: text("negative_prompt"),
        width: number("width") as usize,
        height: number("height") as usize,
        steps: number("steps") as usize,
        guidance: case["guidance"].as_f64().unwrap_or_default(),
        true_cfg: case["true_cfg"].as_f64().unwrap_or(1.),
        seed: number("seed"),
        outputs: number("num_outputs") as usize,
        noise: NoiseKind::Cpu,
        start: None,
        loras: Vec::new(),
        lora_mode: LoraMode::Auto,
        previews: None,
    }
}

fn latents(pipeline: &Pipeline, job: &Job) -> anyhow::Result<Tensor> {
    Ok(pipeline.run(job, &mut |_| ControlFlow::Continue(()))?.latents)
}

fn relative_l2(got: &Tensor, want: &Tensor) -> anyhow::Result<f64> {
    let norm = |x: &Tensor| anyhow::Ok(f64::from(x.sqr()?.sum_all()?.to_scalar::<f32>()?).sqrt());
    Ok(norm(&(got - want)?)? / norm(want)?)
}
