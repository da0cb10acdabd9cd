//! One job, start to end: prompt → conditioning → noise → latents → pictures.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use models::clip::ClipText;
use models::flux::{Conditioning, Flux, Prepared, Rope};
use models::lora::{Patches, Switch};
use models::nn::Home;
use models::sampler::{self, Generator, Schedule};
use models::t5::T5Encoder;
use models::tokenize::Tokenizers;
use models::vae::Autoencoder;
use models::weights::{Keep, OnHost};

use super::encoded::{Encoded, Text};
use super::plan::{Plan, smaller};
use super::preview::Preview;
use super::sizes::work;
use super::{Error, Event, Finished, Job, LoraMode, Start, Timings, Truncation};
use super::{device, measured, pixels};
use crate::bytes::in_words;

/// The picture that plans are for.
const PLANNED: (usize, usize) = (1024, 1024);

/// Steps that are prepared at once: 2 MB each for FLUX.1 in 16 bits.
const PREPARED: usize = 64;

/// What a picture may take on devices that do not tell their free memory.
const HOST_PICTURE_BYTES: usize = 8 << 30;

/// A loaded model.
#[derive(Debug)]
pub struct Pipeline {
    pub(super) tokenizers: Tokenizers,
    pub(super) t5: T5Encoder,
    pub(super) clip: ClipText,
    pub(super) flux: Flux,
    pub(super) vae: Autoencoder,
    pub(super) schedule: Schedule,
    pub(super) text_tokens: usize,
    pub(super) device: Device,
    pub(super) dtype: DType,
    pub(super) plan: Plan,
    pub(super) kernels: String,
    /// Locked while a job runs: its weights are its own.
    pub(super) patches: Mutex<Patches>,
    /// Prompts that were encoded lately.
    pub(super) encoded: Encoded,
    /// Fitted when the first one is asked for.
    pub(super) preview: OnceLock<Preview>,
    /// What waits in main memory: as planned, and more once the device was full.
    pub(super) on_host: Mutex<OnHost>,
    /// Whether the device was full in the job that runs.
    pub(super) full: AtomicBool,
    /// Attempts that are to fail for memory.
    pub(super) pretended: AtomicUsize,
}

/// The latents at which the walk would end if it went on straight; computed when asked for.
type Estimate<'a> = &'a dyn Fn() -> candle_core::Result<Tensor>;

/// A prompt encoded for one picture.
struct Prompts {
    positive: Conditioning,
    /// With true CFG.
    negative: Option<Conditioning>,
}

/// The picture that a job starts from, as latents.
struct Origin {
    latents: Tensor,
    /// Packed like the latents: 1 is painted anew, 0 is kept.
    mask: Option<Tensor>,
}

impl Pipeline {
    /// T5 tokens of a prompt.
    #[must_use]
    pub fn text_tokens(&self) -> usize {
        self.text_tokens
    }

    /// What it was loaded by.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Whose kernels compute it, in words.
    #[must_use]
    pub fn kernels(&self) -> &str {
        &self.kernels
    }

    /// How LoRAs act in a job that asks for this mode.
    #[must_use]
    pub fn lora_mode(&self, asked: LoraMode) -> LoraMode {
        if self.plan.transformer == Keep::Fp8Merged { LoraMode::Fp8 } else { asked }
    }

    /// The adapters on the weights. Held by a job while it runs.
    pub fn patches(&self) -> MutexGuard<'_, Patches> {
        // A panic in a job leaves either its set or the one before: both are known to the next switch.
        self.patches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a job. `told` hears of progress and may cancel between two steps.
    ///
    /// If the device has no memory left, what was freed there is put together and the job tried again; then twice with less on it.
    pub fn run(&self, job: &Job, told: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>) -> Result<Finished, Error> {
        let mut switched = None;
        self.full.store(false, Ordering::Relaxed);
        for before in [Self::gather_memory, Self::save_memory, Self::save_memory] {
            match self.attempt(job, &mut switched, told) {
                Err(error) if error.is_out_of_memory() => {
                    tracing::warn!(%error, "no memory is left on the device");
                    self.full.store(true, Ordering::Relaxed);
                    if !before(self)? {
                        return Err(self.give_up(job, error));
                    }
                }
                other => return other,
            }
        }
        self.attempt(job, &mut switched, told).map_err(|error| self.give_up(job, error))
    }

    /// What is free may lie in pieces. Whether another attempt may find more: always.
    fn gather_memory(&self) -> Result<bool, Error> {
        kernels::gather_memory(&self.device)?;
        Ok(true)
    }

    /// Frees what the device can do without: kept prompts, then T5 and the matrices that make the modulations, then blocks. From now on they
    /// are sent to it when they are used. Whether there was anything.
    fn save_memory(&self) -> Result<bool, Error> {
        let mut patches = self.patches();
        let forgotten = self.encoded.forget();
        kernels::forget_places(&self.device);
        kernels::forget_plans(&self.device)?;
        let config = self.flux.config();
        let mut on_host = self.on_host.lock().unwrap_or_else(PoisonError::into_inner);
        let merged = self.plan.transformer == Keep::Fp8Merged;
        let Some(away) = smaller(*on_host, [config.double_blocks, config.single_blocks]) else { return Ok(forgotten) };
        // Metal's memory is main memory; and without dense blocks on the device it would be another picture.
        if self.device.is_metal() || (merged && away.blocks_from != on_host.blocks_from) {
            return Ok(forgotten);
        }
        if !merged && patches.mode() == LoraMode::Fp8 {
            // Its pristine weights are on the device; what became of them goes, rather than they.
            patches.apply(&[], LoraMode::Auto)?;
        }
        let home = if merged { Home::Device } else { device::host_or_file(patches.bytes()) };
        patches.send_to_host(&|component, name| away.has(component, name), home)?;
        tracing::warn!(?away, "more of the model waits in main memory from now on");
        *on_host = away;
        Ok(true)
    }

    fn give_up(&self, job: &Job, error: Error) -> Error {
        if !error.is_out_of_memory() {
            return error;
        }
        self.encoded.forget();
        let tokens = self.text_tokens + job.width / 16 * (job.height / 16);
        let need = work(self.flux.config(), tokens as u64, self.dtype.size_in_bytes() as u64);
        let free = kernels::free_memory(&self.device);
        let free = free.map_or("it does not tell how much it has".into(), |free| format!("{} are free now", in_words(free)));
        Error::OutOfMemory { need, free, source: Box::new(error) }
    }

    /// The next `attempts` to run a job find no memory: for tests, which have no card to fill.
    #[doc(hidden)]
    pub fn pretend_full(&self, attempts: usize) {
        self.pretended.store(attempts, Ordering::Relaxed);
    }

    /// `switched` is what an earlier attempt did to the weights.
    fn attempt(
        &self,
        job: &Job,
        switched: &mut Option<Switch>,
        told: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Result<Finished, Error> {
        let mut timings = Timings::default();
        let mut truncated = Vec::new();
        let (mut latents, mut pictures) = (Vec::new(), Vec::new());

        let mut patches = self.patches();
        let asked = self.lora_mode(job.lora_mode);
        // Where it is not to be had, the job is what it would be without.
        let fp8 = asked == LoraMode::Fp8 && patches.can_be_fp8();
        let mode = if asked == LoraMode::Fp8 && !fp8 { LoraMode::Auto } else { asked };
        let dtype = match self.plan.transformer {
            _ if fp8 => Keep::Fp8Merged.to_string(),
            // Only a plan that nothing here makes has no room or no units for it.
            Keep::Fp8Merged => self.plan.dtype.as_str().to_owned(),
            _ => self.plan.name(),
        };
        let switch = self.timed(&mut timings.switch, || Ok(patches.apply(&job.loras, mode)?))?;
        let switch = switched.get_or_insert(switch).clone();
        tell(told, Event::Encoding)?;
        let prompts = self.timed(&mut timings.encode, || self.encode(job, &patches, &mut truncated))?;
        if self.pretended.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
            return Err(candle_core::Error::Msg("CUDA_ERROR_OUT_OF_MEMORY, pretended".into()).into());
        }
        let (rows, columns) = (job.height / 16, job.width / 16);
        let rope = Rope::new(self.flux.config(), self.text_tokens, rows, columns, &self.device)?;
        let sigmas = self.schedule.sigmas(job.steps, rows * columns);
        let first = job.start.as_ref().map_or(Ok(0), |start| sampler::first_step(job.steps, start.strength))?;
        let sigmas = &sigmas[first..];

        for (i, seed) in job.seeds().enumerate() {
            let (output, outputs) = (i + 1, job.outputs);
            let mut shown = Instant::now();
            let mut step = |step, estimate: Estimate<'_>| {
                if job.previews.is_some_and(|pause| step == 1 || shown.elapsed() >= pause) {
                    let latents = sampler::unpack(&estimate()?, rows, columns)?;
                    tell(told, Event::Preview { output, picture: &self.preview(&latents)? })?;
                    shown = Instant::now();
                }
                tell(told, Event::Step { output, outputs, step, steps: sigmas.len() - 1 })
            };
            let (packed, steps) =
                self.timed(&mut timings.denoise, || self.denoise(job, seed, &prompts, sigmas, &rope, &mut step))?;
            let as_planned = *self.on_host.lock().unwrap_or_else(PoisonError::into_inner) == self.plan.on_host;
            let planned = as_planned && dtype == self.plan.name() && prompts.negative.is_none() && !patches.has_branches();
            if planned && (job.width, job.height) == PLANNED {
                measured::note(&self.device, self.flux.config(), &self.plan, &steps);
            }
            let unpacked = sampler::unpack(&packed, rows, columns)?;
            tell(told, Event::Decoding { output, outputs })?;
            pictures.push(self.timed(&mut timings.decode, || self.decode(&unpacked))?);
            latents.push(unpacked.to_device(&Device::Cpu)?);
        }
        Ok(Finished { pictures, latents: Tensor::cat(&latents, 0)?, timings, truncated, switch, dtype })
    }

    /// One step of `job` with the weights as they are; its adapters are not looked at. An error if no numbers come of it.
    pub fn try_out(&self, job: &Job) -> Result<(), Error> {
        let _weights = self.patches();
        let (rows, columns) = (job.height / 16, job.width / 16);
        // What the text encoders can do now is a part of it, and kept prompts stay.
        let text = self.read(&job.prompt)?;
        let positive = Conditioning { txt: text.txt, pooled: text.pooled, guidance: Some(self.guidance(job)?) };
        let prompts = Prompts { positive, negative: None };
        let rope = Rope::new(self.flux.config(), self.text_tokens, rows, columns, &self.device)?;
        let (latents, _) = self.denoise(job, job.seed, &prompts, &[1.0, 0.0], &rope, &mut |_, _| Ok(()))?;
        self.decode(&sampler::unpack(&latents, rows, columns)?).map(drop)
    }

    /// What latents `(1, 16, y, x)` look like, x by y pixels.
    fn preview(&self, latents: &Tensor) -> Result<image::RgbImage, Error> {
        if self.preview.get().is_none() {
            let _ = self.preview.set(Preview::fit(&self.vae, self.dtype, &self.device)?);
        }
        self.preview.get().expect("set above").show(latents)
    }

    /// Adds the wall time of `work`, device work included, to `total`.
    fn timed<T>(&self, total: &mut Duration, work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        let start = Instant::now();
        let result = work()?;
        self.device.synchronize()?;
        *total += start.elapsed();
        Ok(result)
    }

    fn encode(&self, job: &Job, patches: &Patches, truncated: &mut Vec<Truncation>) -> Result<Prompts, Error> {
        let guidance = self.guidance(job)?;
        let mut condition = |field: &'static str, prompt: &str| {
            let text = self.encoded.of(prompt, patches, || self.read(prompt))?;
            truncated.extend(text.cut.iter().cloned().map(|(encoder, limit, lost)| Truncation { field, encoder, limit, lost }));
            Ok::<_, Error>(Conditioning { txt: text.txt, pooled: text.pooled, guidance: Some(guidance.clone()) })
        };
        let positive = condition("prompt", &job.prompt)?;
        let negative = (job.true_cfg > 1.).then(|| condition("negative_prompt", &job.negative_prompt)).transpose()?;
        Ok(Prompts { positive, negative })
    }

    fn guidance(&self, job: &Job) -> Result<Tensor, Error> {
        Ok(Tensor::new(&[job.guidance as f32], &self.device)?)
    }

    /// What the text encoders make of a prompt.
    fn read(&self, prompt: &str) -> Result<Text, Error> {
        let t5 = self.tokenizers.t5(prompt, self.text_tokens)?;
        let clip = self.tokenizers.clip(prompt)?;
        let cut = [("t5", &t5), ("clip", &clip)].into_iter();
        let cut = cut.filter_map(|(encoder, tokens)| Some((encoder, tokens.ids.len(), tokens.cut.clone()?))).collect();
        let ids = |ids: &[u32]| Tensor::new(ids, &self.device)?.unsqueeze(0);
        let (_, pooled) = self.clip.forward(&ids(&clip.ids)?)?;
        let txt = self.t5.forward(&ids(&t5.ids)?)?.to_dtype(self.dtype)?;
        Ok(Text { txt, pooled, cut })
    }

    /// Walks the sigmas, from the first to the last, which is 0 -> packed latents `(1, l_img, 64)` in f32, and what each step took.
    fn denoise(
        &self,
        job: &Job,
        seed: u64,
        prompts: &Prompts,
        sigmas: &[f32],
        rope: &Rope,
        told: &mut dyn FnMut(usize, Estimate<'_>) -> Result<(), Error>,
    ) -> Result<(Tensor, Vec<Duration>), Error> {
        let mut generator = Generator::new(job.noise, seed);
        // The reference draws the autoencoder's sample before the noise, from the same generator.
        let origin = job.start.as_ref().map(|start| self.origin(job, start, &mut generator)).transpose()?;
        let noise = sampler::pack(&generator.latents(&[1, 16, job.height / 8, job.width / 8], &self.device)?)?;
        let mut x = match &origin {
            Some(origin) => sampler::add_noise(&origin.latents, &noise, sigmas[0])?,
            None => noise.clone(),
        };
        // Through the scheduler's timestep and back, as the reference does it: the product rounds.
        let moments: Vec<f32> = sigmas[..sigmas.len() - 1].iter().map(|sigma| sigma * 1000. / 1000.).collect();
        let moments = Tensor::new(moments, &self.device)?;
        let prepare = |first: usize, conditioning| {
            let times = moments.narrow(0, first, PREPARED.min(sigmas.len() - 1 - first))?;
            self.flux.prepare(&times, conditioning)
        };
        let (mut prepared, mut times) = (None, Vec::new());
        for (step, pair) in sigmas.windows(2).enumerate() {
            if step % PREPARED == 0 {
                let negative = prompts.negative.as_ref().map(|negative| prepare(step, negative)).transpose()?;
                prepared = Some((prepare(step, &prompts.positive)?, negative));
                // Of the encoders' and the modulations' matrices; blocks are smaller.
                kernels::forget_places(&self.device);
            }
            let Some((positive, negative)) = &prepared else { unreachable!("prepared at the first step") };
            let begun = Instant::now();
            let img = x.to_dtype(self.dtype)?;
            let velocity = |prepared: &Prepared| self.flux.step(step % PREPARED, &img, prepared, rope)?.to_dtype(DType::F32);
            let velocity = match negative {
                None => velocity(positive)?,
                Some(negative) => sampler::true_cfg(&velocity(positive)?, &velocity(negative)?, job.true_cfg)?,
            };
            x = sampler::euler_step(&x, &velocity, pair[0], pair[1])?;
            if let Some(Origin { latents, mask: Some(mask) }) = &origin {
                // Outside the mask the picture is the original one, with as much noise as the next step expects.
                let kept = sampler::add_noise(latents, &noise, pair[1])?;
                x = ((mask * x)? + ((1. - mask)? * kept)?)?;
            }
            self.device.synchronize()?;
            times.push(begun.elapsed());
            told(step + 1, &|| &x - (&velocity * f64::from(pair[1]))?)?;
        }
        Ok((x, times))
    }

    /// The job's picture as packed latents, and its mask.
    fn origin(&self, job: &Job, start: &Start, generator: &mut Generator) -> Result<Origin, Error> {
        let image = pixels::from_image(&start.image, job.width, job.height, &self.device)?.to_dtype(self.dtype)?;
        let posterior = self.vae.encode_within(&image, Some(self.picture_memory()))?;
        let (mean, std) = (posterior.mean.to_dtype(DType::F32)?, posterior.std.to_dtype(DType::F32)?);
        let sample = (&mean + (std * generator.latents(mean.dims(), &self.device)?)?)?;
        let latents = sampler::pack(&self.vae.to_latents(&sample)?)?;
        let mask = start.mask.as_ref().map(|mask| pixels::latent_mask(mask, job.width, job.height, &self.device)).transpose()?;
        let mask = mask.map(|mask| sampler::pack(&mask.broadcast_as((1, 16, job.height / 8, job.width / 8))?)).transpose()?;
        Ok(Origin { latents, mask })
    }

    /// Bytes that the autoencoder's activations may take; a picture that needs more is worked on in tiles. Tiles are not exact, so what others
    /// have of the device just now decides only where there is no plan or what was planned was not there.
    fn picture_memory(&self) -> usize {
        let bytes = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        let planned = self.plan.need.map(|need| bytes(need.for_pictures()));
        match kernels::free_memory(&self.device) {
            Some(free) if planned.is_none() || self.full.load(Ordering::Relaxed) => {
                bytes(free / 10 * 9).min(planned.unwrap_or(usize::MAX))
            }
            _ => planned.unwrap_or(HOST_PICTURE_BYTES),
        }
    }

    /// latents `(1, 16, y, x)` f32 -> picture of 8 y by 8 x.
    fn decode(&self, latents: &Tensor) -> Result<image::RgbImage, Error> {
        let z = self.vae.from_latents(latents)?.to_dtype(self.dtype)?;
        pixels::to_image(&self.vae.decode_within(&z, Some(self.picture_memory()))?)
    }
}

fn tell(told: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>, event: Event<'_>) -> Result<(), Error> {
    match told(event) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::Cancelled),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// More steps than are prepared at once: each is the model's answer at its own time, as if it were the only one.
    #[test]
    fn every_step_is_made_at_its_own_time() {
        let pipeline = Pipeline::load(&models::pocket::bundle(), &Device::Cpu, DType::F32, &mut |_| {}).unwrap();
        let job = Job {
            prompt: "a red face".into(),
            negative_prompt: String::new(),
            width: 32,
            height: 32,
            steps: PREPARED + 2,
            guidance: 3.5,
            true_cfg: 1.,
            seed: 7,
            outputs: 1,
            noise: models::sampler::NoiseKind::Cpu,
            start: None,
            loras: Vec::new(),
            lora_mode: LoraMode::Auto,
            previews: None,
        };
        let prompts = pipeline.encode(&job, &pipeline.patches(), &mut Vec::new()).unwrap();
        let rope = Rope::new(pipeline.flux.config(), pipeline.text_tokens, 2, 2, &Device::Cpu).unwrap();
        let sigmas: Vec<f32> = (0..=job.steps).map(|i| 1. - i as f32 / job.steps as f32).collect();
        let (latents, times) = pipeline.denoise(&job, job.seed, &prompts, &sigmas, &rope, &mut |_, _| Ok(())).unwrap();
        assert_eq!(times.len(), job.steps);

        let noise = Generator::new(job.noise, job.seed).latents(&[1, 16, 4, 4], &Device::Cpu).unwrap();
        let alone = sigmas.windows(2).fold(sampler::pack(&noise).unwrap(), |x, pair| {
            let time = Tensor::new(&pair[..1], &Device::Cpu).unwrap();
            let velocity = pipeline.flux.forward(&x, &time, &prompts.positive, &rope).unwrap();
            sampler::euler_step(&x, &velocity, pair[0], pair[1]).unwrap()
        });
        let apart = (&latents - &alone).unwrap().sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        let norm = alone.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(apart <= norm * 1e-8, "{apart} of {norm}");
    }
}
