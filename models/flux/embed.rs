//! What modulates every block: time, guidance and the pooled prompt, as one vector.

use candle_core::{DType, Device, Tensor};

use super::Config;
use crate::Result;
use crate::nn::Linear;
use crate::weights::{Error, Source};

/// Width of the sinusoidal embedding of time and guidance.
const SINUSOID: usize = 256;
const MAX_PERIOD: f32 = 10_000.0;

/// values `(b)` f32 -> `(b, 256)` f32: cosines, then sines.
///
/// Frequencies are f32 as in the reference: angles reach 1000 rad, so f64 frequencies would move the output by 1e-4. They are
/// rounded correctly; PyTorch's `exp` depends on its maths library (MKL's differs in the last bit of two of the 128).
pub fn sinusoid(values: &Tensor) -> Result<Tensor> {
    let half = SINUSOID / 2;
    let frequency = |i: usize| f64::from(-MAX_PERIOD.ln() * i as f32 / half as f32).exp() as f32;
    // On the processor: not every device's cosine is exact so far from zero.
    let frequencies = Tensor::from_vec((0..half).map(frequency).collect(), (1, half), &Device::Cpu)?;
    let values_here = values.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
    let angles = values_here.unsqueeze(1)?.broadcast_mul(&frequencies)?; // (b, 128)
    Tensor::cat(&[angles.cos()?, angles.sin()?], 1)?.to_device(values.device())
}

/// Two linear layers with SiLU between them.
#[derive(Debug, Clone)]
struct Embedder {
    in_layer: Linear,
    out_layer: Linear,
}

impl Embedder {
    fn load(source: &Source, input: usize, hidden: usize) -> Result<Self, Error> {
        Ok(Self { in_layer: source.linear("in_layer", hidden, input)?, out_layer: source.linear("out_layer", hidden, hidden)? })
    }

    /// x `(b, input)` -> `(b, d)`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.out_layer.forward(&self.in_layer.forward(x)?.silu()?)
    }
}

/// The vector `(b, d)` that modulates the blocks.
#[derive(Debug, Clone)]
pub struct Embedding {
    time: Embedder,
    guidance: Option<Embedder>,
    pooled: Embedder,
}

impl Embedding {
    pub fn load(source: &Source, config: &Config) -> Result<Self, Error> {
        let embedder = |name: &str, input: usize| Embedder::load(&source.at(name), input, config.hidden);
        Ok(Self {
            time: embedder("time_in", SINUSOID)?,
            guidance: config.guidance.then(|| embedder("guidance_in", SINUSOID)).transpose()?,
            pooled: embedder("vector_in", config.pooled_width)?,
        })
    }

    /// time `(n)` in 0..=1, guidance `(b)`, pooled `(b, d_pooled)`, where b is n, or 1 for n times of one prompt -> `(n, d)`. A model
    /// with a guidance embedding needs `guidance`; one without it ignores it.
    pub fn forward(&self, time: &Tensor, guidance: Option<&Tensor>, pooled: &Tensor) -> Result<Tensor> {
        let dtype = pooled.dtype();
        let embed = |embedder: &Embedder, value: &Tensor| embedder.forward(&sinusoid(&(value * 1000.)?)?.to_dtype(dtype)?);
        let vec = embed(&self.time, time)?.broadcast_add(&self.pooled.forward(pooled)?)?;
        match (&self.guidance, guidance) {
            (None, _) => Ok(vec),
            (Some(embedder), Some(guidance)) => vec.broadcast_add(&embed(embedder, guidance)?),
            (Some(_), None) => candle_core::bail!("this model was distilled with guidance and needs a value for it"),
        }
    }
}
