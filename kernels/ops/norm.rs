//! Norms over the last dimension with statistics in f32, and what FLUX.1 does around them.

use candle_core::{D, DType, Result, Tensor};

use super::cpu;

/// x `(.., d)` -> `(x - mean) / sqrt(variance + eps)` over d, same shape and dtype.
pub fn layer_norm(x: &Tensor, eps: f32) -> Result<Tensor> {
    if x.device().is_cpu() {
        return cpu::rows(
            x,
            #[inline(always)]
            |_, x, y| normalise(x, eps, y, |_, v| v),
        );
    }
    let dtype = x.dtype();
    // bf16 has 8 bits of mantissa: a mean over thousands of channels needs f32.
    let x = x.to_dtype(DType::F32)?;
    let x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(variance + f64::from(eps))?.sqrt()?)?.to_dtype(dtype)
}

/// x `(b, l, d)`, scale and shift `(b, 1, d)` -> `layer_norm(x) * (1 + scale) + shift`, same shape and dtype as x.
///
/// Fused on the CPU, where composed ops would read and write x three times.
pub fn modulated_norm(x: &Tensor, scale: &Tensor, shift: &Tensor, eps: f32) -> Result<Tensor> {
    let (_, l, d) = x.dims3()?;
    if !x.device().is_cpu() {
        return layer_norm(x, eps)?.broadcast_mul(&(scale + 1.)?)?.broadcast_add(shift);
    }
    cpu::read(scale, |scale| {
        cpu::read(shift, |shift| {
            cpu::rows(
                x,
                #[inline(always)]
                |row, x, y| {
                    let (scale, shift) = (item(scale, row / l, d), item(shift, row / l, d));
                    normalise(x, eps, y, |i, v| v * (1.0 + scale[i]) + shift[i]);
                },
            )
        })?
    })?
}

/// x and update `(b, l, d)`, gate `(b, 1, d)` -> `x + gate * update`, in x's dtype.
pub fn add_gated(x: &Tensor, gate: &Tensor, update: &Tensor) -> Result<Tensor> {
    let (_, l, d) = x.dims3()?;
    if !x.device().is_cpu() {
        return x + update.broadcast_mul(gate)?;
    }
    if update.dims() != x.dims() {
        candle_core::bail!("an update of {:?} for {:?}", update.shape(), x.shape());
    }
    cpu::read(gate, |gate| {
        cpu::read(update, |update| {
            cpu::rows(
                x,
                #[inline(always)]
                |row, x, y| {
                    let (gate, update) = (item(gate, row / l, d), item(update, row, d));
                    y.iter_mut().zip(x).zip(gate).zip(update).for_each(|(((y, x), gate), update)| *y = x + gate * update);
                },
            )
        })?
    })?
}

/// x `(.., d)`, scale `(d)` f32 -> `x / sqrt(mean(x²) + eps) * scale`, same shape and dtype as x.
pub fn rms_norm(x: &Tensor, scale: &Tensor, eps: f32) -> Result<Tensor> {
    if x.device().is_cpu() {
        return cpu::read(scale, |scale| {
            cpu::rows(
                x,
                #[inline(always)]
                |_, x, y| root_mean_square(x, scale, eps, y),
            )
        })?;
    }
    let dtype = x.dtype();
    let x = x.to_dtype(DType::F32)?;
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean + f64::from(eps))?.sqrt()?)?.broadcast_mul(scale)?.to_dtype(dtype)
}

/// The values of one item of width d.
#[inline(always)]
fn item(values: &[f32], index: usize, d: usize) -> &[f32] {
    &values[index * d..(index + 1) * d]
}

/// `y[i] = then(i, (x[i] - mean) / sqrt(variance + eps))`.
#[inline(always)]
fn normalise(x: &[f32], eps: f32, y: &mut [f32], then: impl Fn(usize, f32) -> f32) {
    let centre = cpu::mean(x, |v| v);
    let factor = 1.0 / (cpu::mean(x, |v| (v - centre) * (v - centre)) + eps).sqrt();
    y.iter_mut().zip(x).enumerate().for_each(|(i, (y, x))| *y = then(i, (x - centre) * factor));
}

/// `y = x / sqrt(mean(x²) + eps) * scale`.
#[inline(always)]
pub(super) fn root_mean_square(x: &[f32], scale: &[f32], eps: f32, y: &mut [f32]) {
    let factor = 1.0 / (cpu::mean(x, |v| v * v) + eps).sqrt();
    y.iter_mut().zip(x.iter().zip(scale)).for_each(|(y, (x, scale))| *y = x * factor * scale);
}
