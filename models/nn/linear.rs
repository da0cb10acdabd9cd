//! The one linear layer: dense, fp8 or GGUF weights behind the same `forward`.

use std::sync::Arc;

use candle_core::quantized::QTensor;
use candle_core::{D, DType, Result, Tensor};

/// A weight matrix `(output, input)` as it is kept in memory.
#[derive(Debug, Clone)]
pub enum Weight {
    /// In the dtype of computation.
    Dense(Tensor),
    /// fp8 e4m3, with one f32 scale `()` or one for each row `(output, 1)` if the file has them.
    Fp8 { data: Tensor, scale: Option<Tensor> },
    /// GGUF blocks.
    Quantised(Arc<QTensor>),
}

impl Weight {
    /// The whole matrix in `dtype`, shape `(output, input)`.
    pub fn dense(&self, dtype: DType) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => weight.to_dtype(dtype),
            Self::Fp8 { data, scale: None } => data.to_dtype(dtype),
            // The product is rounded once: scales are f32.
            Self::Fp8 { data, scale: Some(scale) } => data.to_dtype(DType::F32)?.broadcast_mul(scale)?.to_dtype(dtype),
            Self::Quantised(blocks) => blocks.dequantize(&blocks.device())?.to_dtype(dtype),
        }
    }
}

/// `y = x Wᵀ + b`.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
}

impl Linear {
    #[must_use]
    pub fn new(weight: Weight, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    /// x `(.., input)` -> `(.., output)`, in x's dtype. Errors if the last dimension is not the weight's.
    ///
    /// fp8 and GGUF matrices are widened before the product: FLUX multiplies hundreds of tokens at once, so widening costs
    /// little next to the product and the activations keep their precision.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let weight = self.weight.dense(x.dtype())?;
        let mut shape = x.dims().to_vec();
        let y = kernels::linear(&x.reshape(((), x.dim(D::Minus1)?))?, &weight, self.bias.as_ref())?;
        if let Some(last) = shape.last_mut() {
            *last = y.dim(1)?;
        }
        y.reshape(shape)
    }
}
