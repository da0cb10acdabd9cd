//! The two kinds of block. Each is an attention over text and image tokens together, and an MLP.

use candle_core::{D, IndexOp, Result, Tensor};

use super::{Config, Rope};
use crate::nn::{self, LayerNorm, Linear, RmsNorm};
use crate::weights::{Error, Source};

const EPS: f32 = 1e-6;

/// Scale, shift and gate of one half of a block, each `(b, 1, d)`.
#[derive(Debug, Clone)]
struct Modulation {
    shift: Tensor,
    scale: Tensor,
    gate: Tensor,
}

impl Modulation {
    /// The `index`-th modulation in `parts`, whose order is shift, scale, gate.
    fn at(parts: &[Tensor], index: usize) -> Self {
        let part = |i: usize| parts[3 * index + i].clone();
        Self { shift: part(0), scale: part(1), gate: part(2) }
    }

    /// norm(x) * (1 + scale) + shift.
    fn apply(&self, norm: &LayerNorm, x: &Tensor) -> Result<Tensor> {
        norm.forward(x)?.broadcast_mul(&(&self.scale + 1.)?)?.broadcast_add(&self.shift)
    }

    /// x + gate * update.
    fn add_gated(&self, x: &Tensor, update: &Tensor) -> Result<Tensor> {
        x + update.broadcast_mul(&self.gate)?
    }
}

/// Queries, keys and values, each `(b, h, l, e)`.
struct Qkv {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

impl Qkv {
    /// qkv `(b, l, 3 d)`: q and k are normalised head by head.
    fn split(qkv: &Tensor, heads: usize, query_norm: &RmsNorm, key_norm: &RmsNorm) -> Result<Self> {
        let (b, l, width) = qkv.dims3()?;
        let qkv = qkv.reshape((b, l, 3, heads, width / (3 * heads)))?;
        let part = |i: usize| qkv.i((.., .., i))?.transpose(1, 2)?.contiguous(); // (b, h, l, e)
        Ok(Self { q: query_norm.forward(&part(0)?)?, k: key_norm.forward(&part(1)?)?, v: part(2)? })
    }

    /// The tokens of `self` followed by those of `other`.
    fn join(&self, other: &Self) -> Result<Self> {
        let cat = |a: &Tensor, b: &Tensor| Tensor::cat(&[a, b], 2);
        Ok(Self { q: cat(&self.q, &other.q)?, k: cat(&self.k, &other.k)?, v: cat(&self.v, &other.v)? })
    }

    /// -> `(b, l, d)`.
    fn attend(&self, rope: &Rope) -> Result<Tensor> {
        let turn = |x: &Tensor| kernels::rotate(x, &rope.cos, &rope.sin);
        let scale = 1. / (self.q.dim(D::Minus1)? as f64).sqrt();
        let attended = nn::attention(&turn(&self.q)?, &turn(&self.k)?, &self.v, scale, None, nn::Budget::default())?;
        attended.transpose(1, 2)?.flatten_from(2)
    }
}

/// The layers that one stream (image or text) owns inside a double block.
#[derive(Debug, Clone)]
struct Stream {
    modulation: Linear,
    norm: LayerNorm, // without weights, so one instance serves attention and MLP
    qkv: Linear,
    query_norm: RmsNorm,
    key_norm: RmsNorm,
    proj: Linear,
    mlp_in: Linear,
    mlp_out: Linear,
    heads: usize,
}

impl Stream {
    /// `name` is `img` or `txt`.
    fn load(source: &Source, name: &str, config: &Config) -> Result<Self, Error> {
        let (d, mlp, e) = (config.hidden, config.mlp, config.head_width);
        let attention = source.at(format_args!("{name}_attn"));
        Ok(Self {
            modulation: source.linear(&format!("{name}_mod.lin"), 6 * d, d)?,
            norm: LayerNorm::plain(EPS),
            qkv: attention.linear("qkv", 3 * d, d)?,
            query_norm: RmsNorm::load(&attention, "norm.query_norm.scale", e, EPS)?,
            key_norm: RmsNorm::load(&attention, "norm.key_norm.scale", e, EPS)?,
            proj: attention.linear("proj", d, d)?,
            mlp_in: source.linear(&format!("{name}_mlp.0"), mlp, d)?,
            mlp_out: source.linear(&format!("{name}_mlp.2"), d, mlp)?,
            heads: config.heads,
        })
    }

    /// vec `(b, d)`, after SiLU -> the modulations of the attention and of the MLP.
    fn modulations(&self, vec: &Tensor) -> Result<[Modulation; 2]> {
        let parts = self.modulation.forward(vec)?.unsqueeze(1)?.chunk(6, D::Minus1)?;
        Ok([Modulation::at(&parts, 0), Modulation::at(&parts, 1)])
    }

    fn project(&self, x: &Tensor, modulation: &Modulation) -> Result<Qkv> {
        Qkv::split(&self.qkv.forward(&modulation.apply(&self.norm, x)?)?, self.heads, &self.query_norm, &self.key_norm)
    }

    /// Adds what attention found, then the MLP, each through its gate.
    fn finish(&self, x: &Tensor, attended: &Tensor, [attention, mlp]: &[Modulation; 2]) -> Result<Tensor> {
        let x = attention.add_gated(x, &self.proj.forward(attended)?)?;
        let y = self.mlp_in.forward(&mlp.apply(&self.norm, &x)?)?.gelu()?; // the tanh form
        mlp.add_gated(&x, &self.mlp_out.forward(&y)?)
    }
}

/// Image and text tokens keep their own weights and meet only in attention.
#[derive(Debug, Clone)]
pub struct DoubleBlock {
    img: Stream,
    txt: Stream,
}

impl DoubleBlock {
    pub fn load(source: &Source, config: &Config) -> Result<Self, Error> {
        Ok(Self { img: Stream::load(source, "img", config)?, txt: Stream::load(source, "txt", config)? })
    }

    /// img `(b, l_img, d)`, txt `(b, l_txt, d)`, vec `(b, d)` after SiLU -> img and txt of the same shapes.
    pub fn forward(&self, img: &Tensor, txt: &Tensor, vec: &Tensor, rope: &Rope) -> Result<(Tensor, Tensor)> {
        let (img_mods, txt_mods) = (self.img.modulations(vec)?, self.txt.modulations(vec)?);
        let (img_qkv, txt_qkv) = (self.img.project(img, &img_mods[0])?, self.txt.project(txt, &txt_mods[0])?);

        let attended = txt_qkv.join(&img_qkv)?.attend(rope)?; // (b, l_txt + l_img, d)
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
    norm: LayerNorm,
    linear1: Linear,
    query_norm: RmsNorm,
    key_norm: RmsNorm,
    linear2: Linear,
    heads: usize,
    hidden: usize,
    mlp: usize,
}

impl SingleBlock {
    pub fn load(source: &Source, config: &Config) -> Result<Self, Error> {
        let (d, mlp, e) = (config.hidden, config.mlp, config.head_width);
        Ok(Self {
            modulation: source.linear("modulation.lin", 3 * d, d)?,
            norm: LayerNorm::plain(EPS),
            linear1: source.linear("linear1", 3 * d + mlp, d)?,
            query_norm: RmsNorm::load(source, "norm.query_norm.scale", e, EPS)?,
            key_norm: RmsNorm::load(source, "norm.key_norm.scale", e, EPS)?,
            linear2: source.linear("linear2", d, d + mlp)?,
            heads: config.heads,
            hidden: d,
            mlp,
        })
    }

    /// x `(b, l, d)`, vec `(b, d)` after SiLU -> x of the same shape.
    pub fn forward(&self, x: &Tensor, vec: &Tensor, rope: &Rope) -> Result<Tensor> {
        let modulation = Modulation::at(&self.modulation.forward(vec)?.unsqueeze(1)?.chunk(3, D::Minus1)?, 0);
        let y = self.linear1.forward(&modulation.apply(&self.norm, x)?)?; // (b, l, 3 d + mlp)
        let qkv = y.narrow(D::Minus1, 0, 3 * self.hidden)?;
        let mlp = y.narrow(D::Minus1, 3 * self.hidden, self.mlp)?.gelu()?; // the tanh form

        let attended = Qkv::split(&qkv, self.heads, &self.query_norm, &self.key_norm)?.attend(rope)?;
        let update = self.linear2.forward(&Tensor::cat(&[attended, mlp], D::Minus1)?)?;
        modulation.add_gated(x, &update)
    }
}
