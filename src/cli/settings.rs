//! The settings that `generate` and `sweep` take alike.

use std::path::PathBuf;

use anyhow::Context;

use crate::engine::{DeviceChoice, LoraMode, NoiseKind};
use crate::ops::Machine;
use crate::ops::{AspectRatio, Megapixels};

/// What stays the same for all pictures of a command.
#[derive(Debug, clap::Args)]
pub(super) struct Settings {
    /// The scale for the LoRAs' text encoder parts [default: each LoRA's own scale]
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true, help_heading = "LoRA")]
    pub(super) lora_text_scale: Option<f64>,

    /// A factor for each block: 57 numbers, or ranges such as double:0-18=1,single:20-37=0.5
    #[arg(long, value_name = "FACTORS", help_heading = "LoRA")]
    pub(super) lora_blocks: Option<String>,

    /// auto (merged into dense weights, beside fp8 and GGUF ones), merge or branch [default: auto]
    #[arg(long, value_name = "MODE", help_heading = "LoRA")]
    pub(super) lora_mode: Option<LoraMode>,

    /// The word that calls the LoRA's subject; it is put into the prompt
    #[arg(long, value_name = "WORD", help_heading = "LoRA")]
    pub(super) trigger_word: Option<String>,

    /// Strip markdown and an assistant's leading chatter from the prompt
    #[arg(long, help_heading = "Guidance")]
    pub(super) clean_prompt: bool,

    /// What to keep out of the picture; needs --true-cfg above 1
    #[arg(long, value_name = "TEXT", help_heading = "Guidance")]
    pub(super) negative_prompt: Option<String>,

    /// Instead of width and height: 1:1, 16:9, 21:9, 3:2, 2:3, 4:5, 5:4, 3:4, 4:3, 9:16 or 9:21
    #[arg(long, value_name = "W:H", help_heading = "Size")]
    pub(super) aspect_ratio: Option<AspectRatio>,

    /// With --aspect-ratio: 1 for the model's own area (1 megapixel for FLUX.1), 0.25 for half of each side
    #[arg(long, value_name = "1|0.25", help_heading = "Size")]
    pub(super) megapixels: Option<Megapixels>,

    /// Whose noise a seed gives: cpu (as diffusers on CPU and ComfyUI) or cuda (as a PyTorch CUDA generator) [default: cpu]
    #[arg(long, value_name = "cpu|cuda", help_heading = "Sampling")]
    pub(super) noise: Option<NoiseKind>,

    /// A picture to start from: PNG, JPEG or WebP, scaled to the size of the output
    #[arg(long, value_name = "FILE", help_heading = "From a picture")]
    pub(super) image: Option<PathBuf>,

    /// With --image: paint anew only where this picture is white
    #[arg(long, value_name = "FILE", help_heading = "From a picture")]
    pub(super) mask: Option<PathBuf>,

    /// auto, cpu, cuda, cuda:1 (the second card) or metal
    #[arg(long, value_name = "DEVICE", value_parser = device, default_value = "auto", help_heading = "Device")]
    pub(super) device: DeviceChoice,

    /// How much of the card may be used, such as 12GiB; the model is made to fit. With a CPU: follow that card's plan [default: all
    /// that is free]
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = "Device")]
    pub(super) vram_limit: Option<u64>,
}

impl Settings {
    pub(super) fn machine(&self) -> Machine {
        Machine { device: self.device, vram_limit: self.vram_limit }
    }
}

/// Bytes, or with a unit: `12GiB`, `12GB`, `500MB`.
pub(super) fn size(text: &str) -> anyhow::Result<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1e0,
        "mb" | "m" => 1e6,
        "gb" | "g" => 1e9,
        "mib" => f64::from(1 << 20),
        "gib" => f64::from(1 << 30),
        _ => anyhow::bail!("must be a size such as 12GiB, 12GB or 500MB"),
    };
    let number: f64 = number.parse().context("must be a size such as 12GiB, 12GB or 500MB")?;
    let bytes = number * unit;
    anyhow::ensure!(bytes >= 1e6, "must be a size such as 12GiB, of at least 1 MB");
    Ok(bytes as u64)
}

pub(super) fn device(text: &str) -> anyhow::Result<DeviceChoice> {
    match (text, text.strip_prefix("cuda:")) {
        ("auto", _) => Ok(DeviceChoice::Auto),
        ("cpu", _) => Ok(DeviceChoice::Cpu),
        ("cuda", _) => Ok(DeviceChoice::Cuda(0)),
        ("metal", _) => Ok(DeviceChoice::Metal),
        (_, Some(number)) => Ok(DeviceChoice::Cuda(number.parse().context("the card's number must be a whole number from 0")?)),
        _ => anyhow::bail!("must be auto, cpu, cuda, cuda:N or metal"),
    }
}
