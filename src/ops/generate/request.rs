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

/// Number format of the model: what it computes in, or what its large matrices are kept as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    F32,
    Bf16,
    F16,
    /// e4m3 with a scale for each row.
    Fp8,
    /// The same, with activations of e4m3 in the products.
    Fp8Products,
    /// The same, made of dense weights that LoRAs were merged into.
    Fp8Merged,
    /// GGUF blocks.
    Q8_0,
    Q6K,
    Q5K,
    Q4K,
    Q4_0,
}

impl Precision {
    pub const ALL: [(&str, Self); 11] = [
        ("f32", Self::F32),
        ("bf16", Self::Bf16),
        ("f16", Self::F16),
        ("fp8", Self::Fp8),
        ("fp8-products", Self::Fp8Products),
        ("fp8-merged", Self::Fp8Merged),
        ("q8_0", Self::Q8_0),
        ("q6_k", Self::Q6K),
        ("q5_k", Self::Q5K),
        ("q4_k", Self::Q4K),
        ("q4_0", Self::Q4_0),
    ];

    /// As `--dtype` calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, one)| *one == self).map_or("", |(name, _)| name)
    }

    /// What the device computes in if nothing is asked for.
    #[must_use]
    pub fn of(device: &Device) -> Self {
        match engine::default_dtype(device) {
            DType::BF16 => Self::Bf16,
            DType::F16 => Self::F16,
            _ => Self::F32,
        }
    }

    /// What is computed in; the device's own choice for those that say only what is kept.
    #[must_use]
    pub fn dtype(self) -> Option<DType> {
        match self {
            Self::F32 => Some(DType::F32),
            Self::Bf16 => Some(DType::BF16),
            Self::F16 => Some(DType::F16),
            Self::Fp8 | Self::Fp8Products | Self::Fp8Merged => None,
            Self::Q8_0 | Self::Q6K | Self::Q5K | Self::Q4K | Self::Q4_0 => None,
        }
    }

    /// Errors if the device has no values of this kind, or no units for such products.
    pub fn fits(self, device: &Device) -> Result<(), Error> {
        if self.keep().is_fp8() && device.is_metal() {
            return Err(Error::invalid("dtype", &self.name(), "q8_0, or another: Metal has no e4m3 (files in fp8 are read)"));
        }
        if !matches!(self, Self::Fp8Products | Self::Fp8Merged) || kernels::has_fp8_products(device) {
            return Ok(());
        }
        let allowed =
            "fp8, or another: this device has no units for products in e4m3 (cards of compute capability 8.9 and newer have)";
        Err(Error::invalid("dtype", &self.name(), allowed))
    }

    /// Errors if LoRAs cannot act in this way on such weights.
    pub fn allows(self, mode: LoraMode) -> Result<(), Error> {
        if self != Self::Fp8Merged || mode == LoraMode::Auto {
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
        match self {
            Self::F32 | Self::Bf16 | Self::F16 => Keep::Stored,
            Self::Fp8 => Keep::Fp8,
            Self::Fp8Products => Keep::Fp8Products,
            Self::Fp8Merged => Keep::Fp8Merged,
            Self::Q8_0 => Keep::Gguf(GgmlDType::Q8_0),
            Self::Q6K => Keep::Gguf(GgmlDType::Q6K),
            Self::Q5K => Keep::Gguf(GgmlDType::Q5K),
            Self::Q4K => Keep::Gguf(GgmlDType::Q4K),
            Self::Q4_0 => Keep::Gguf(GgmlDType::Q4_0),
        }
    }
}

impl FromStr for Precision {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.iter().find(|(name, _)| *name == text).map(|(_, precision)| *precision);
        known.ok_or_else(|| format!("must be one of {}", Self::ALL.map(|(name, _)| name).join(", ")))
    }
}
