//! Attention, in chunks of queries so that the score matrix stays small.

use candle_core::{D, DType, Result, Tensor};

use super::activation::softmax;
use crate::cudnn;
use crate::launch::{Launch, Pointer, applies, in_eights, launch, output};
use crate::whose::{Whose, Work, chosen};

/// Largest score matrix, in bytes, that is held at once: every FLUX.1 call below 1024 x 1024 in bf16 stays in one or a few chunks.
pub const SCORES_BYTES: usize = 256 << 20;

/// q `(b, h, l, e)`, k and v `(b, h, l_kv, e)`, `bias` broadcastable to `(b, h, l, l_kv)` -> `(b, h, l, e)` in q's dtype.
///
/// `scale` multiplies the scores. Scores and softmax are f32 whatever the dtype of q is (but scores are rounded to it on Metal); on the
/// CPU, which gains nothing from 16-bit products, so is the second product. Errors if the shapes do not fit.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, bias: Option<&Tensor>) -> Result<Tensor> {
    if bias.is_none()
        && let Some(y) = fused(q, k, v, scale, None)?
    {
        // Heads lie side by side, so that joining them costs nothing.
        return y.transpose(1, 2);
    }
    attention_in_chunks(q, k, v, scale, bias, SCORES_BYTES)
}

/// [`attention`] without a bias into y `(b, l, h, e)`, which may be a view whose heads lie side by side; `false` if no kernel does it.
pub(super) fn attention_into(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, y: &Tensor) -> Result<bool> {
    Ok(fused(q, k, v, scale, Some(y))?.is_some())
}

/// Attention by one kernel -> `into` or, without it, a new tensor, `(b, l, h, e)`; `None` if there is none for it.
fn fused(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, into: Option<&Tensor>) -> Result<Option<Tensor>> {
    if chosen(Work::Attention) == Some(Whose::Cudnn)
        && let Some(y) = cudnn::attention(q, k, v, scale, into)?
    {
        return Ok(Some(y));
    }
    by_kernel(q, k, v, scale, into)
}

/// Where a fused attention writes: `into`, if a kernel can, or a new tensor.
pub(crate) fn destination(q: &Tensor, into: Option<&Tensor>) -> Result<Option<Tensor>> {
    let (b, h, l, e) = q.dims4()?;
    Ok(match into {
        None => Some(output((b, l, h, e), q.dtype(), q.device())?),
        Some(y) => (y.dims() == [b, l, h, e] && y.dtype() == q.dtype() && in_eights(y) && y.stride()[2] == e).then(|| y.clone()),
    })
}

/// [`attention`] by candle's operations, with scores of no more than so many bytes at once if that holds a row.
#[doc(hidden)]
pub fn attention_in_chunks(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    bias: Option<&Tensor>,
    bytes: usize,
) -> Result<Tensor> {
    let (b, h, l, _) = q.dims4()?;
    let (l_kv, dtype) = (k.dim(2)?, q.dtype());
    let product = if q.device().is_cpu() { DType::F32 } else { dtype };
    let (q, k, v) = (q.to_dtype(product)?, k.to_dtype(product)?.contiguous()?, v.to_dtype(product)?.contiguous()?);
    let row_bytes = b * h * l_kv * DType::F32.size_in_bytes();
    let rows = (bytes / row_bytes.max(1)).clamp(1, l);
    let chunk = |start: usize| {
        let rows = rows.min(l - start);
        let scores = scores(&q.narrow(2, start, rows)?.contiguous()?, &k, scale)?;
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

/// `scale q kᵀ` in f32.
fn scores(q: &Tensor, k: &Tensor, scale: f64) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(scores) = crate::blas::scores(q, k, scale)? {
        return Ok(scores);
    }
    (q * scale)?.matmul(&k.transpose(2, 3)?)?.to_dtype(DType::F32)
}

/// As `AttentionArguments` in cuda/attention.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Arguments {
    q: Pointer,
    k: Pointer,
    v: Pointer,
    y: Pointer,
    /// Of q, k and v: from one item, head and token to the next.
    strides: [[u64; 3]; 3],
    /// Of y: from one item and token to the next.
    y_strides: [u64; 2],
    h: u32,
    l: u32,
    l_kv: u32,
    scale: f32,
}

/// Queries and threads of a block, and keys of a tile, as in cuda/attention.cu.
const QUERIES: usize = 128;
const THREADS: usize = 128;
const KEYS: usize = 64;

/// [`fused`] by our kernel: 16-bit values, heads of 16, 32, 64 or 128 channels.
fn by_kernel(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, into: Option<&Tensor>) -> Result<Option<Tensor>> {
    let ((b, h, l, e), (_, _, l_kv, _), dtype) = (q.dims4()?, k.dims4()?, q.dtype());
    let kernel = match e {
        16 => "attention_16",
        32 => "attention_32",
        64 => "attention_64",
        128 => "attention_128",
        _ => return Ok(None),
    };
    let fits = |x: &Tensor| x.dtype() == dtype && in_eights(x);
    let shaped = k.dims() == [b, h, l_kv, e] && v.dims() == k.dims() && b * h * l * l_kv > 0;
    if !(applies(q) && matches!(dtype, DType::F16 | DType::BF16) && shaped && fits(q) && fits(k) && fits(v)) {
        return Ok(None);
    }
    let Some(y) = destination(q, into)? else { return Ok(None) };
    let y_strides = [y.stride()[0] as u64, y.stride()[1] as u64];
    let strides = [q, k, v].map(|x| [x.stride()[0] as u64, x.stride()[1] as u64, x.stride()[2] as u64]);
    launch([q, k, v], [&y], |[q, k, v], [y]| Launch {
        kernel,
        values: dtype,
        grid: [l.div_ceil(QUERIES), h, b],
        threads: THREADS,
        shared: (QUERIES + 4 * KEYS) * e * dtype.size_in_bytes(),
        arguments: Arguments {
            q,
            k,
            v,
            y,
            strides,
            y_strides,
            h: h as u32,
            l: l as u32,
            l_kv: l_kv as u32,
            scale: (scale * std::f64::consts::LOG2_E) as f32,
        },
    })?;
    Ok(Some(y))
}
