//! Picture to the mean and spread of its latents.

use candle_core::Tensor;
use kernels::{After, Window};

use super::Sizes;
use super::layers::{Conv, GroupNorm, Middle, Residual};
use crate::Result;
use crate::weights::{Error, Source};

#[derive(Debug)]
pub(super) struct Encoder {
    conv_in: Conv,
    down: Vec<Level>,
    mid: Middle,
    norm_out: GroupNorm,
    conv_out: Conv,
}

/// One resolution, finest first.
#[derive(Debug)]
struct Level {
    blocks: Vec<Residual>,
    /// All but the coarsest.
    downsample: Option<Conv>,
}

impl Encoder {
    pub(super) fn load(source: &Source, sizes: &Sizes) -> Result<Self, Error> {
        let Sizes { channels, groups, .. } = sizes;
        let (finest, coarsest) = sizes.ends();
        let level = |i: usize| {
            let source = source.at(format_args!("down.{i}"));
            let (input, output) = (channels[i.saturating_sub(1)], channels[i]);
            let block = |j: usize| {
                Residual::load(&source.at(format_args!("block.{j}")), if j == 0 { input } else { output }, output, *groups)
            };
            let downsample = || Conv::load(&source, "downsample.conv", output, output, Window::HALVE);
            Ok(Level {
                blocks: (0..sizes.blocks).map(block).collect::<Result<_, _>>()?,
                downsample: (i + 1 < channels.len()).then(downsample).transpose()?,
            })
        };
        Ok(Self {
            conv_in: Conv::load(source, "conv_in", sizes.colours, finest, Window::SAME)?,
            down: (0..channels.len()).map(level).collect::<Result<_, Error>>()?,
            mid: Middle::load(&source.at("mid"), coarsest, *groups)?,
            norm_out: GroupNorm::load(source, "norm_out", coarsest, *groups)?,
            conv_out: Conv::load(source, "conv_out", coarsest, 2 * sizes.latent, Window::SAME)?,
        })
    }

    /// x `(b, 3, 8 y, 8 x)` -> mean and logarithm of the variance `(b, 2 c, y, x)`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.conv_in.forward(&x.permute((0, 2, 3, 1))?.contiguous()?, None)?;
        for level in &self.down {
            for block in &level.blocks {
                x = block.forward(&x)?;
            }
            if let Some(downsample) = &level.downsample {
                x = downsample.forward(&x, None)?;
            }
        }
        x = self.norm_out.forward(&self.mid.forward(&x)?, After::Silu)?;
        self.conv_out.forward(&x, None)?.permute((0, 3, 1, 2))?.contiguous()
    }
}
