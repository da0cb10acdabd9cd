//! T5's self-attention: unscaled scores plus the relative position bias.

use candle_core::Tensor;

use super::Sizes;
use crate::Result;
use crate::nn::{Linear, attention};
use crate::weights::{Error, Source};

#[derive(Debug)]
pub(super) struct SelfAttention {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    heads: usize,
}

impl SelfAttention {
    pub(super) fn load(source: &Source, sizes: Sizes) -> Result<Self, Error> {
        let inner = sizes.heads * sizes.e;
        Ok(Self {
            q: source.linear_no_bias("q", inner, sizes.d)?,
            k: source.linear_no_bias("k", inner, sizes.d)?,
            v: source.linear_no_bias("v", inner, sizes.d)?,
            o: source.linear_no_bias("o", sizes.d, inner)?,
            heads: sizes.heads,
        })
    }

    /// x `(b, l, d)`, bias `(1, h, l, l)` -> `(b, l, d)`.
    pub(super) fn forward(&self, x: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let (b, l, _) = x.dims3()?;
        let split = |x: Tensor| x.reshape((b, l, self.heads, ()))?.transpose(1, 2); // (b, h, l, e)
        let (q, k, v) = (split(self.q.forward(x)?)?, split(self.k.forward(x)?)?, split(self.v.forward(x)?)?);
        let attended = attention(&q, &k, &v, 1.0, Some(bias))?;
        self.o.forward(&attended.transpose(1, 2)?.reshape((b, l, ()))?) // heads side by side again
    }
}
