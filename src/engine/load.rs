//! From a model's files to a [`Pipeline`].

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use candle_core::{DType, Device};
use models::bundle::{Blob, Bundle, Files};
use models::clip::ClipText;
use models::flux::Flux;
use models::lora::Patches;
use models::nn::Home;
use models::sampler::Schedule;
use models::t5::T5Encoder;
use models::tokenize::Tokenizers;
use models::vae::Autoencoder;
use models::weights::{Component, Keep, Source};
use serde_json::Value;

use super::encoded::Encoded;
use super::plan::Plan;
use super::sizes::TOKENS;
use super::{Error, LoraMode, Pipeline, device};

/// T5 tokens that FLUX.1-dev and FLUX.1-schnell were trained with.
const TEXT_TOKENS: [usize; 2] = [512, 256];

/// How often progress is told.
const TELL: Duration = Duration::from_millis(100);

/// Told while a model is loaded: bytes of its files, of all components, and since when.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LoadEvent {
    pub done: u64,
    pub total: u64,
    pub elapsed: Duration,
}

impl Pipeline {
    /// Loads every component, by default onto `device`, as `plan` says: a type to compute in is a plan too.
    ///
    /// `told` hears how far it is ten times a second, and once at the end.
    pub fn load(bundle: &Bundle, device: &Device, plan: impl Into<Plan>, told: &mut dyn FnMut(LoadEvent)) -> Result<Self, Error> {
        let plan = plan.into();
        let (done, total) = (Arc::new(AtomicU64::new(0)), AtomicU64::new(0));
        let (begun, of) = (Instant::now(), |bytes: &AtomicU64| bytes.load(Ordering::Relaxed));
        let progress = || LoadEvent { done: of(&done), total: of(&total), elapsed: begun.elapsed() };
        let (finished, wait) = mpsc::channel::<()>();
        let pipeline = thread::scope(|scope| {
            let loading = scope.spawn(|| {
                let _dropped_at_the_end = finished;
                load(bundle, device, plan, &done, &total)
            });
            while wait.recv_timeout(TELL) == Err(RecvTimeoutError::Timeout) {
                told(progress());
            }
            loading.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        let LoadEvent { done, elapsed, .. } = progress();
        told(progress());
        tracing::info!(bytes = done, seconds = elapsed.as_secs_f64(), "loaded");
        Ok(pipeline)
    }
}

/// The same on this thread, adding to `done` what it has loaded of `total`.
fn load(bundle: &Bundle, device: &Device, plan: Plan, done: &Arc<AtomicU64>, total: &AtomicU64) -> Result<Pipeline, Error> {
    let dtype = plan.dtype;
    let tokenizers = Tokenizers::load(bundle)?;
    let open = |component, files: &Files, dtype| -> Result<_, Error> {
        let keep = if component == Component::Transformer { plan.transformer } else { Keep::Stored };
        let source = Source::new(component, &files.checkpoint()?, dtype, device).kept(keep, plan.on_host).counting(done);
        total.fetch_add(source.bytes(), Ordering::Relaxed);
        Ok((source, json(files.config.as_ref())?))
    };
    let (clip_source, clip_config) = open(Component::Clip, &bundle.clip, dtype)?;
    // T5's activations overflow f16.
    let (t5_source, t5_config) = open(Component::T5, &bundle.t5, if dtype == DType::F16 { DType::F32 } else { dtype })?;
    let (flux_source, flux_config) = open(Component::Transformer, &bundle.transformer, dtype)?;
    let (vae_source, vae_config) = open(Component::Vae, &bundle.vae, dtype)?;

    let mut parameters = BTreeMap::new();
    // A load counts when every tensor was found; what it loaded can then be patched.
    let mut finish = |component, source: Source| -> Result<(), Error> {
        parameters.extend(source.parameters().into_iter().map(|(name, parameter)| ((component, name), parameter)));
        source.finish()?;
        Ok(())
    };
    let clip = ClipText::load(&clip_source, clip_config.as_ref())?;
    finish(Component::Clip, clip_source)?;
    let t5 = T5Encoder::load(&t5_source, t5_config.as_ref())?;
    finish(Component::T5, t5_source)?;
    let flux = Flux::load(&flux_source, flux_config.as_ref())?;
    finish(Component::Transformer, flux_source)?;
    let vae = Autoencoder::load(&vae_source, vae_config.as_ref())?;
    vae_source.finish()?;

    let guidance = flux.config().guidance;
    let schedule = Schedule::read(json(bundle.scheduler.as_ref())?.as_ref(), guidance)?;
    let [dev, schnell] = TEXT_TOKENS;
    let trained = if guidance { dev } else { schnell };
    let text_tokens = tokenizers.t5_limit().map_or(trained, |limit| limit.min(trained));
    let mut patches = Patches::new(parameters, device, dtype);
    let bytes = patches.bytes();
    patches.home = match plan.home {
        None if plan.transformer == Keep::Fp8Merged => Home::Device,
        None => device::home(device, bytes),
        Some(Home::Host) => device::host_or_file(bytes),
        Some(home) => home,
    };
    if plan.transformer == Keep::Fp8Merged {
        // What is computed with is there before the first job, or the load fails.
        patches.apply(&[], LoraMode::Fp8)?;
    }
    let kernels = if device.is_cuda() && kernels::fused() {
        let (heads, width) = (flux.config().heads, flux.config().hidden / flux.config().heads);
        let attention = kernels::settle_attention(device, heads, TOKENS as usize, width, dtype)?;
        format!("fused; attention: {attention}; convolution: {}", kernels::settle_convolution(device, dtype)?)
    } else {
        "plain".to_owned()
    };
    tracing::info!(kernels, ?dtype, device = ?device.location(), %plan, "computed with");
    tracing::info!(home = %patches.home, bytes, "pristine weights while LoRAs are on them");
    let (patches, on_host) = (Mutex::new(patches), plan.on_host);
    Ok(Pipeline {
        tokenizers,
        t5,
        clip,
        flux,
        vae,
        schedule,
        text_tokens,
        device: device.clone(),
        dtype,
        plan,
        kernels,
        patches,
        encoded: Encoded::default(),
        preview: OnceLock::new(),
        on_host: Mutex::new(on_host),
        full: AtomicBool::new(false),
        pretended: AtomicUsize::new(0),
    })
}

fn json(blob: Option<&Blob>) -> Result<Option<Value>, Error> {
    let Some(blob) = blob else { return Ok(None) };
    let text = blob.read()?;
    Ok(Some(serde_json::from_slice(&text).map_err(|source| Error::Config { path: blob.path(), source })?))
}
