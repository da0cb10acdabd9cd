//! Rotary embedding of interleaved pairs, as FLUX.1 rotates q and k.

use candle_core::{DType, Result, Tensor};

/// x `(b, h, l, e)`, cos and sin `(l, e/2)` f32 -> the same shape and dtype as x: pair (x₂ᵢ, x₂ᵢ₊₁) turned by its angle.
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    // The rotation is f32: in bf16 the products of neighbouring channels would round apart.
    let rotated = candle_nn::rotary_emb::rope_i(&x.to_dtype(DType::F32)?.contiguous()?, cos, sin)?;
    rotated.to_dtype(x.dtype())
}
