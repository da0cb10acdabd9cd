//! What a single block's attention and MLP find, side by side: `[attention, gelu(x)]`, made where the layer after it reads it.

use candle_core::{D, DType, Result, Tensor};

use super::activation::{gelu_beside, gelu_beside_fp8};
use super::attention::attention_into;
use super::fp8::Fp8Rows;
use super::heads::Heads;
use super::linear::linear;
use crate::launch::applies;

/// GELU (tanh form) of x `(.., m)`, that is to stand beside attention.
#[derive(Debug, Clone)]
pub enum Beside {
    /// x: nothing is done yet.
    Open(Tensor),
    /// `(.., room + m)`, of which the right part is there.
    Placed(Tensor),
}

impl Beside {
    /// y `(.., first + m)` -> its first columns, and the others as x.
    pub fn open(y: &Tensor, first: usize) -> Result<(Tensor, Self)> {
        let m = y.dim(D::Minus1)? - first;
        Ok((y.narrow(D::Minus1, 0, first)?, Self::Open(y.narrow(D::Minus1, first, m)?)))
    }

    /// The same, if it is in one piece, in another shape without the last dimension.
    pub fn reshape(self, outer: &[usize]) -> Result<Self> {
        let shaped = |x: Tensor| x.reshape([outer, &[x.dim(D::Minus1)?]].concat());
        Ok(match self {
            Self::Open(x) => Self::Open(shaped(x)?),
            Self::Placed(rows) => Self::Placed(shaped(rows)?),
        })
    }
}

/// Whether [`linear_beside`] of x makes more than [`linear`].
#[must_use]
pub fn places_beside(x: &Tensor) -> bool {
    x.device().is_cuda() && applies(x) && matches!(x.dtype(), DType::F16 | DType::BF16)
}

/// x `(n, input)`, weight `(first + m, input)`, bias `(first + m)` -> the first columns of [`linear`] `(n, first)`, and the others for
/// [`attention_beside`], whose columns are `room`.
///
/// cuBLASLt does GELU to its product before that is written, and writes it beside the room: two products instead of one, and nothing
/// is read and written between this layer and the one after attention. Bytes for each of the m values (16 bits): one product and
/// [`gelu_beside`] 6, here 2; for each of attention's in [`attention_beside`] 6 and 2.
pub fn linear_beside(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, first: usize, room: usize) -> Result<(Tensor, Beside)> {
    #[cfg(feature = "cuda")]
    if let Some((y, rows)) = crate::lt::linear_beside(x, weight, bias, first, room)? {
        return Ok((y, Beside::Placed(rows)));
    }
    let _ = room;
    Beside::open(&linear(x, weight, bias)?, first)
}

/// [`crate::attention`] of these heads, `scale` being 1 / √e, and what stands beside it -> `(b, l, h e + m)`.
pub fn attention_beside(heads: &Heads, right: &Beside) -> Result<Tensor> {
    match right {
        Beside::Open(x) => gelu_beside(&heads.attend()?, x),
        Beside::Placed(rows) => {
            let (_, h, _, e) = heads.q.dims4()?;
            let (b, l, width) = rows.dims3()?;
            // As heads that lie side by side, of which attention's are the first.
            if width.is_multiple_of(e)
                && attention_into(
                    &heads.q,
                    &heads.k,
                    &heads.v,
                    heads.scale()?,
                    &rows.reshape((b, l, width / e, e))?.narrow(2, 0, h)?,
                )?
            {
                return Ok(rows.clone());
            }
            rows.slice_set(&heads.attend()?.contiguous()?, D::Minus1, 0)?;
            Ok(rows.clone())
        }
    }
}

/// [`crate::quantise_fp8`] of [`attention_beside`].
pub fn attention_beside_fp8(heads: &Heads, right: &Beside) -> Result<Fp8Rows> {
    match right {
        Beside::Open(x) => gelu_beside_fp8(&heads.attend()?, x),
        Beside::Placed(_) => super::fp8::quantise_fp8(&attention_beside(heads, right)?),
    }
}
