//! The whole way of one request on this machine.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use safetensors::tensor::{Dtype, TensorView};
use serde::Serialize;

use super::settings;
pub(crate) use super::settings::Setting;
use super::target::Targets;
use super::{Output, Precision, Request, prepare};
use crate::config::Config;
use crate::engine::{self, Event, Finished, Job, LoadEvent, Pipeline, Selected};
use crate::fetch::{self, Progress};
use crate::image;
use crate::ops::Error;
use crate::ops::Machine;
use crate::ops::lora::{Lora, Sources};
use crate::ops::models::{self, Model};
use crate::ops::shown;

/// Everything that a run needs to know.
#[derive(Debug, Clone)]
pub struct Order {
    pub request: Request,
    pub output: Output,
    /// A card's name, a card's path, a folder or a file.
    pub model: String,
    pub machine: Machine,
    /// The device's own if not given.
    pub precision: Option<Precision>,
    /// Compute the model's digest, even if no picture carries it.
    pub digest: bool,
}

/// What is being done, told as it happens. Answering `ControlFlow::Break` stops the run within a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage<'a> {
    /// A LoRA that is not on this machine.
    Fetching(Progress),
    Loading(LoadEvent),
    Engine(Event<'a>),
    Writing,
}

/// What was done. Serialised, it is the answer of `--json`.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    #[serde(serialize_with = "shown::paths")]
    pub files: Vec<PathBuf>,
    /// As the encoders read it.
    pub prompt: String,
    /// One for each file.
    pub seeds: Vec<u64>,
    pub width: usize,
    pub height: usize,
    pub steps: usize,
    pub guidance: f64,
    pub true_cfg: f64,
    pub noise: &'static str,
    pub model: ModelReport,
    pub loras: Vec<LoraReport>,
    /// Where the weights without LoRAs were kept: device, host or file. Absent without LoRAs.
    pub pristine: Option<String>,
    pub device: String,
    pub dtype: String,
    pub timings: Seconds,
    pub truncated: Vec<Cut>,
    #[serde(serialize_with = "shown::maybe")]
    pub latents: Option<PathBuf>,
    /// What of the request had no effect.
    pub remarks: Vec<String>,
}

#[derive(Debug, Clone, Serialize)]
pub struct ModelReport {
    pub name: String,
    /// Over the content of all weight files.
    pub sha256: Option<String>,
}

/// A LoRA that was on the weights.
#[derive(Debug, Clone, Serialize)]
pub struct LoraReport {
    pub reference: String,
    /// SHA-256 of the file.
    pub digest: String,
    pub scale: f64,
    pub text_scale: f64,
    pub modules: usize,
    pub unmatched_keys: Vec<String>,
    pub trigger_words: Vec<String>,
}

/// Wall time of each stage in seconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Seconds {
    pub load: f64,
    /// Putting the LoRAs on the weights.
    pub switch: f64,
    pub encode: f64,
    pub denoise: f64,
    pub decode: f64,
    pub write: f64,
}

/// The end of a prompt that an encoder does not read.
#[derive(Debug, Clone, Serialize)]
pub struct Cut {
    pub field: &'static str,
    pub encoder: &'static str,
    pub limit: usize,
    pub lost: String,
}

/// Checks everything that can be checked, then loads the model, runs the job and writes the pictures.
pub fn run(order: &Order, config: &Config, told: &mut dyn FnMut(Stage<'_>) -> ControlFlow<()>) -> Result<Report, Error> {
    let model = models::resolve(&order.model, config)?;
    order.precision.map_or(Ok(()), |precision| precision.allows(order.request.lora_mode))?;
    let (mut job, mut remarks) = prepare(&order.request, &model)?;
    let seeds: Vec<u64> = job.seeds().collect();
    let targets = Targets::plan(&order.output, &seeds)?;
    job.loras = Sources::new(config).open(&order.request.loras, &mut |progress| told(Stage::Fetching(progress)))?;
    remarks.extend(job.loras.iter().flat_map(|selected| selected.adapter.report.warnings.clone()));
    let device = order.machine.open()?;
    let plan = order.machine.plan(&model, &device, order.precision)?;

    tell(told, Stage::Loading(LoadEvent::default()))?;
    let digest = (order.digest || order.output.metadata).then(|| digest(&model, config));
    let begun = Instant::now();
    let pipeline = Pipeline::load(&model.bundle, &device, plan, &mut |event| {
        // It cannot be stopped before its end; then it is asked again.
        let _ = told(Stage::Loading(event));
    })?;
    let load = begun.elapsed();
    let finished = pipeline.run(&job, &mut |event| told(Stage::Engine(event)))?;
    remarks.extend(finished.switch.notes.iter().cloned());

    tell(told, Stage::Writing)?;
    let digest = digest.and_then(|thread| thread.join().ok().flatten());
    let begun = Instant::now();
    let device = device_name(&device);
    let setting = Setting { model: &model.name, digest: digest.as_deref(), device: &device, dtype: &finished.dtype };
    // All are encoded before the first is written, so that a format's limit leaves nothing behind.
    let encoded = encode(&job, &finished, (targets.format, targets.quality), order.output.metadata.then_some(setting))?;
    let (files, latents) = targets.write(&encoded, || latents(&finished))?;
    let timings = seconds(load, &finished, begun.elapsed());

    Ok(Report {
        files,
        loras: order.request.loras.iter().zip(&job.loras).map(|(lora, selected)| report(lora, selected)).collect(),
        pristine: (!job.loras.is_empty()).then(|| pipeline.patches().home.to_string()),
        prompt: job.prompt,
        seeds,
        width: job.width,
        height: job.height,
        steps: job.steps,
        guidance: job.guidance,
        true_cfg: job.true_cfg,
        noise: settings::noise(job.noise),
        model: ModelReport { name: model.name, sha256: digest },
        device,
        dtype: finished.dtype.clone(),
        timings,
        truncated: finished.truncated.into_iter().map(cut).collect(),
        latents,
        remarks,
    })
}

/// Computed beside the work, since it may read tens of gigabytes the first time. A digest that cannot be had is left out.
fn digest(model: &Model, config: &Config) -> JoinHandle<Option<String>> {
    let (bundle, cache) = (model.bundle.clone(), config.cache.clone());
    thread::spawn(move || {
        let digest = models::digest(&bundle, cache.as_deref());
        digest.inspect_err(|error| tracing::warn!(%error, "the model has no digest")).ok()
    })
}

/// The picture files' bytes, one for each output.
pub(crate) fn encode(
    job: &Job,
    finished: &Finished,
    (format, quality): (image::Format, u8),
    setting: Option<Setting<'_>>,
) -> Result<Vec<Vec<u8>>, Error> {
    let encode = |(picture, seed)| {
        let metadata = setting.map(|setting| settings::metadata(job, seed, setting));
        image::encode(picture, format, quality, metadata.as_ref())
    };
    Ok(finished.pictures.iter().zip(job.seeds()).map(encode).collect::<Result<Vec<_>, _>>()?)
}

/// A safetensors file with one f32 tensor, `latents`.
pub(crate) fn latents(finished: &Finished) -> Result<Vec<u8>, Error> {
    let values: Vec<f32> = finished.latents.flatten_all().and_then(|flat| flat.to_vec1()).map_err(engine::Error::from)?;
    let bytes: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
    let view = TensorView::new(Dtype::F32, finished.latents.dims().to_vec(), &bytes).expect("four bytes for each value");
    Ok(safetensors::serialize([("latents", view)], None).expect("one tensor of a plain name"))
}

fn tell(told: &mut dyn FnMut(Stage<'_>) -> ControlFlow<()>, stage: Stage<'_>) -> Result<(), Error> {
    match told(stage) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(engine::Error::Cancelled.into()),
    }
}

pub(crate) fn seconds(load: Duration, finished: &Finished, write: Duration) -> Seconds {
    let timings = finished.timings;
    let [load, switch, encode, denoise, decode, write] =
        [load, timings.switch, timings.encode, timings.denoise, timings.decode, write]
            .map(|time| (time.as_secs_f64() * 1e6).round() / 1e6);
    Seconds { load, switch, encode, denoise, decode, write }
}

fn report(lora: &Lora, selected: &Selected) -> LoraReport {
    let found = &selected.adapter.report;
    LoraReport {
        reference: fetch::shown(&lora.reference),
        digest: found.digest.clone(),
        scale: selected.scales.model,
        text_scale: selected.scales.text,
        modules: found.modules_matched,
        unmatched_keys: found.unmatched_keys.clone(),
        trigger_words: found.trigger_words.clone(),
    }
}

fn cut(truncation: engine::Truncation) -> Cut {
    let engine::Truncation { field, encoder, limit, lost } = truncation;
    Cut { field, encoder, limit, lost }
}

/// As pictures and reports call it.
pub(crate) fn device_name(device: &candle_core::Device) -> String {
    match device.location() {
        candle_core::DeviceLocation::Cpu => "cpu".into(),
        candle_core::DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        // Its number is the system's and names nothing that one could ask for.
        candle_core::DeviceLocation::Metal { .. } => "metal".into(),
    }
}
