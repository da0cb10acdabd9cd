//! Norms. Statistics accumulate in f32 whatever the dtype of the input is.

use candle_core::{DType, Tensor};

use super::Parameter;
use crate::Result;
use crate::weights::{Error, Source};

/// Layer norm without weights of its own, as FLUX modulates it (eps 1e-6).
#[derive(Debug, Clone)]
pub struct LayerNorm {
    eps: f32,
    affine: Option<(Parameter, Parameter)>,
}

impl LayerNorm {
    #[must_use]
    pub fn plain(eps: f32) -> Self {
        Self { eps, affine: None }
    }

    /// With `weight` and `bias` of width `d`.
    pub fn load(source: &Source, d: usize, eps: f32) -> Result<Self, Error> {
        Ok(Self { eps, affine: Some((source.vector("weight", d)?, source.vector("bias", d)?)) })
    }

    /// x `(.., d)` -> the same shape and dtype.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = kernels::layer_norm(x, self.eps)?;
        match &self.affine {
            Some((weight, bias)) => y.broadcast_mul(&weight.tensor()?)?.broadcast_add(&bias.tensor()?),
            None => Ok(y),
        }
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
