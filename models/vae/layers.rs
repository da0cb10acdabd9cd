//! What the autoencoder is made of: convolutions, group norms, residual blocks, one attention.

use candle_core::Tensor;
use kernels::{After, Window, convolve, group_norm};

use crate::Result;
use crate::nn::{Budget, Linear, attention};
use crate::weights::{Error, Source};

/// Epsilon of every group norm; no configuration names it.
const NORM_EPS: f32 = 1e-6;

/// A 3 x 3 convolution.
#[derive(Debug)]
pub(super) struct Conv {
    weight: Tensor,
    bias: Tensor,
    window: Window,
}

impl Conv {
    pub(super) fn load(source: &Source, name: &str, input: usize, output: usize, window: Window) -> Result<Self, Error> {
        let layer = source.at(name);
        Ok(Self { weight: layer.tensor("weight", (output, input, 3, 3))?, bias: layer.tensor("bias", output)?, window })
    }

    /// x `(b, c, y, x)` -> `(b, o, y, x)`, or half of y and x if the window says so.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        convolve(x, &self.weight, &self.bias, self.window)
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

    /// x `(b, c, y, x)` -> the same shape and dtype.
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
    /// A 1 x 1 convolution where the channels change: weight `(o, c)`, bias `(o, 1)`.
    shortcut: Option<(Tensor, Tensor)>,
}

impl Residual {
    pub(super) fn load(source: &Source, input: usize, output: usize, groups: usize) -> Result<Self, Error> {
        let shortcut = source.at("nin_shortcut");
        let shortcut = || {
            Ok::<_, Error>((shortcut.tensor("weight", (output, input))?, shortcut.tensor("bias", output)?.reshape((output, 1))?))
        };
        Ok(Self {
            norm1: GroupNorm::load(source, "norm1", input, groups)?,
            conv1: Conv::load(source, "conv1", input, output, Window::SAME)?,
            norm2: GroupNorm::load(source, "norm2", output, groups)?,
            conv2: Conv::load(source, "conv2", output, output, Window::SAME)?,
            shortcut: (input != output).then(shortcut).transpose()?,
        })
    }

    /// x `(b, c, y, x)` -> `(b, o, y, x)`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let inner = self.conv1.forward(&self.norm1.forward(x, After::Silu)?)?;
        let inner = self.conv2.forward(&self.norm2.forward(&inner, After::Silu)?)?;
        match &self.shortcut {
            None => x + inner,
            Some((weight, bias)) => {
                let pixels = x.flatten_from(2)?.contiguous()?; // (b, c, y x)
                weight.broadcast_matmul(&pixels)?.broadcast_add(bias)?.reshape(inner.shape())? + inner
            }
        }
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

    /// x `(b, c, y, x)` -> the same shape.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let pixels = self.norm.forward(x, After::Nothing)?.flatten_from(2)?.transpose(1, 2)?.contiguous()?; // (b, y x, c)
        let head = |layer: &Linear| layer.forward(&pixels)?.unsqueeze(1); // (b, 1, y x, c)
        let scale = (x.dim(1)? as f64).powf(-0.5);
        let attended = attention(&head(&self.q)?, &head(&self.k)?, &head(&self.v)?, scale, None, Budget::default())?;
        x + self.out.forward(&attended.squeeze(1)?)?.transpose(1, 2)?.reshape(x.shape())?
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

    /// x `(b, c, y, x)` -> the same shape.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.block_2.forward(&self.attention.forward(&self.block_1.forward(x)?)?)
    }
}
