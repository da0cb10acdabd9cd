//! CLIP with both of its towers: pictures and texts as vectors that can be compared. The network is candle-transformers'.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::clip::text_model::{Activation, ClipTextConfig};
use candle_transformers::models::clip::vision_model::ClipVisionConfig;
use candle_transformers::models::clip::{ClipConfig, ClipModel};
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::Result;

/// What the published models were trained with: means and deviations of the channels, 0 to 1.
const MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const DEVIATION: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

/// Both towers and their projections.
#[derive(Debug)]
pub struct Clip {
    model: ClipModel,
    tokenizer: Tokenizer,
    /// Of the square pictures that it reads, in pixels.
    side: usize,
    /// Most tokens of a text.
    length: usize,
    device: Device,
}

impl Clip {
    /// From the files of a transformers folder: `model.safetensors`, `config.json`, `tokenizer.json`. Computed in f32.
    pub fn load(weights: &Path, config: &Path, tokenizer: &Path, device: &Device) -> Result<Self> {
        let text = std::fs::read_to_string(config).map_err(|error| wrong(config, &error))?;
        let config: Value = serde_json::from_str(&text).map_err(|error| wrong(config, &error))?;
        let config = sizes(&config)?;
        let tensors = candle_core::safetensors::load(weights, device)?;
        let model = ClipModel::new(VarBuilder::from_tensors(tensors, DType::F32, device), &config)?;
        let tokenizer = Tokenizer::from_file(tokenizer).map_err(|error| wrong(tokenizer, &error))?;
        let (side, length) = (config.image_size, config.text_config.max_position_embeddings);
        Ok(Self { model, tokenizer, side, length, device: device.clone() })
    }

    /// Side of the pictures that [`Self::picture`] reads.
    #[must_use]
    pub fn side(&self) -> usize {
        self.side
    }

    /// The vector, of length 1, of a square picture of that side: RGB, row by row.
    pub fn picture(&self, rgb: &[u8]) -> Result<Vec<f32>> {
        let pixels = Tensor::from_slice(rgb, (self.side, self.side, 3), &Device::Cpu)?.to_dtype(DType::F32)?;
        let channels = |values: [f32; 3]| Tensor::new(&values, &Device::Cpu);
        let normed = (pixels / 255.)?.broadcast_sub(&channels(MEAN)?)?.broadcast_div(&channels(DEVIATION)?)?;
        let pixels = normed.permute((2, 0, 1))?.unsqueeze(0)?.contiguous()?.to_device(&self.device)?;
        unit(&self.model.get_image_features(&pixels)?)
    }

    /// The vector, of length 1, of a text; what is beyond the model's limit is not read.
    pub fn text(&self, text: &str) -> Result<Vec<f32>> {
        let encoding = self.tokenizer.encode(text, true).map_err(candle_core::Error::wrap)?;
        let mut ids = encoding.get_ids().to_vec();
        if let Some(end) = ids.last().copied().filter(|_| ids.len() > self.length) {
            ids.truncate(self.length - 1);
            ids.push(end);
        }
        let ids = Tensor::new(ids, &self.device)?.unsqueeze(0)?;
        unit(&self.model.get_text_features(&ids)?)
    }
}

fn unit(vector: &Tensor) -> Result<Vec<f32>> {
    let values: Vec<f32> = vector.flatten_all()?.to_vec1()?;
    let length = values.iter().map(|value| value * value).sum::<f32>().sqrt();
    Ok(values.into_iter().map(|value| value / length).collect())
}

fn wrong(path: &Path, error: &dyn std::fmt::Display) -> candle_core::Error {
    candle_core::Error::Msg(format!("{}: {error}", path.display()))
}

/// What config.json says of both towers; what it leaves out is as in the first published model.
fn sizes(config: &Value) -> Result<ClipConfig> {
    let number = |tower: &str, name: &str, default: Option<usize>| {
        let value = config[tower][name].as_u64().and_then(|value| usize::try_from(value).ok()).or(default);
        value.ok_or_else(|| candle_core::Error::Msg(format!("config.json of CLIP has no {tower}.{name}")))
    };
    let activation = |tower: &str| match config[tower]["hidden_act"].as_str() {
        None | Some("quick_gelu") => Ok(Activation::QuickGelu),
        Some(other) => Err(candle_core::Error::Msg(format!("CLIP with the activation {other} is not known"))),
    };
    // Beside the towers, and in files of old also in them.
    let projection_dim = config["projection_dim"].as_u64().and_then(|width| usize::try_from(width).ok()).unwrap_or(512);
    let text_config = ClipTextConfig {
        vocab_size: number("text_config", "vocab_size", Some(49_408))?,
        embed_dim: number("text_config", "hidden_size", None)?,
        activation: activation("text_config")?,
        intermediate_size: number("text_config", "intermediate_size", None)?,
        max_position_embeddings: number("text_config", "max_position_embeddings", Some(77))?,
        pad_with: None,
        num_hidden_layers: number("text_config", "num_hidden_layers", Some(12))?,
        num_attention_heads: number("text_config", "num_attention_heads", None)?,
        projection_dim,
    };
    let image_size = number("vision_config", "image_size", Some(224))?;
    let vision_config = ClipVisionConfig {
        embed_dim: number("vision_config", "hidden_size", None)?,
        activation: activation("vision_config")?,
        intermediate_size: number("vision_config", "intermediate_size", None)?,
        num_hidden_layers: number("vision_config", "num_hidden_layers", Some(12))?,
        num_attention_heads: number("vision_config", "num_attention_heads", None)?,
        projection_dim,
        num_channels: 3,
        image_size,
        patch_size: number("vision_config", "patch_size", None)?,
    };
    Ok(ClipConfig { text_config, vision_config, logit_scale_init_value: 2.6592, image_size })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_read_as_transformers_reads_them() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/sweep");
        let path = |name: &str| folder.join("clip").join(name);
        let clip = Clip::load(&path("model.safetensors"), &path("config.json"), &path("tokenizer.json"), &Device::Cpu).unwrap();
        assert_eq!(clip.side(), 32);
        let expected: Value = serde_json::from_str(&std::fs::read_to_string(folder.join("clip.json")).unwrap()).unwrap();
        for (i, text) in expected["texts"].as_array().unwrap().iter().enumerate() {
            let found = clip.text(text.as_str().unwrap()).unwrap();
            for (j, value) in found.iter().enumerate() {
                let expected = expected["text"][i][j].as_f64().unwrap();
                assert!((f64::from(*value) - expected).abs() < 1e-5, "text {i}, {j}: {value}, not {expected}");
            }
        }
    }
}
