//! Norms over the last dimension with statistics in f32, in one pass on the CPU.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, D, DType, Layout, Result, Shape, Tensor, WithDType};
use rayon::prelude::*;

/// x `(.., d)` -> `(x - mean) / sqrt(variance + eps)` over d, same shape and dtype.
pub fn layer_norm(x: &Tensor, eps: f32) -> Result<Tensor> {
    if x.device().is_cpu() {
        return x.contiguous()?.apply_op1_no_bwd(&Rows { eps, norm: Norm::Layer });
    }
    let dtype = x.dtype();
    // bf16 has 8 bits of mantissa: a mean over thousands of channels needs f32.
    let x = x.to_dtype(DType::F32)?;
    let x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(variance + f64::from(eps))?.sqrt()?)?.to_dtype(dtype)
}

/// x `(.., d)`, scale `(d)` f32 -> `x / sqrt(mean(x²) + eps) * scale`, same shape and dtype as x.
pub fn rms_norm(x: &Tensor, scale: &Tensor, eps: f32) -> Result<Tensor> {
    if x.device().is_cpu() {
        return x.contiguous()?.apply_op1_no_bwd(&Rows { eps, norm: Norm::RootMeanSquare(scale.to_vec1()?) });
    }
    let dtype = x.dtype();
    let x = x.to_dtype(DType::F32)?;
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean + f64::from(eps))?.sqrt()?)?.broadcast_mul(scale)?.to_dtype(dtype)
}

enum Norm {
    Layer,
    RootMeanSquare(Vec<f32>),
}

/// The CPU kernel: each row is read once and written once.
struct Rows {
    eps: f32,
    norm: Norm,
}

impl Rows {
    fn run<T: WithDType + Send + Sync>(&self, x: &[T], d: usize) -> Vec<T> {
        let mut y = vec![T::zero(); x.len()];
        let each = |(x, y): (&[T], &mut [T])| {
            let x: Vec<f32> = x.iter().map(|v| v.to_f64() as f32).collect();
            let mean = |values: &mut dyn Iterator<Item = f32>| (values.map(f64::from).sum::<f64>() / d as f64) as f32;
            match &self.norm {
                Norm::Layer => {
                    let centre = mean(&mut x.iter().copied());
                    let variance = mean(&mut x.iter().map(|v| (v - centre) * (v - centre)));
                    let factor = 1.0 / (variance + self.eps).sqrt();
                    y.iter_mut().zip(x).for_each(|(y, x)| *y = T::from_f64(f64::from((x - centre) * factor)));
                }
                Norm::RootMeanSquare(scale) => {
                    let factor = 1.0 / (mean(&mut x.iter().map(|v| v * v)) + self.eps).sqrt();
                    y.iter_mut()
                        .zip(x.iter().zip(scale))
                        .for_each(|(y, (x, scale))| *y = T::from_f64(f64::from(x * factor * scale)));
                }
            }
        };
        x.par_chunks(d).zip(y.par_chunks_mut(d)).with_min_len(8).for_each(each);
        y
    }
}

impl CustomOp1 for Rows {
    fn name(&self) -> &'static str {
        match self.norm {
            Norm::Layer => "layer_norm",
            Norm::RootMeanSquare(_) => "rms_norm",
        }
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some((start, end)) = layout.contiguous_offsets() else { candle_core::bail!("{} needs contiguous rows", self.name()) };
        let d = *layout.dims().last().unwrap_or(&1);
        let storage = match storage {
            CpuStorage::F32(x) => CpuStorage::F32(self.run(&x[start..end], d)),
            CpuStorage::BF16(x) => CpuStorage::BF16(self.run(&x[start..end], d)),
            CpuStorage::F16(x) => CpuStorage::F16(self.run(&x[start..end], d)),
            other => candle_core::bail!("{} is not defined for {:?}", self.name(), other.dtype()),
        };
        Ok((storage, layout.shape().clone()))
    }
}
