//! Attention without a mask, in chunks of queries so that the score matrix stays under a budget.

use candle_core::{D, DType, Result, Tensor};

use super::activation::softmax;

/// Largest score matrix, in bytes, that is held at once.
#[derive(Debug, Clone, Copy)]
pub struct Budget(pub usize);

impl Default for Budget {
    /// 256 MiB: every FLUX.1 call below 1024 x 1024 in bf16 stays in one or a few chunks.
    fn default() -> Self {
        Self(256 << 20)
    }
}

/// q `(b, h, l, e)`, k and v `(b, h, l_kv, e)`, `bias` broadcastable to `(b, h, l, l_kv)` -> `(b, h, l, e)` in q's dtype.
///
/// `scale` multiplies the scores. The softmax is f32 whatever the dtype of q is; on the CPU, which gains nothing from 16-bit
/// products, so are both products. Errors if the shapes do not fit.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, bias: Option<&Tensor>, budget: Budget) -> Result<Tensor> {
    let (b, h, l, _) = q.dims4()?;
    let (l_kv, dtype) = (k.dim(2)?, q.dtype());
    let product = if q.device().is_cpu() { DType::F32 } else { dtype };
    let (q, v) = ((q.to_dtype(product)? * scale)?, v.to_dtype(product)?.contiguous()?);
    let keys = k.to_dtype(product)?.transpose(2, 3)?.contiguous()?;
    let row_bytes = b * h * l_kv * DType::F32.size_in_bytes();
    let rows = (budget.0 / row_bytes.max(1)).clamp(1, l);
    let chunk = |start: usize| {
        let rows = rows.min(l - start);
        let scores = q.narrow(2, start, rows)?.contiguous()?.matmul(&keys)?.to_dtype(DType::F32)?;
        let scores = match bias {
            Some(bias) if bias.dim(2)? > 1 => scores.broadcast_add(&bias.narrow(2, start, rows)?)?,
            Some(bias) => scores.broadcast_add(bias)?,
            None => scores,
        };
        softmax(&scores)?.to_dtype(product)?.matmul(&v)?.to_dtype(dtype)
    };
    if rows == l {
        return chunk(0);
    }
    let chunks = (0..l).step_by(rows).map(chunk).collect::<Result<Vec<_>>>()?;
    Tensor::cat(&chunks, D::Minus2)
}
