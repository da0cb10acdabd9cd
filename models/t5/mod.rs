//! The T5 v1.1 encoder that reads FLUX's prompt.
//!
//! Follows transformers 5.23.0, `models/t5/modeling_t5.py`. Names are transformers'; every size is read from the weights.

mod attention;
mod position;

use candle_core::{DType, Tensor};

use crate::Result;
use crate::nn::{Embedding, Linear, RmsNorm};
use crate::weights::{Component, Config, Error, Source};
use attention::SelfAttention;
use position::RelativeBias;

/// Epsilon of every norm, unless config.json says otherwise.
const NORM_EPS: f64 = 1e-6;

/// Sizes of one block.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    /// Width of the residual stream.
    d: usize,
    /// Heads and the width of one; their product need not be `d`.
    heads: usize,
    e: usize,
    /// Width inside the feed-forward.
    d_ff: usize,
    eps: f32,
}

/// Embedding, blocks, final norm.
#[derive(Debug)]
pub struct T5Encoder {
    tokens: Embedding,
    bias: RelativeBias,
    blocks: Vec<Block>,
    norm: RmsNorm,
    dtype: DType,
}

impl T5Encoder {
    /// Errors if the weights are not a T5 v1.1 encoder or `config` (the content of config.json) contradicts them.
    pub fn load(source: &Source, config: Option<&serde_json::Value>) -> Result<Self, Error> {
        let config = Config::new(Component::T5, config);
        let (sizes, vocabulary, buckets, layers) = read_sizes(source, &config)?;
        let table = if source.contains("shared.weight") { "shared.weight" } else { "encoder.embed_tokens.weight" };
        let encoder = source.at("encoder");
        let first = encoder.at("block.0.layer.0.SelfAttention");
        Ok(Self {
            tokens: Embedding::load(source, table, vocabulary, sizes.d)?,
            bias: RelativeBias::load(&first, buckets, sizes.heads, &config)?,
            blocks: (0..layers).map(|i| Block::load(&encoder.at(format_args!("block.{i}")), sizes)).collect::<Result<_, _>>()?,
            norm: RmsNorm::load(&encoder, "final_layer_norm.weight", sizes.d, sizes.eps)?,
            dtype: source.dtype(),
        })
    }

    /// ids `(b, l)` u32 -> `(b, l, d)` in the model's dtype. Nothing is masked: FLUX attends to the padding too.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        // The stream grows to tens of thousands in the published weights, where bf16 steps are 256 wide and f16 ends.
        let mut x = self.tokens.forward(ids)?.to_dtype(DType::F32)?;
        let bias = self.bias.forward(ids.dim(1)?)?;
        for block in &self.blocks {
            x = block.forward(&x, &bias, self.dtype)?;
        }
        self.norm.forward(&x)?.to_dtype(self.dtype)
    }
}

/// Sizes, vocabulary, buckets and number of blocks, as the weights show them.
fn read_sizes(source: &Source, config: &Config) -> Result<(Sizes, usize, usize, usize), Error> {
    const GATE: &str = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight";
    let none = || source.unsupported("these are not the weights of a T5 v1.1 encoder");
    let matrix = |name: &str| source.shape(name).and_then(|shape| <[usize; 2]>::try_from(shape).ok()).ok_or_else(none);
    let [vocabulary, d] = matrix("shared.weight").or_else(|_| matrix("encoder.embed_tokens.weight"))?;
    let [buckets, heads] = matrix("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")?;
    let [inner, _] = matrix("encoder.block.0.layer.0.SelfAttention.q.weight")?;
    let [d_ff, _] = matrix(GATE)?;
    if heads == 0 || !inner.is_multiple_of(heads) || buckets < 4 {
        return Err(config.contradiction(format!("{inner} channels of attention in {heads} heads, {buckets} position buckets")));
    }
    let (layers, e) = (source.count("encoder.block"), inner / heads);
    let found = [
        ("vocab_size", vocabulary),
        ("d_model", d),
        ("num_heads", heads),
        ("d_kv", e),
        ("d_ff", d_ff),
        ("num_layers", layers),
        ("relative_attention_num_buckets", buckets),
    ];
    found.iter().try_for_each(|(name, size)| config.agree(name, *size))?;
    match config.text("feed_forward_proj", "gated-gelu")? {
        "gated-gelu" => {}
        other => return Err(config.contradiction(format!("feed_forward_proj is {other}; FLUX's T5 has gated-gelu"))),
    }
    let eps = config.number("layer_norm_epsilon", NORM_EPS)? as f32;
    Ok((Sizes { d, heads, e, d_ff, eps }, vocabulary, buckets, layers))
}

#[derive(Debug)]
struct Block {
    attention_norm: RmsNorm,
    attention: SelfAttention,
    feed_norm: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Block {
    fn load(source: &Source, sizes: Sizes) -> Result<Self, Error> {
        let (attention, feed) = (source.at("layer.0"), source.at("layer.1"));
        let dense = feed.at("DenseReluDense");
        Ok(Self {
            attention_norm: RmsNorm::load(&attention, "layer_norm.weight", sizes.d, sizes.eps)?,
            attention: SelfAttention::load(&attention.at("SelfAttention"), sizes)?,
            feed_norm: RmsNorm::load(&feed, "layer_norm.weight", sizes.d, sizes.eps)?,
            gate: dense.linear_no_bias("wi_0", sizes.d_ff, sizes.d)?,
            up: dense.linear_no_bias("wi_1", sizes.d_ff, sizes.d)?,
            down: dense.linear_no_bias("wo", sizes.d, sizes.d_ff)?,
        })
    }

    /// x `(b, l, d)` f32, bias `(1, h, l, l)` -> `(b, l, d)` f32; the products in between are of `dtype`.
    fn forward(&self, x: &Tensor, bias: &Tensor, dtype: DType) -> Result<Tensor> {
        let attended = self.attention.forward(&self.attention_norm.forward(x)?.to_dtype(dtype)?, bias)?;
        let x = (x + attended.to_dtype(DType::F32)?)?;

        let normed = self.feed_norm.forward(&x)?.to_dtype(dtype)?;
        // The tanh form of gelu, transformers' `gelu_new`.
        let gated = (self.gate.forward_gelu(&normed)? * self.up.forward(&normed)?)?; // (b, l, d_ff)
        // The published model's products here exceed f16's 65504; transformers, too, keeps `wo` in f32 then.
        let gated = if dtype == DType::F16 { gated.to_dtype(DType::F32)? } else { gated };
        x + self.down.forward(&gated)?.to_dtype(DType::F32)?
    }
}
