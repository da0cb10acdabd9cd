//! What a user sends. Everything left out is filled in from the model's card.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device};
use models::weights::Keep;

use crate::engine::{self, LoraMode, NoiseKind};
use crate::image::Format;
use crate::ops::lora::Lora;
use crate::ops::{AspectRatio, Error, Megapixels};
use crate::prompt::Policy;

/// A wish for pictures, unchecked.
#[derive(Debug, Clone, Default)]
pub struct Request {
    pub prompt: String,
    pub negative_prompt: Option<String>,
    pub width: Option<usize>,
    pub height: Option<usize>,
    pub aspect_ratio: Option<AspectRatio>,
    pub megapixels: Option<Megapixels>,
    pub steps: Option<usize>,
    pub guidance: Option<f64>,
    pub true_cfg: Option<f64>,
    /// Random if not given.
    pub seed: Option<u64>,
    pub outputs: Option<usize>,
    pub noise: Option<NoiseKind>,
    pub image: Option<Picture>,
    pub mask: Option<Picture>,
    pub prompt_strength: Option<f64>,
    /// In this order.
    pub loras: Vec<Lora>,
    pub lora_mode: LoraMode,
    /// Of the LoRAs, where the prompt should name their subject.
    pub trigger_word: Option<String>,
    pub trigger_policy: Policy,
    /// Strip markdown and an assistant's chatter from the prompt.
    pub clean_prompt: bool,
    /// Show what is to come, but not more often than this.
    pub previews: Option<std::time::Duration>,
}

/// An encoded picture and what to call it in messages.
#[derive(Clone)]
pub struct Picture {
    pub name: String,
    pub bytes: Vec<u8>,
}

impl fmt::Debug for Picture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Picture({}, {} bytes)", self.name, self.bytes.len())
    }
}

/// Where pictures go, and how they are written.
#[derive(Debug, Clone)]
pub struct Output {
    /// A file, or a folder for generated names; the current folder if not given.
    pub path: Option<PathBuf>,
    /// That of the path's extension if not given, else PNG.
    pub format: Option<Format>,
    /// 0 to 100, for the lossy formats.
    pub quality: Option<usize>,
    /// Replace files that are there.
    pub force: bool,
    /// Write the settings into the pictures.
    pub metadata: bool,
    /// A safetensors file for the final latents.
    pub latents: Option<PathBuf>,
}

/// Number format of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// What it computes in: f32, bf16 or f16.
    Dense(DType),
    /// What its large matrices are kept as; what is computed in is the device's own choice.
    Kept(Keep),
}

impl Precision {
    pub const ALL: [Self; 11] = [
        Self::Dense(DType::F32),
        Self::Dense(DType::BF16),
        Self::Dense(DType::F16),
        Self::Kept(Keep::Fp8),
        Self::Kept(Keep::Fp8Products),
        Self::Kept(Keep::Fp8Merged),
        Self::Kept(Keep::Gguf(GgmlDType::Q8_0)),
        Self::Kept(Keep::Gguf(GgmlDType::Q6K)),
        Self::Kept(Keep::Gguf(GgmlDType::Q5K)),
        Self::Kept(Keep::Gguf(GgmlDType::Q4K)),
        Self::Kept(Keep::Gguf(GgmlDType::Q4_0)),
    ];

    /// As `--dtype` calls it.
    #[must_use]
    pub fn name(self) -> String {
        match self {
            Self::Dense(dtype) => dtype.as_str().to_owned(),
            Self::Kept(keep) => keep.to_string(),
        }
    }

    /// What the device computes in if nothing is asked for.
    #[must_use]
    pub fn of(device: &Device) -> Self {
        Self::Dense(engine::default_dtype(device))
    }

    /// What is computed in; `None` for the device's own choice.
    #[must_use]
    pub fn dtype(self) -> Option<DType> {
        if let Self::Dense(dtype) = self { Some(dtype) } else { None }
    }

    /// Errors if the device has no values of this kind, or no units for such products.
    pub fn fits(self, device: &Device) -> Result<(), Error> {
        if self.keep().is_fp8() && device.is_metal() {
            return Err(Error::invalid("dtype", &self.name(), "q8_0, or another: Metal has no e4m3 (files in fp8 are read)"));
        }
        if !matches!(self.keep(), Keep::Fp8Products | Keep::Fp8Merged) || kernels::has_fp8_products(device) {
            return Ok(());
        }
        let allowed =
            "fp8, or another: this device has no units for products in e4m3 (cards of compute capability 8.9 and newer have)";
        Err(Error::invalid("dtype", &self.name(), allowed))
    }

    /// Errors if LoRAs cannot act in this way on such weights.
    pub fn allows(self, mode: LoraMode) -> Result<(), Error> {
        if self.keep() != Keep::Fp8Merged || mode == LoraMode::Auto {
            return Ok(());
        }
        let problem = format!(
            "{:?} was given with dtype fp8-merged, which merges LoRAs before it rounds",
            format!("{mode:?}").to_lowercase()
        );
        Err(Error::Combination { field: "lora_mode", problem, hint: "leave it out, or give dtype fp8-products".into() })
    }

    /// What the transformer's large matrices are kept as.
    #[must_use]
    pub fn keep(self) -> Keep {
        if let Self::Kept(keep) = self { keep } else { Keep::Stored }
    }
}

impl FromStr for Precision {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|precision| precision.name() == text);
        known.ok_or_else(|| format!("must be one of {}", Self::ALL.map(Self::name).join(", ")))
    }
}
