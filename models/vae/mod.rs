//! The autoencoder between pictures and latents, an eighth of their size.
//!
//! Follows diffusers 0.42.1, `models/autoencoders/autoencoder_kl.py` and `vae.py`. Names are BFL's; every size is read from the
//! weights, except the groups of the norms, which config.json gives.
//!
//! Latents and pictures are `(b, c, y, x)`, as everywhere; all between them is `(b, y, x, c)`, on every device, so that convolutions, norms,
//! short cuts and attention read and write whole pixels and nothing is ever transposed.

mod decoder;
mod encoder;
mod layers;
mod tile;

use candle_core::Tensor;

use crate::Result;
use crate::weights::{Component, Config, Error, Source};
use decoder::Decoder;
use encoder::Encoder;
use tile::{Zoom, tiled};

/// FLUX.1's `scaling_factor`, `shift_factor` and `norm_num_groups`, for files without config.json.
const SCALE: f64 = 0.3611;
const SHIFT: f64 = 0.1159;
const GROUPS: usize = 32;

/// Smallest side of a tile in latents (256 pixels): smaller ones cost more in overlap than they save and show their statistics.
const MIN_TILE: usize = 32;
/// Bytes held beside the activations without our kernels: slices of norms, unfolded strips of convolutions.
const WORKSPACE_BYTES: usize = 1 << 30;

/// Sizes of both halves.
#[derive(Debug, Clone)]
struct Sizes {
    colours: usize,
    latent: usize,
    /// Channels of each resolution, finest first.
    channels: Vec<usize>,
    /// Residual blocks of each resolution of the encoder.
    blocks: usize,
    groups: usize,
}

impl Sizes {
    /// Channels of the finest and of the coarsest resolution.
    fn ends(&self) -> (usize, usize) {
        (self.channels[0], self.channels[self.channels.len() - 1])
    }

    /// Pixels of a latent's side.
    fn zoom(&self) -> usize {
        1 << (self.channels.len() - 1)
    }
}

/// What the encoder knows of a picture's latents: a normal distribution for each value, both `(b, c, y, x)`.
#[derive(Debug, Clone)]
pub struct Posterior {
    pub mean: Tensor,
    pub std: Tensor,
}

/// Encoder and decoder.
#[derive(Debug)]
pub struct Autoencoder {
    sizes: Sizes,
    encoder: Encoder,
    decoder: Decoder,
    on_card: bool,
    /// The transformer's latents are `(z - shift) * scale`.
    pub scale: f64,
    pub shift: f64,
}

impl Autoencoder {
    /// Errors if the weights are not a FLUX autoencoder's or `config` (the content of config.json) contradicts them.
    pub fn load(source: &Source, config: Option<&serde_json::Value>) -> Result<Self, Error> {
        let config = Config::new(Component::Vae, config);
        let sizes = read_sizes(source, &config)?;
        Ok(Self {
            encoder: Encoder::load(&source.at("encoder"), &sizes)?,
            decoder: Decoder::load(&source.at("decoder"), &sizes)?,
            sizes,
            on_card: source.device().is_cuda(),
            scale: config.number("scaling_factor", SCALE)?,
            shift: config.number("shift_factor", SHIFT)?,
        })
    }

    /// z `(b, c, y, x)` -> picture `(b, 3, 8 y, 8 x)`, about -1 to 1, in z's dtype.
    pub fn decode(&self, z: &Tensor) -> Result<Tensor> {
        self.decode_within(z, None)
    }

    /// As [`Self::decode`], in tiles if a whole picture would take more than `memory` bytes (see [`Self::decode_bytes`]); `None`
    /// never tiles. Where even the smallest tile takes more, the smallest tile is used.
    pub fn decode_within(&self, z: &Tensor, memory: Option<usize>) -> Result<Tensor> {
        let (_, _, height, width) = z.dims4()?;
        match self.tile(z, height, width, memory) {
            None => self.decoder.forward(z),
            Some(tile) => tiled(z, tile, Zoom::In(self.sizes.zoom()), |z| self.decoder.forward(z)),
        }
    }

    /// x `(b, 3, 8 y, 8 x)`, -1 to 1 -> the distribution of its latents. Errors if a side is not a multiple of 8.
    pub fn encode(&self, x: &Tensor) -> Result<Posterior> {
        self.encode_within(x, None)
    }

    /// As [`Self::encode`], in tiles under the same rule as [`Self::decode_within`].
    pub fn encode_within(&self, x: &Tensor, memory: Option<usize>) -> Result<Posterior> {
        let (_, _, height, width) = x.dims4()?;
        let zoom = self.sizes.zoom();
        if !height.is_multiple_of(zoom) || !width.is_multiple_of(zoom) {
            candle_core::bail!("a picture of {width} x {height} cannot be encoded; sides are multiples of {zoom}");
        }
        let moments = match self.tile(x, height / zoom, width / zoom, memory) {
            None => self.encoder.forward(x)?,
            Some(tile) => tiled(x, tile * zoom, Zoom::Out(zoom), |x| self.encoder.forward(x))?,
        };
        let (mean, logarithm) =
            (moments.narrow(1, 0, self.sizes.latent)?, moments.narrow(1, self.sizes.latent, self.sizes.latent)?);
        // Bounds of diffusers' DiagonalGaussianDistribution.
        Ok(Posterior { mean, std: (logarithm.clamp(-30f64, 20f64)? * 0.5)?.exp()? })
    }

    /// An autoencoder's z as the transformer's latents.
    pub fn to_latents(&self, z: &Tensor) -> Result<Tensor> {
        (z - self.shift)? * self.scale
    }

    /// The transformer's latents as an autoencoder's z.
    pub fn from_latents(&self, latents: &Tensor) -> Result<Tensor> {
        (latents / self.scale)? + self.shift
    }

    /// About how many bytes decoding `(b, c, height, width)` latents takes at its peak: see [`decode_bytes`].
    #[must_use]
    pub fn decode_bytes(&self, b: usize, height: usize, width: usize, element_bytes: usize) -> usize {
        let channels = &self.sizes.channels;
        let before = channels.get(1).copied().unwrap_or(channels[0]);
        let pixels = b * height * width * self.sizes.zoom().pow(2);
        decode_bytes([channels[0], before], pixels, element_bytes, self.on_card && kernels::fused())
    }

    /// The side of a tile, in latents, with which `x` stays under `memory`; `None` if it does whole.
    fn tile(&self, x: &Tensor, height: usize, width: usize, memory: Option<usize>) -> Option<usize> {
        let (b, bytes) = (x.dims()[0], x.dtype().size_in_bytes());
        let fits = |height, width| memory.is_none_or(|memory| self.decode_bytes(b, height, width, bytes) <= memory);
        let longest = height.max(width);
        if fits(height, width) || longest <= MIN_TILE {
            return None;
        }
        let sides = (MIN_TILE..longest).step_by(8);
        Some(sides.rev().find(|side| fits((*side).min(height), (*side).min(width))).unwrap_or(MIN_TILE))
    }
}

/// FLUX.1's channels at its two finest resolutions.
pub const CHANNELS: [usize; 2] = [128, 256];

/// About how many bytes decoding so many pixels takes at its peak, weights not counted, with activations of `element_bytes`: the input of
/// the finest resolution's first block, its normalised copy and what its convolution makes of it. Without our kernels the last is put
/// together from strips, and there is what they were unfolded in.
#[must_use]
pub fn decode_bytes([finest, before]: [usize; 2], pixels: usize, element_bytes: usize, fused: bool) -> usize {
    if fused && element_bytes == 2 {
        return pixels * (2 * before + finest) * element_bytes;
    }
    pixels * (2 * before + 2 * finest) * element_bytes + WORKSPACE_BYTES.min(pixels * 9 * before * element_bytes)
}

/// Sizes as the weights show them.
fn read_sizes(source: &Source, config: &Config) -> Result<Sizes, Error> {
    let none = || source.unsupported("these are not the weights of an autoencoder with encoder and decoder");
    let conv = |name: String| match source.shape(name).as_deref() {
        Some([output, input, 3, 3]) => Ok([*output, *input]),
        _ => Err(none()),
    };
    let levels = source.count("encoder.down");
    let channels =
        (0..levels).map(|i| Ok(conv(format!("encoder.down.{i}.block.0.conv1.weight"))?[0])).collect::<Result<Vec<_>, Error>>()?;
    let [_, colours] = conv("encoder.conv_in.weight".into())?;
    let [_, latent] = conv("decoder.conv_in.weight".into())?;
    let blocks = source.count("encoder.down.0.block");
    let groups = config.integer("norm_num_groups", GROUPS)?;
    config.agree("latent_channels", latent)?;
    config.agree("in_channels", colours)?;
    config.agree("layers_per_block", blocks)?;
    config.agree_all("block_out_channels", &channels)?;
    match channels.iter().find(|channels| groups == 0 || !channels.is_multiple_of(groups)) {
        Some(channels) => {
            Err(config
                .contradiction(format!("{channels} channels cannot be split into {groups} groups; is config.json missing?")))
        }
        None if channels.is_empty() => Err(none()),
        None => Ok(Sizes { colours, latent, channels, blocks, groups }),
    }
}
