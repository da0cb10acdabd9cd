//! What the autoencoder is made of: convolutions, group norms, residual blocks, one attention. Activations are `(b, y, x, c)`.

use candle_core::Tensor;
use kernels::{After, Window, convolve, group_norm, linear};

use crate::Result;
use crate::nn::{Linear, attention};
use crate::weights::{Error, Source};

/// Epsilon of every group norm; no configuration names it.
const NORM_EPS: f32 = 1e-6;

/// A 3 x 3 convolution.
#[derive(Debug)]
pub(super) struct Conv {
    /// `(o, 3, 3, c)`; in files it is `(o, c, 3, 3)`.
    weight: Tensor,
    bias: Tensor,
    window: Window,
}

impl Conv {
    pub(super) fn load(source: &Source, name: &str, input: usize, output: usize, window: Window) -> Result<Self, Error> {
        let layer = source.at(name);
        let weight = layer.tensor("weight", (output, input, 3, 3))?.permute((0, 2, 3, 1))?.contiguous()?;
        Ok(Self { weight, bias: layer.tensor("bias", output)?, window })
    }

    /// x `(b, y, x, c)` -> `(b, y', x', o)`, whose sizes the window says, added to `residual` if there is one.
    pub(super) fn forward(&self, x: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
        convolve(x, &self.weight, &self.bias, self.window, residual)
    }
}

#[derive(Debug)]
pub(super) struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
}

impl GroupNorm {
    pub(super) fn load(source: &Source, name: &str, c: usize, groups: usize) -> Result<Self, Error> {
        let layer = source.at(name);
        Ok(Self { weight: layer.tensor("weight", c)?, bias: layer.tensor("bias", c)?, groups })
    }

    /// x `(b, y, x, c)` -> the same shape and dtype.
    pub(super) fn forward(&self, x: &Tensor, after: After) -> Result<Tensor> {
        group_norm(x, self.groups, &self.weight, &self.bias, NORM_EPS, after)
    }
}

/// Two convolutions, each after norm and SiLU, beside a short cut.
#[derive(Debug)]
pub(super) struct Residual {
    norm1: GroupNorm,
    conv1: Conv,
    norm2: GroupNorm,
    conv2: Conv,
    /// A 1 x 1 convolution where the channels change: weight `(o, c)`, bias `(o)`.
    shortcut: Option<(Tensor, Tensor)>,
}

impl Residual {
    pub(super) fn load(source: &Source, input: usize, output: usize, groups: usize) -> Result<Self, Error> {
        let shortcut = source.at("nin_shortcut");
        let shortcut = || Ok::<_, Error>((shortcut.tensor("weight", (output, input))?, shortcut.tensor("bias", output)?));
        Ok(Self {
            norm1: GroupNorm::load(source, "norm1", input, groups)?,
            conv1: Conv::load(source, "conv1", input, output, Window::SAME)?,
            norm2: GroupNorm::load(source, "norm2", output, groups)?,
            conv2: Conv::load(source, "conv2", output, output, Window::SAME)?,
            shortcut: (input != output).then(shortcut).transpose()?,
        })
    }

    /// x `(b, y, x, c)` -> `(b, y, x, o)`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        // Assigned, so that what is done with is freed: these are the largest tensors there are.
        let mut inner = self.norm1.forward(x, After::Silu)?;
        inner = self.conv1.forward(&inner, None)?;
        inner = self.norm2.forward(&inner, After::Silu)?;
        let Some((weight, bias)) = &self.shortcut else { return self.conv2.forward(&inner, Some(x)) };
        let shortcut = linear(&x.flatten_to(2)?, weight, Some(bias))?.reshape(inner.shape())?;
        self.conv2.forward(&inner, Some(&shortcut))
    }
}

/// Self-attention of all pixels, in one head.
#[derive(Debug)]
struct Attention {
    norm: GroupNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
}

impl Attention {
    fn load(source: &Source, c: usize, groups: usize) -> Result<Self, Error> {
        Ok(Self {
            norm: GroupNorm::load(source, "norm", c, groups)?,
            q: source.linear("q", c, c)?,
            k: source.linear("k", c, c)?,
            v: source.linear("v", c, c)?,
            out: source.linear("proj_out", c, c)?,
        })
    }

    /// x `(b, y, x, c)` -> the same shape.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, height, width, c) = x.dims4()?;
        let pixels = self.norm.forward(x, After::Nothing)?.reshape((b, 1, height * width, c))?;
        let (q, k, v) = (self.q.forward(&pixels)?, self.k.forward(&pixels)?, self.v.forward(&pixels)?);
        let attended = attention(&q, &k, &v, (c as f64).powf(-0.5), None)?;
        x + self.out.forward(&attended)?.reshape(x.shape())?
    }
}

/// The coarsest resolution: residual block, attention, residual block.
#[derive(Debug)]
pub(super) struct Middle {
    block_1: Residual,
    attention: Attention,
    block_2: Residual,
}

impl Middle {
    pub(super) fn load(source: &Source, c: usize, groups: usize) -> Result<Self, Error> {
        Ok(Self {
            block_1: Residual::load(&source.at("block_1"), c, c, groups)?,
            attention: Attention::load(&source.at("attn_1"), c, groups)?,
            block_2: Residual::load(&source.at("block_2"), c, c, groups)?,
        })
    }

    /// x `(b, y, x, c)` -> the same shape.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.block_2.forward(&self.attention.forward(&self.block_1.forward(x)?)?)
    }
}
