//! The CLIP text encoder whose pooled vector steers FLUX's modulation.
//!
//! Follows transformers 5.23.0, `models/clip/modeling_clip.py`. Names are transformers' without `text_model.`; every size is
//! read from the weights, except the heads, which config.json gives.

mod layer;

use candle_core::{Device, Tensor};

use crate::Result;
use crate::nn::{Embedding, LayerNorm};
use crate::weights::{Component, Config, Error, Source};
use layer::{Activation, Layer};

/// Width of a head in the published text encoder (768 = 12 x 64), for files without config.json.
const HEAD_WIDTH: usize = 64;
/// Epsilon of every norm, unless config.json says otherwise.
const NORM_EPS: f64 = 1e-5;
/// `eos_token_id` in FLUX's config.json. It is not the id of any end mark: see [`End::Highest`].
const EOS_TOKEN_ID: usize = 2;

/// Sizes of one layer.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    d: usize,
    heads: usize,
    /// Width inside the feed-forward.
    d_ff: usize,
    eps: f32,
    activation: Activation,
}

/// Which token's vector stands for the whole text.
#[derive(Debug, Clone, Copy)]
enum End {
    /// The first of the highest ids. Configurations with `eos_token_id` 2 mean this, because the end mark is CLIP's last token.
    Highest,
    /// The first token of this id, or the first token of all if there is none.
    First(u32),
}

/// Embeddings, layers, final norm.
#[derive(Debug)]
pub struct ClipText {
    tokens: Embedding,
    positions: Embedding,
    layers: Vec<Layer>,
    norm: LayerNorm,
    end: End,
}

impl ClipText {
    /// Errors if the weights are not a CLIP text encoder or `config` (the content of config.json) contradicts them.
    pub fn load(source: &Source, config: Option<&serde_json::Value>) -> Result<Self, Error> {
        let config = Config::new(Component::Clip, config);
        let (sizes, vocabulary, positions, layers) = read_sizes(source, &config)?;
        let end = match config.integer("eos_token_id", EOS_TOKEN_ID)? {
            EOS_TOKEN_ID => End::Highest,
            id if id < vocabulary => End::First(id as u32),
            id => return Err(config.contradiction(format!("eos_token_id {id} of {vocabulary} tokens"))),
        };
        let layer = |i| Layer::load(&source.at(format_args!("encoder.layers.{i}")), sizes);
        Ok(Self {
            tokens: Embedding::load(source, "embeddings.token_embedding.weight", vocabulary, sizes.d)?,
            positions: Embedding::load(source, "embeddings.position_embedding.weight", positions, sizes.d)?,
            layers: (0..layers).map(layer).collect::<Result<_, _>>()?,
            norm: LayerNorm::load(&source.at("final_layer_norm"), sizes.d, sizes.eps)?,
            end,
        })
    }

    /// ids `(b, l)` u32 with l up to the number of positions (77) -> every token after the final norm `(b, l, d)` and the token at
    /// the end of the text `(b, d)`, in the model's dtype.
    pub fn forward(&self, ids: &Tensor) -> Result<(Tensor, Tensor)> {
        let l = ids.dim(1)?;
        let mut x = self.tokens.forward(ids)?.broadcast_add(&self.positions.first(l)?)?;
        let mask = causal_mask(l, ids.device())?;
        for layer in &self.layers {
            x = layer.forward(&x, &mask)?;
        }
        let hidden = self.norm.forward(&x)?;
        let pooled = self.pool(&hidden, ids)?;
        Ok((hidden, pooled))
    }

    /// hidden `(b, l, d)`, ids `(b, l)` -> `(b, d)`.
    fn pool(&self, hidden: &Tensor, ids: &Tensor) -> Result<Tensor> {
        let at = |ids: &Vec<u32>| {
            let end = match self.end {
                End::Highest => ids.iter().max().copied().unwrap_or_default(),
                End::First(id) => id,
            };
            ids.iter().position(|id| *id == end).unwrap_or_default()
        };
        let ends: Vec<usize> = ids.to_vec2::<u32>()?.iter().map(at).collect();
        let rows = ends.iter().enumerate().map(|(row, end)| hidden.get(row)?.get(*end)).collect::<Result<Vec<_>>>()?;
        Tensor::stack(&rows, 0)
    }
}

/// Sizes, vocabulary, positions and number of layers, as the weights show them.
fn read_sizes(source: &Source, config: &Config) -> Result<(Sizes, usize, usize, usize), Error> {
    let none = || source.unsupported("these are not the weights of a CLIP text encoder");
    let matrix = |name: &str| source.shape(name).and_then(|shape| <[usize; 2]>::try_from(shape).ok()).ok_or_else(none);
    let [vocabulary, d] = matrix("embeddings.token_embedding.weight")?;
    let [positions, _] = matrix("embeddings.position_embedding.weight")?;
    let [d_ff, _] = matrix("encoder.layers.0.mlp.fc1.weight")?;
    let layers = source.count("encoder.layers");
    let found = [
        ("vocab_size", vocabulary),
        ("hidden_size", d),
        ("max_position_embeddings", positions),
        ("intermediate_size", d_ff),
        ("num_hidden_layers", layers),
    ];
    found.iter().try_for_each(|(name, size)| config.agree(name, *size))?;
    let heads = config.integer("num_attention_heads", d / HEAD_WIDTH)?;
    if heads == 0 || !d.is_multiple_of(heads) {
        return Err(config.contradiction(format!("{d} channels cannot be split into {heads} heads; is config.json missing?")));
    }
    let activation = Activation::read(config)?;
    let eps = config.number("layer_norm_eps", NORM_EPS)? as f32;
    Ok((Sizes { d, heads, d_ff, eps, activation }, vocabulary, positions, layers))
}

/// `(1, 1, l, l)` f32, to be added to scores: no token sees those after it.
fn causal_mask(l: usize, device: &Device) -> Result<Tensor> {
    let value = |query: usize, key: usize| if key > query { f32::NEG_INFINITY } else { 0.0 };
    let mask: Vec<f32> = (0..l).flat_map(|query| (0..l).map(move |key| value(query, key))).collect();
    Tensor::from_vec(mask, (1, 1, l, l), device)
}
