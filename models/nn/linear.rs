//! The one linear layer: dense, fp8 or GGUF weights behind the same `forward`.

use std::sync::Arc;

use candle_core::quantized::{QStorage, QTensor};
use candle_core::{D, DType, Device, Result, Tensor};
use kernels::{Addend, Delta};

use super::Parameter;

/// A weight matrix `(output, input)` as it is kept in memory.
#[derive(Debug, Clone)]
pub enum Weight {
    /// In the dtype of computation.
    Dense(Tensor),
    /// fp8 e4m3, with one f32 scale `()` or one for each row `(output, 1)` if the file has them; and whether activations are to be
    /// fp8 too in its products, for which there must be a scale for each row.
    Fp8 { data: Tensor, scale: Option<Tensor>, products: bool },
    /// GGUF blocks.
    Quantised(Arc<QTensor>),
}

impl Weight {
    /// The whole matrix in `dtype`, shape `(output, input)`.
    pub fn dense(&self, dtype: DType) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => weight.to_dtype(dtype),
            Self::Fp8 { data, scale, .. } => kernels::widen_fp8(data, scale.as_ref(), dtype),
            Self::Quantised(blocks) => blocks.dequantize(&blocks.device())?.to_dtype(dtype),
        }
    }

    /// Where it is.
    fn device(&self) -> Device {
        match self {
            Self::Dense(weight) | Self::Fp8 { data: weight, .. } => weight.device().clone(),
            Self::Quantised(blocks) => blocks.device(),
        }
    }

    /// The same on another device.
    pub(crate) fn to_device(&self, device: &Device) -> Result<Self> {
        if self.device().same_device(device) {
            return Ok(self.clone());
        }
        Ok(match self {
            Self::Dense(weight) => Self::Dense(weight.to_device(device)?),
            Self::Fp8 { data, scale, products } => Self::Fp8 {
                products: *products,
                data: data.to_device(device)?,
                scale: scale.as_ref().map(|scale| scale.to_device(device)).transpose()?,
            },
            Self::Quantised(blocks) => {
                let moved = QStorage::from_data(blocks.data()?, device, blocks.dtype())?;
                Self::Quantised(Arc::new(QTensor::new(moved, blocks.shape())?))
            }
        })
    }
}

/// `y = x Wᵀ + b`, and what a LoRA adds to it.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Parameter,
    bias: Option<Parameter>,
}

impl Linear {
    #[must_use]
    pub fn new(weight: Parameter, bias: Option<Parameter>) -> Self {
        Self { weight, bias }
    }

    /// x `(.., input)` -> `(.., output)`, in x's dtype. Errors if the last dimension is not the weight's.
    ///
    /// fp8 and GGUF matrices are widened before the product: FLUX multiplies hundreds of tokens at once, so widening costs
    /// little next to the product and the activations keep their precision.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.apply(x, false)
    }

    /// [`Self::forward`], then GELU (tanh form).
    pub fn forward_gelu(&self, x: &Tensor) -> Result<Tensor> {
        self.apply(x, true)
    }

    fn apply(&self, x: &Tensor, gelu: bool) -> Result<Tensor> {
        let (weight, branch) = self.weight.current()?;
        // What stays in main memory is sent to the card for this product.
        let weight = weight.to_device(x.device())?;
        let bias = self.bias.as_ref().map(Parameter::tensor).transpose()?;
        let mut shape = x.dims().to_vec();
        let x = x.reshape(((), x.dim(D::Minus1)?))?;
        // What a branch adds comes before GELU.
        let in_product = gelu && branch.is_empty();
        let mut y = match &weight {
            Weight::Fp8 { data, scale: Some(scale), products: true } => {
                kernels::linear_fp8(&x, data, scale, bias.as_ref(), in_product)?
            }
            weight if in_product => kernels::linear_gelu(&x, &weight.dense(x.dtype())?, bias.as_ref())?,
            weight => kernels::linear(&x, &weight.dense(x.dtype())?, bias.as_ref())?,
        };
        for addend in branch.iter() {
            y = add_branch(y, &x, addend)?;
        }
        if gelu && !branch.is_empty() {
            y = kernels::gelu(&y)?;
        }
        if let Some(last) = shape.last_mut() {
            *last = y.dim(1)?;
        }
        y.reshape(shape)
    }
}

/// y `(n, output)` plus x `(n, input)` through a low-rank (or dense) branch of some of the output's columns.
fn add_branch(y: Tensor, x: &Tensor, addend: &Addend) -> Result<Tensor> {
    let update = match &addend.delta {
        Delta::LowRank { up, down } => x.matmul(&down.t()?)?.matmul(&up.t()?)?,
        Delta::Dense(delta) => x.matmul(&delta.t()?)?,
    };
    let after = y.dim(1)? - addend.rows.end;
    y + update.pad_with_zeros(1, addend.rows.start, after)?
}
