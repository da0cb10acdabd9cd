//! The two kinds of block. Each is an attention over text and image tokens together, and an MLP.

use candle_core::{D, DType, Tensor};
use kernels::{Heads, Projection};

use super::{Config, Rope};
use crate::Result;
use crate::nn::{self, Activations, Linear, Parameter};
use crate::weights::{Error, Source};

/// Of every norm in FLUX.1.
pub(super) const EPS: f32 = 1e-6;

/// Scale, shift and gate of one half of a block, each `(b, 1, d)`.
#[derive(Debug, Clone)]
struct Modulation {
    shift: Tensor,
    scale: Tensor,
    gate: Tensor,
}

impl Modulation {
    /// `(b, n 3 d)` -> n modulations, each in the order shift, scale, gate.
    fn split<const N: usize>(all: &Tensor) -> Result<[Self; N]> {
        let parts = all.unsqueeze(1)?.chunk(3 * N, D::Minus1)?;
        let part = |i: usize| parts[i].clone();
        Ok(std::array::from_fn(|n| Self { shift: part(3 * n), scale: part(3 * n + 1), gate: part(3 * n + 2) }))
    }

    /// layer_norm(x) * (1 + scale) + shift, as the layer `to` takes it.
    fn apply(&self, x: &Tensor, to: &Linear) -> Result<Activations> {
        nn::modulated_norm(x, [&self.scale, &self.shift], EPS, to)
    }

    /// x + gate * update.
    fn add_gated(&self, x: &Tensor, update: &Tensor) -> Result<Tensor> {
        kernels::add_gated(x, &self.gate, update)
    }

    /// x + gate * update, and the `next` modulation's [`Self::apply`] of it.
    fn add_gated_then(&self, next: &Self, x: &Tensor, update: &Tensor, to: &Linear) -> Result<(Tensor, Activations)> {
        nn::add_gated_then_norm(x, [&self.gate, update], [&next.scale, &next.shift], EPS, to)
    }
}

/// The norms of the heads of q and of k.
#[derive(Debug, Clone)]
struct HeadNorms {
    query: Parameter,
    key: Parameter,
}

impl HeadNorms {
    /// `norm.query_norm.scale` and `norm.key_norm.scale` of width `e`, in f32 as the norm is.
    fn load(source: &Source, e: usize) -> Result<Self, Error> {
        let scale = |name: &str| source.vector_as(&format!("norm.{name}_norm.scale"), e, DType::F32);
        Ok(Self { query: scale("query")?, key: scale("key")? })
    }

    /// qkv `(b, l, 3 d)`.
    fn of<'a>(&self, qkv: &'a Tensor) -> Result<Projection<'a>> {
        Ok(Projection { qkv, query_scale: self.query.tensor()?, key_scale: self.key.tensor()? })
    }
}

/// q, k and v of the tokens of all streams, each `(b, h, l, e)`.
fn heads_of(streams: &[Projection<'_>], heads: usize, rope: &Rope) -> Result<Heads> {
    kernels::joint_heads(streams, heads, &rope.cos, &rope.sin, EPS)
}

/// The layers that one stream (image or text) owns inside a double block.
#[derive(Debug, Clone)]
struct Stream {
    modulation: Linear,
    qkv: Linear,
    head_norms: HeadNorms,
    proj: Linear,
    mlp_in: Linear,
    mlp_out: Linear,
}

impl Stream {
    /// `name` is `img` or `txt`.
    fn load(source: &Source, name: &str, config: &Config) -> Result<Self, Error> {
        let (d, mlp, e) = (config.hidden, config.mlp, config.head_width);
        let attention = source.at(format_args!("{name}_attn"));
        Ok(Self {
            modulation: source.linear(&format!("{name}_mod.lin"), 6 * d, d)?,
            qkv: attention.linear("qkv", 3 * d, d)?,
            head_norms: HeadNorms::load(&attention, e)?,
            proj: attention.linear("proj", d, d)?,
            mlp_in: source.linear(&format!("{name}_mlp.0"), mlp, d)?,
            mlp_out: source.linear(&format!("{name}_mlp.2"), d, mlp)?,
        })
    }

    /// Adds what attention found, then the MLP, each through its gate.
    fn finish(&self, x: &Tensor, attended: &Tensor, [attention, mlp]: &[Modulation; 2]) -> Result<Tensor> {
        let (x, y) = attention.add_gated_then(mlp, x, &self.proj.forward(attended)?, &self.mlp_in)?;
        mlp.add_gated(&x, &self.mlp_out.forward(&self.mlp_in.forward_gelu(y)?)?)
    }
}

/// Image and text tokens keep their own weights and meet only in attention.
#[derive(Debug, Clone)]
pub struct DoubleBlock {
    img: Stream,
    txt: Stream,
    heads: usize,
}

impl DoubleBlock {
    pub fn load(source: &Source, config: &Config) -> Result<Self, Error> {
        Ok(Self { img: Stream::load(source, "img", config)?, txt: Stream::load(source, "txt", config)?, heads: config.heads })
    }

    /// vec `(n, d)` after SiLU -> what modulates img and txt, each `(n, 6 d)`.
    pub fn modulation(&self, vec: &Tensor) -> Result<[Tensor; 2]> {
        Ok([self.img.modulation.forward(vec)?, self.txt.modulation.forward(vec)?])
    }

    /// img `(b, l_img, d)`, txt `(b, l_txt, d)`, modulations `(b, 6 d)` -> img and txt of the same shapes.
    pub fn forward(&self, img: &Tensor, txt: &Tensor, modulations: [&Tensor; 2], rope: &Rope) -> Result<(Tensor, Tensor)> {
        let [img_mods, txt_mods] = [Modulation::split(modulations[0])?, Modulation::split(modulations[1])?];
        let img_qkv = self.img.qkv.forward(img_mods[0].apply(img, &self.img.qkv)?)?;
        let txt_qkv = self.txt.qkv.forward(txt_mods[0].apply(txt, &self.txt.qkv)?)?;

        let streams = [self.txt.head_norms.of(&txt_qkv)?, self.img.head_norms.of(&img_qkv)?];
        let attended = heads_of(&streams, self.heads, rope)?.attend()?; // (b, l_txt + l_img, d)
        let (l_txt, l_img) = (txt.dim(1)?, img.dim(1)?);

        let img = self.img.finish(img, &attended.narrow(1, l_txt, l_img)?, &img_mods)?;
        let txt = self.txt.finish(txt, &attended.narrow(1, 0, l_txt)?, &txt_mods)?;
        Ok((img, txt))
    }
}

/// One stream of text and image tokens; attention and MLP work side by side on the same input.
#[derive(Debug, Clone)]
pub struct SingleBlock {
    modulation: Linear,
    linear1: Linear,
    head_norms: HeadNorms,
    linear2: Linear,
    heads: usize,
    hidden: usize,
}

impl SingleBlock {
    pub fn load(source: &Source, config: &Config) -> Result<Self, Error> {
        let (d, mlp, e) = (config.hidden, config.mlp, config.head_width);
        Ok(Self {
            modulation: source.linear("modulation.lin", 3 * d, d)?,
            linear1: source.linear("linear1", 3 * d + mlp, d)?,
            head_norms: HeadNorms::load(source, e)?,
            linear2: source.linear("linear2", d, d + mlp)?,
            heads: config.heads,
            hidden: d,
        })
    }

    /// vec `(n, d)` after SiLU -> what modulates x, `(n, 3 d)`.
    pub fn modulation(&self, vec: &Tensor) -> Result<Tensor> {
        self.modulation.forward(vec)
    }

    /// x `(b, l, d)`, modulation `(b, 3 d)` -> x of the same shape.
    pub fn forward(&self, x: &Tensor, modulation: &Tensor, rope: &Rope) -> Result<Tensor> {
        let [modulation] = Modulation::split(modulation)?;
        let y = modulation.apply(x, &self.linear1)?;
        let (qkv, mlp) = nn::linear_beside(y, &self.linear1, 3 * self.hidden, self.hidden, &self.linear2)?; // (b, l, 3 d)

        let heads = heads_of(&[self.head_norms.of(&qkv)?], self.heads, rope)?;
        let both = nn::attention_beside(&heads, &mlp, &self.linear2)?; // (b, l, d + mlp)
        modulation.add_gated(x, &self.linear2.forward(both)?)
    }
}
