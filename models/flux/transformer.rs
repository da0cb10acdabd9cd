//! The forward pass of FLUX.1.

use candle_core::{D, Tensor};
use serde_json::Value;

use super::blocks::EPS;
use super::embed::Embedding;
use super::{Config, DoubleBlock, Rope, SingleBlock};
use crate::Result;
use crate::nn::Linear;
use crate::weights::{Error, Source};

/// What a prompt becomes: the same for every step.
#[derive(Debug, Clone)]
pub struct Conditioning {
    /// T5's output `(b, l_txt, d_t5)`.
    pub txt: Tensor,
    /// CLIP's pooled output `(b, d_clip)`.
    pub pooled: Tensor,
    /// `(b)`; needed by models with a guidance embedding, ignored by others.
    pub guidance: Option<Tensor>,
}

/// What the steps of a walk need besides its latents, for all its times at once. None of it depends on the latents, so the weights that
/// make it (27 % of FLUX.1's) are read once for a picture instead of once a step.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// `(b, l_txt, d)`.
    txt: Tensor,
    /// Of each block, a row for every time: `(n, 6 d)` for img and txt, `(n, 3 d)`.
    double: Vec<[Tensor; 2]>,
    single: Vec<Tensor>,
    /// Of the final layer, `(n, 2 d)`.
    last: Tensor,
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

    /// One step by itself, of packed latents img `(b, l_img, 64)`, time `(b)` in 0..=1 (1 is noise) -> velocity `(b, l_img, 64)` in img's dtype.
    pub fn forward(&self, img: &Tensor, time: &Tensor, conditioning: &Conditioning, rope: &Rope) -> Result<Tensor> {
        self.step(0, img, &self.prepare(time, conditioning)?, rope)
    }

    /// times `(n)` in 0..=1, of one picture at n steps or of n pictures at one.
    pub fn prepare(&self, times: &Tensor, conditioning: &Conditioning) -> Result<Prepared> {
        let Conditioning { txt, pooled, guidance } = conditioning;
        let vec = self.embedding.forward(times, guidance.as_ref(), pooled)?.silu()?; // (n, d)
        Ok(Prepared {
            txt: self.txt_in.forward(txt)?,
            double: self.double_blocks.iter().map(|block| block.modulation(&vec)).collect::<Result<_>>()?,
            single: self.single_blocks.iter().map(|block| block.modulation(&vec)).collect::<Result<_>>()?,
            last: self.final_modulation.forward(&vec)?,
        })
    }

    /// One step: packed latents img `(b, l_img, 64)` at the `index`-th time -> velocity `(b, l_img, 64)` in img's dtype.
    pub fn step(&self, index: usize, img: &Tensor, prepared: &Prepared, rope: &Rope) -> Result<Tensor> {
        let b = img.dim(0)?;
        let now = |rows: &Tensor| rows.narrow(0, index * b, b);
        let (mut img, mut txt) = (self.img_in.forward(img)?, prepared.txt.clone());

        for (block, [of_img, of_txt]) in self.double_blocks.iter().zip(&prepared.double) {
            (img, txt) = block.forward(&img, &txt, [&now(of_img)?, &now(of_txt)?], rope)?;
        }
        let mut x = Tensor::cat(&[&txt, &img], 1)?; // (b, l_txt + l_img, d)
        for (block, modulation) in self.single_blocks.iter().zip(&prepared.single) {
            x = block.forward(&x, &now(modulation)?, rope)?;
        }
        let img = x.narrow(1, txt.dim(1)?, img.dim(1)?)?;
        self.finish(&img, &now(&prepared.last)?)
    }

    /// img `(b, l_img, d)`, modulation `(b, 2 d)` -> `(b, l_img, 64)`.
    fn finish(&self, img: &Tensor, modulation: &Tensor) -> Result<Tensor> {
        let parts = modulation.unsqueeze(1)?.chunk(2, D::Minus1)?;
        let (shift, scale) = (&parts[0], &parts[1]);
        self.final_linear.forward(&kernels::modulated_norm(img, scale, shift, EPS)?)
    }

    /// The final layer alone: img `(b, l_img, d)`, vec `(b, d)` after SiLU -> `(b, l_img, 64)`.
    #[doc(hidden)]
    pub fn final_layer(&self, img: &Tensor, vec: &Tensor) -> Result<Tensor> {
        self.finish(img, &self.final_modulation.forward(vec)?)
    }
}
