//! What a user sends. Everything left out is filled in from the model's card.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use candle_core::DType;

use crate::engine::{LoraMode, NoiseKind};
use crate::image::Format;
use crate::ops::lora::Lora;
use crate::ops::{AspectRatio, Megapixels};
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

/// Number format that the model computes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    F32,
    Bf16,
    F16,
}

impl Precision {
    pub const NAMES: [&str; 3] = ["f32", "bf16", "f16"];

    #[must_use]
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        }
    }
}

impl FromStr for Precision {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            "f16" => Ok(Self::F16),
            _ => Err(format!("must be one of {}", Self::NAMES.join(", "))),
        }
    }
}
