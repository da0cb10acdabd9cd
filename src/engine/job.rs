//! What the engine is asked for and what it gives back. A [`Job`] is valid: `ops` checks requests and fills in defaults.

use std::time::Duration;

use candle_core::Tensor;
use image::{GrayImage, RgbImage};
pub use models::lora::{Adapter, Mode as LoraMode, Scales, Selected, Switch};
pub use models::sampler::NoiseKind;

/// One request, complete: the same job on the same device and build gives the same bytes.
#[derive(Debug, Clone)]
pub struct Job {
    pub prompt: String,
    /// Read only where `true_cfg` is above 1.
    pub negative_prompt: String,
    /// Pixels, multiples of 16.
    pub width: usize,
    pub height: usize,
    /// At least 1.
    pub steps: usize,
    /// Distilled guidance; ignored by models without a guidance embedding.
    pub guidance: f64,
    /// Classifier-free guidance with a second forward per step; 1 is off.
    pub true_cfg: f64,
    /// Output i uses seed + i, so that any one picture can be made again alone.
    pub seed: u64,
    /// At least 1.
    pub outputs: usize,
    pub noise: NoiseKind,
    pub start: Option<Start>,
    /// On the weights for this job alone, in this order.
    pub loras: Vec<Selected>,
    pub lora_mode: LoraMode,
    /// Show what is to come, but not more often than this.
    pub previews: Option<Duration>,
}

impl Job {
    /// The seed of each output.
    pub fn seeds(&self) -> impl Iterator<Item = u64> {
        (0..self.outputs as u64).map(|i| self.seed.wrapping_add(i))
    }
}

/// A picture to start from.
#[derive(Debug, Clone)]
pub struct Start {
    /// Any size; scaled to the job's.
    pub image: RgbImage,
    /// White is painted anew, black is kept. Any size; scaled to the job's.
    pub mask: Option<GrayImage>,
    /// 0 < strength <= 1: how much of the way from noise is walked.
    pub strength: f64,
}

/// What the engine is doing, told as it happens. Answering `ControlFlow::Break` cancels the job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'a> {
    Encoding,
    /// `step` of `steps` of output `output` (all from 1) is finished.
    Step {
        output: usize,
        outputs: usize,
        step: usize,
        steps: usize,
    },
    /// What output `output` will look like, an eighth of its size, if the job asks for it.
    Preview {
        output: usize,
        picture: &'a RgbImage,
    },
    Decoding {
        output: usize,
        outputs: usize,
    },
}

/// Wall time of each stage of one job.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timings {
    /// Putting the job's LoRAs on the weights, and those of the job before off.
    pub switch: Duration,
    pub encode: Duration,
    pub denoise: Duration,
    pub decode: Duration,
}

/// A prompt that was longer than an encoder reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Truncation {
    /// `prompt` or `negative_prompt`.
    pub field: &'static str,
    /// `t5` or `clip`.
    pub encoder: &'static str,
    /// Tokens that the encoder reads, its end mark included.
    pub limit: usize,
    /// The text that was cut off.
    pub lost: String,
}

/// A finished job.
#[derive(Debug)]
pub struct Finished {
    pub pictures: Vec<RgbImage>,
    /// f32 `(outputs, 16, height / 8, width / 8)`: before the autoencoder's scale and shift are undone.
    pub latents: Tensor,
    pub timings: Timings,
    pub truncated: Vec<Truncation>,
    pub switch: Switch,
    /// What the transformer's large matrices were, as `--dtype` calls it.
    pub dtype: String,
}
