//! Latents to picture.

use candle_core::Tensor;
use kernels::{After, Window};

use super::Sizes;
use super::layers::{Conv, GroupNorm, Middle, Residual};
use crate::Result;
use crate::weights::{Error, Source};

#[derive(Debug)]
pub(super) struct Decoder {
    conv_in: Conv,
    mid: Middle,
    /// Finest first, as their names count; walked from the end.
    up: Vec<Level>,
    norm_out: GroupNorm,
    conv_out: Conv,
}

/// One resolution.
#[derive(Debug)]
struct Level {
    blocks: Vec<Residual>,
    /// All but the finest.
    upsample: Option<Conv>,
}

impl Decoder {
    pub(super) fn load(source: &Source, sizes: &Sizes) -> Result<Self, Error> {
        let Sizes { channels, groups, .. } = sizes;
        let (finest, coarsest) = sizes.ends();
        let level = |i: usize| {
            let source = source.at(format_args!("up.{i}"));
            let (input, output) = (channels.get(i + 1).copied().unwrap_or(coarsest), channels[i]);
            let block = |j: usize| {
                Residual::load(&source.at(format_args!("block.{j}")), if j == 0 { input } else { output }, output, *groups)
            };
            let upsample = || Conv::load(&source, "upsample.conv", output, output, Window::DOUBLE);
            Ok(Level {
                // One block more than on the way down.
                blocks: (0..=sizes.blocks).map(block).collect::<Result<_, _>>()?,
                upsample: (i > 0).then(upsample).transpose()?,
            })
        };
        Ok(Self {
            conv_in: Conv::load(source, "conv_in", sizes.latent, coarsest, Window::SAME)?,
            mid: Middle::load(&source.at("mid"), coarsest, *groups)?,
            up: (0..channels.len()).map(level).collect::<Result<_, Error>>()?,
            norm_out: GroupNorm::load(source, "norm_out", finest, *groups)?,
            conv_out: Conv::load(source, "conv_out", finest, sizes.colours, Window::SAME)?,
        })
    }

    /// z `(b, c, y, x)` -> `(b, 3, 8 y, 8 x)`.
    pub(super) fn forward(&self, z: &Tensor) -> Result<Tensor> {
        let x = self.conv_in.forward(&z.permute((0, 2, 3, 1))?.contiguous()?, None)?;
        let mut x = self.mid.forward(&x)?;
        for level in self.up.iter().rev() {
            for block in &level.blocks {
                x = block.forward(&x)?;
            }
            if let Some(upsample) = &level.upsample {
                x = upsample.forward(&x, None)?;
            }
        }
        x = self.norm_out.forward(&x, After::Silu)?;
        self.conv_out.forward(&x, None)?.permute((0, 3, 1, 2))?.contiguous()
    }
}
