//! One layer of the CLIP text encoder: causal self-attention and a feed-forward, each after a norm.

use candle_core::Tensor;

use super::Sizes;
use crate::Result;
use crate::nn::{LayerNorm, Linear, attention};
use crate::weights::{Config, Error, Source};

/// The feed-forward's nonlinearity.
#[derive(Debug, Clone, Copy)]
pub(super) enum Activation {
    /// `x * sigmoid(1.702 x)`, as OpenAI trained CLIP.
    QuickGelu,
    /// The exact gelu of later trainings.
    Gelu,
}

impl Activation {
    pub(super) fn read(config: &Config) -> Result<Self, Error> {
        match config.text("hidden_act", "quick_gelu")? {
            "quick_gelu" => Ok(Self::QuickGelu),
            "gelu" => Ok(Self::Gelu),
            other => Err(config.contradiction(format!("hidden_act is {other}; known are quick_gelu and gelu"))),
        }
    }

    fn forward(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::QuickGelu => x * candle_nn::ops::sigmoid(&(x * 1.702)?)?,
            Self::Gelu => x.gelu_erf(),
        }
    }
}

#[derive(Debug)]
pub(super) struct Layer {
    attention_norm: LayerNorm,
    attention: SelfAttention,
    feed_norm: LayerNorm,
    up: Linear,
    activation: Activation,
    down: Linear,
}

impl Layer {
    pub(super) fn load(source: &Source, sizes: Sizes) -> Result<Self, Error> {
        let Sizes { d, d_ff, eps, activation, .. } = sizes;
        let feed = source.at("mlp");
        Ok(Self {
            attention_norm: LayerNorm::load(&source.at("layer_norm1"), d, eps)?,
            attention: SelfAttention::load(&source.at("self_attn"), sizes)?,
            feed_norm: LayerNorm::load(&source.at("layer_norm2"), d, eps)?,
            up: feed.linear("fc1", d_ff, d)?,
            activation,
            down: feed.linear("fc2", d, d_ff)?,
        })
    }

    /// x `(b, l, d)`, mask `(1, 1, l, l)` -> `(b, l, d)`.
    pub(super) fn forward(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let x = (x + self.attention.forward(&self.attention_norm.forward(x)?, mask)?)?;
        let up = self.up.forward(&self.feed_norm.forward(&x)?)?; // (b, l, d_ff)
        let down = self.down.forward(&self.activation.forward(&up)?)?;
        x + down
    }
}

#[derive(Debug)]
struct SelfAttention {
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    heads: usize,
}

impl SelfAttention {
    fn load(source: &Source, Sizes { d, heads, .. }: Sizes) -> Result<Self, Error> {
        Ok(Self {
            q: source.linear("q_proj", d, d)?,
            k: source.linear("k_proj", d, d)?,
            v: source.linear("v_proj", d, d)?,
            out: source.linear("out_proj", d, d)?,
            heads,
        })
    }

    fn forward(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (b, l, d) = x.dims3()?;
        let e = d / self.heads;
        let split = |x: Tensor| x.reshape((b, l, self.heads, e))?.transpose(1, 2); // (b, h, l, e)
        let (q, k, v) = (split(self.q.forward(x)?)?, split(self.k.forward(x)?)?, split(self.v.forward(x)?)?);
        let scale = (e as f64).powf(-0.5);
        let attended = attention(&q, &k, &v, scale, Some(mask))?;
        self.out.forward(&attended.transpose(1, 2)?.reshape((b, l, d))?) // heads side by side again
    }
}
