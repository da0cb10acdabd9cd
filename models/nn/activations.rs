//! What layers are given: as values, or as e4m3 for those that multiply in it, made in the pass that computes them.

use candle_core::{D, DType, Result, Tensor};
use kernels::{Beside, Fp8Rows, Heads};

use super::Linear;

/// `layer_norm(x) * (1 + scale) + shift` for the layer `to`: x `(b, l, d)`, scale and shift `(b, 1, d)`.
pub fn modulated_norm(x: &Tensor, [scale, shift]: [&Tensor; 2], eps: f32, to: &Linear) -> Result<Activations> {
    Ok(match to.takes_fp8()? {
        true => Activations::Fp8(kernels::modulated_norm_fp8(x, scale, shift, eps)?, x.dtype()),
        false => Activations::Values(kernels::modulated_norm(x, scale, shift, eps)?),
    })
}

/// `x + gate * update`, and [`modulated_norm`] of it: x and update `(b, l, d)`, gate `(b, 1, d)`.
pub fn add_gated_then_norm(
    x: &Tensor,
    update: [&Tensor; 2],
    rows: [&Tensor; 2],
    eps: f32,
    to: &Linear,
) -> Result<(Tensor, Activations)> {
    Ok(match to.takes_fp8()? {
        true => {
            let (sum, y) = kernels::add_gated_then_norm_fp8(x, update, rows, eps)?;
            (sum, Activations::Fp8(y, x.dtype()))
        }
        false => {
            let (sum, y) = kernels::add_gated_then_norm(x, update, rows, eps)?;
            (sum, Activations::Values(y))
        }
    })
}

/// x `(b, l, d)` through the layer `by` -> its first columns `(b, l, first)`, and what GELU of the others becomes for the layer `to`
/// beside `room` columns of [`attention_beside`].
pub fn linear_beside(x: Activations, by: &Linear, first: usize, room: usize, to: &Linear) -> Result<(Tensor, Beside)> {
    match to.takes_fp8()? {
        // Which are made of whole rows.
        true => Beside::open(&by.forward(x)?, first),
        false => by.forward_beside(x, first, room),
    }
}

/// `[attention, gelu(x)]` `(b, l, d + m)` of these heads and what [`linear_beside`] gave for the layer `to`.
pub fn attention_beside(heads: &Heads, right: &Beside, to: &Linear) -> Result<Activations> {
    Ok(match to.takes_fp8()? {
        true => Activations::Fp8(kernels::attention_beside_fp8(heads, right)?, heads.q.dtype()),
        false => Activations::Values(kernels::attention_beside(heads, right)?),
    })
}

/// What a layer is given: `(.., input)`.
#[derive(Debug, Clone)]
pub enum Activations {
    Values(Tensor),
    /// For a layer that multiplies in e4m3, and what it is to give.
    Fp8(Fp8Rows, DType),
}

impl From<&Tensor> for Activations {
    fn from(x: &Tensor) -> Self {
        Self::Values(x.clone())
    }
}

impl Activations {
    /// What tells its shape and where it is.
    pub(super) fn tensor(&self) -> &Tensor {
        match self {
            Self::Values(x) | Self::Fp8(Fp8Rows { data: x, .. }, _) => x,
        }
    }

    pub(super) fn dtype(&self) -> DType {
        match self {
            Self::Values(x) => x.dtype(),
            Self::Fp8(_, dtype) => *dtype,
        }
    }

    /// `(n, input)`.
    pub(super) fn flat(self) -> Result<Self> {
        let flat = |x: Tensor| x.reshape(((), x.dim(D::Minus1)?));
        Ok(match self {
            Self::Values(x) => Self::Values(flat(x)?),
            Self::Fp8(Fp8Rows { data, scale }, dtype) => Self::Fp8(Fp8Rows { data: flat(data)?, scale: flat(scale)? }, dtype),
        })
    }

    pub(super) fn values(&self) -> Result<Tensor> {
        match self {
            Self::Values(x) => Ok(x.clone()),
            Self::Fp8(rows, dtype) => rows.widen(*dtype),
        }
    }

    pub(super) fn fp8(&self) -> Result<Fp8Rows> {
        match self {
            Self::Values(x) => kernels::quantise_fp8(x),
            Self::Fp8(rows, _) => Ok(rows.clone()),
        }
    }
}
