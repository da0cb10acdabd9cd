//! The forward pass of FLUX.1.

use candle_core::{D, Tensor};
use serde_json::Value;

use super::blocks::EPS;
use super::embed::Embedding;
use super::{Config, DoubleBlock, Rope, SingleBlock};
use crate::Result;
use crate::nn::Linear;
use crate::weights::{Error, Source};

/// What a prompt becomes, and where the tokens stand: the same for every step.
#[derive(Debug, Clone)]
pub struct Conditioning {
    /// T5's output `(b, l_txt, d_t5)`.
    pub txt: Tensor,
    /// CLIP's pooled output `(b, d_clip)`.
    pub pooled: Tensor,
    /// `(b)`; needed by models with a guidance embedding, ignored by others.
    pub guidance: Option<Tensor>,
}

/// The transformer: predicts the velocity from data to noise.
#[derive(Debug, Clone)]
pub struct Flux {
    config: Config,
    img_in: Linear,
    txt_in: Linear,
    embedding: Embedding,
    double_blocks: Vec<DoubleBlock>,
    single_blocks: Vec<SingleBlock>,
    final_modulation: Linear,
    final_linear: Linear,
}

impl Flux {
    /// `json` is the component's `config.json`, if there is one.
    pub fn load(source: &Source, json: Option<&Value>) -> Result<Self, Error> {
        Self::with_config(source, Config::read(source, json)?)
    }

    /// A transformer of given sizes.
    pub fn with_config(source: &Source, config: Config) -> Result<Self, Error> {
        let (d, channels) = (config.hidden, config.channels);
        let double = |i| DoubleBlock::load(&source.at(format_args!("double_blocks.{i}")), &config);
        let single = |i| SingleBlock::load(&source.at(format_args!("single_blocks.{i}")), &config);
        Ok(Self {
            img_in: source.linear("img_in", d, channels)?,
            txt_in: source.linear("txt_in", d, config.text_width)?,
            embedding: Embedding::load(source, &config)?,
            double_blocks: (0..config.double_blocks).map(double).collect::<Result<_, _>>()?,
            single_blocks: (0..config.single_blocks).map(single).collect::<Result<_, _>>()?,
            final_modulation: source.linear("final_layer.adaLN_modulation.1", 2 * d, d)?,
            final_linear: source.linear("final_layer.linear", channels, d)?,
            config,
        })
    }

    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Packed latents img `(b, l_img, 64)`, time `(b)` in 0..=1 (1 is noise) -> velocity `(b, l_img, 64)` in img's dtype.
    pub fn forward(&self, img: &Tensor, time: &Tensor, conditioning: &Conditioning, rope: &Rope) -> Result<Tensor> {
        let Conditioning { txt, pooled, guidance } = conditioning;
        let vec = self.embedding.forward(time, guidance.as_ref(), pooled)?.silu()?; // (b, d)
        let (mut img, mut txt) = (self.img_in.forward(img)?, self.txt_in.forward(txt)?);

        for block in &self.double_blocks {
            (img, txt) = block.forward(&img, &txt, &vec, rope)?;
        }
        let mut x = Tensor::cat(&[&txt, &img], 1)?; // (b, l_txt + l_img, d)
        for block in &self.single_blocks {
            x = block.forward(&x, &vec, rope)?;
        }
        let img = x.narrow(1, txt.dim(1)?, img.dim(1)?)?;
        self.finish(&img, &vec)
    }

    /// img `(b, l_img, d)`, vec `(b, d)` after SiLU -> `(b, l_img, 64)`.
    #[doc(hidden)]
    pub fn finish(&self, img: &Tensor, vec: &Tensor) -> Result<Tensor> {
        let parts = self.final_modulation.forward(vec)?.unsqueeze(1)?.chunk(2, D::Minus1)?;
        let (shift, scale) = (&parts[0], &parts[1]);
        self.final_linear.forward(&kernels::modulated_norm(img, scale, shift, EPS)?)
    }
}
