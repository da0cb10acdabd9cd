//! Norms. Statistics accumulate in f32 whatever the dtype of the input is.

use candle_core::{DType, Tensor};

use super::Parameter;
use crate::Result;
use crate::weights::{Error, Source};

/// Layer norm with weights of its own, as CLIP has it; FLUX.1's, which are modulated, are [`kernels::modulated_norm`].
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Parameter,
    bias: Parameter,
    eps: f32,
}

impl LayerNorm {
    /// With `weight` and `bias` of width `d`.
    pub fn load(source: &Source, d: usize, eps: f32) -> Result<Self, Error> {
        Ok(Self { weight: source.vector("weight", d)?, bias: source.vector("bias", d)?, eps })
    }

    /// x `(.., d)` -> the same shape and dtype.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = kernels::layer_norm(x, self.eps)?;
        y.broadcast_mul(&self.weight.tensor()?)?.broadcast_add(&self.bias.tensor()?)
    }
}

/// Root-mean-square norm: `x / sqrt(mean(x²) + eps) * scale`.
#[derive(Debug, Clone)]
pub struct RmsNorm {
    scale: Parameter,
    eps: f32,
}

impl RmsNorm {
    /// The tensor `name` of width `d`.
    pub fn load(source: &Source, name: &str, d: usize, eps: f32) -> Result<Self, Error> {
        Ok(Self { scale: source.vector_as(name, d, DType::F32)?, eps })
    }

    /// x `(.., d)` -> the same shape and dtype.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        kernels::rms_norm(x, &self.scale.tensor()?, self.eps)
    }
}
