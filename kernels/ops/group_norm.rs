//! Group norm with SiLU after it, in one pass over memory on the CPU.
//!
//! Fuses centring, scaling, the affine map and SiLU: composed of candle ops these read and write a picture's activations about
//! ten times.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, WithDType, bail};
use rayon::prelude::*;

use super::cpu::{silu, sum};
use crate::launch::{Launch, Pointer, applies, launch, output, suffix};

/// What follows the norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    Nothing,
    Silu,
}

/// x `(b, c, y, x)`, weight and bias `(c)` -> `(x - mean) / sqrt(variance + eps) * weight + bias`, then `after`; same shape and dtype.
///
/// Mean and variance are those of each picture's `c / groups` neighbouring channels, in f32. Errors if the groups do not divide c.
pub fn group_norm(x: &Tensor, groups: usize, weight: &Tensor, bias: &Tensor, eps: f32, after: After) -> Result<Tensor> {
    let c = x.dim(1)?;
    if groups == 0 || !c.is_multiple_of(groups) || weight.dims() != [c] || bias.dims() != [c] {
        bail!("group norm of {:?} in {groups} groups with weight {:?} and bias {:?}", x.shape(), weight.shape(), bias.shape());
    }
    // Parameters are few, and f32 inside.
    let (weight, bias) = (weight.to_dtype(DType::F32)?.contiguous()?, bias.to_dtype(DType::F32)?.contiguous()?);
    if let Some(y) = by_kernel(x, groups, [&weight, &bias], eps, after)? {
        return Ok(y);
    }
    if x.device().is_cpu() {
        let op = GroupNorm { per_group: c / groups, weight: weight.to_vec1()?, bias: bias.to_vec1()?, eps, after };
        return x.contiguous()?.apply_op1_no_bwd(&op);
    }
    composed(x, groups, &weight, &bias, eps, after)
}

/// As `GroupNormArguments` in cuda/group_norm.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Arguments {
    x: Pointer,
    weight: Pointer,
    bias: Pointer,
    parts: Pointer,
    y: Pointer,
    c: u32,
    groups: u32,
    blocks: u32,
    silu: u32,
    area: u64,
    eps: f32,
}

const THREADS: usize = 256;
/// Blocks of one group's statistics at most, each for so many values at least.
const MOST_BLOCKS: usize = 64;
const OF_A_BLOCK: usize = 16 << 10;

/// `None` if the kernel does not apply.
fn by_kernel(x: &Tensor, groups: usize, [weight, bias]: [&Tensor; 2], eps: f32, after: After) -> Result<Option<Tensor>> {
    let (b, c, height, width) = x.dims4()?;
    let (area, dtype) = (height * width, x.dtype());
    let size = c / groups * area;
    let fits = x.is_contiguous() && x.layout().start_offset().is_multiple_of(8) && size.is_multiple_of(8) && size > 0;
    if !(applies(x) && suffix(dtype).is_some() && fits) {
        return Ok(None);
    }
    let blocks = size.div_ceil(OF_A_BLOCK).min(MOST_BLOCKS);
    let parts = output((b * groups, blocks, 3), DType::F32, x.device())?;
    let y = output(x.shape(), dtype, x.device())?;
    let arguments = |x, weight, bias, parts, y| Arguments {
        x,
        weight,
        bias,
        parts,
        y,
        c: c as u32,
        groups: groups as u32,
        blocks: blocks as u32,
        silu: u32::from(after == After::Silu),
        area: area as u64,
        eps,
    };
    launch([x, weight, bias], [&parts], |[x, weight, bias], [parts]| Launch {
        kernel: "group_norm_parts",
        values: dtype,
        grid: [blocks, b * groups, 1],
        threads: THREADS,
        shared: 128,
        arguments: arguments(x, weight, bias, parts, Pointer::NULL),
    })?;
    launch([x, weight, bias, &parts], [&y], |[x, weight, bias, parts], [y]| Launch {
        kernel: "group_norm_apply",
        values: dtype,
        grid: [size.div_ceil(OF_A_BLOCK), b * groups, 1],
        threads: THREADS,
        shared: 16,
        arguments: arguments(x, weight, bias, parts, y),
    })?;
    Ok(Some(y))
}

/// Largest f32 copy of an input, in bytes, that [`composed`] makes at once.
const SLICE_BYTES: usize = 256 << 20;

/// By candle ops, a few groups at a time so that the f32 copies stay small next to the activations.
fn composed(x: &Tensor, groups: usize, weight: &Tensor, bias: &Tensor, eps: f32, after: After) -> Result<Tensor> {
    let (b, c, height, width) = x.dims4()?;
    let (per_group, dtype) = (c / groups, x.dtype());
    let group_bytes = b * per_group * height * width * DType::F32.size_in_bytes();
    let at_once = (SLICE_BYTES / group_bytes.max(1)).clamp(1, groups);
    let slice = |first: usize| {
        let n = at_once.min(groups - first);
        let (from, channels) = (first * per_group, n * per_group);
        // bf16 has 8 bits of mantissa: statistics over millions of pixels need f32.
        let x = x.narrow(1, from, channels)?.to_dtype(DType::F32)?.reshape((b, n, per_group, height * width))?;
        // Channel by channel first: one long sum for each group would leave most of a GPU idle.
        let mean = |x: &Tensor| x.mean_keepdim(3)?.mean_keepdim(2);
        let x = x.broadcast_sub(&mean(&x)?)?;
        let x = x.broadcast_div(&(mean(&x.sqr()?)? + f64::from(eps))?.sqrt()?)?;
        let (weight, bias) = (weight.narrow(0, from, channels)?, bias.narrow(0, from, channels)?);
        let x = x.broadcast_mul(&weight.reshape((n, per_group, 1))?)?.broadcast_add(&bias.reshape((n, per_group, 1))?)?;
        let x = if after == After::Silu { x.silu()? } else { x };
        x.reshape((b, channels, height, width))?.to_dtype(dtype)
    };
    let slices = (0..groups).step_by(at_once).map(slice).collect::<Result<Vec<_>>>()?;
    Tensor::cat(&slices, 1)
}

/// The CPU kernel: each group is read three times from cache and written once.
struct GroupNorm {
    per_group: usize,
    weight: Vec<f32>,
    bias: Vec<f32>,
    eps: f32,
    after: After,
}

impl GroupNorm {
    fn run<T: WithDType + Send + Sync>(&self, x: &[T], c: usize, area: usize) -> Vec<T> {
        let mut y = vec![T::zero(); x.len()];
        let (size, groups) = (self.per_group * area, c / self.per_group);
        let group = |(i, (x, y)): (usize, (&[T], &mut [T]))| {
            let x: Vec<f32> = x.iter().map(|v| v.to_f64() as f32).collect();
            let (centre, factor) = statistics(&x, self.eps);
            let first = i % groups * self.per_group;
            for (k, (x, y)) in x.chunks(area).zip(y.chunks_mut(area)).enumerate() {
                let scale = self.weight[first + k] * factor;
                let shift = self.bias[first + k] - centre * scale;
                let each = |f: fn(f32) -> f32, y: &mut [T]| {
                    y.iter_mut().zip(x).for_each(|(y, x)| *y = T::from_f64(f64::from(f(x * scale + shift))));
                };
                match self.after {
                    After::Nothing => each(|v| v, y),
                    After::Silu => each(silu, y),
                }
            }
        };
        x.par_chunks(size.max(1)).zip(y.par_chunks_mut(size.max(1))).enumerate().for_each(group);
        y
    }
}

/// Mean and `1 / sqrt(variance + eps)`.
fn statistics(x: &[f32], eps: f32) -> (f32, f32) {
    let count = x.len() as f64;
    let mean = (sum(x, |v| v) / count) as f32;
    let variance = (sum(x, |v| (v - mean) * (v - mean)) / count) as f32;
    (mean, 1.0 / (variance + eps).sqrt())
}

impl CustomOp1 for GroupNorm {
    fn name(&self) -> &'static str {
        "group_norm"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some((start, end)) = layout.contiguous_offsets() else { bail!("group_norm needs contiguous rows") };
        let (_, c, height, width) = layout.shape().dims4()?;
        let area = height * width;
        let storage = match storage {
            CpuStorage::F32(x) => CpuStorage::F32(self.run(&x[start..end], c, area)),
            CpuStorage::BF16(x) => CpuStorage::BF16(self.run(&x[start..end], c, area)),
            CpuStorage::F16(x) => CpuStorage::F16(self.run(&x[start..end], c, area)),
            other => bail!("group_norm is not defined for {:?}", other.dtype()),
        };
        Ok((storage, layout.shape().clone()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn largest(x: &Tensor) -> f32 {
        x.to_dtype(DType::F32).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn the_fused_norm_equals_the_composed_one() {
        let random = |shape: &[usize]| Tensor::randn(0.5f32, 2.0, shape, &Device::Cpu).unwrap();
        for (shape, groups) in [([2, 8, 5, 7], 4), ([1, 6, 33, 40], 2), ([3, 4, 1, 1], 1), ([1, 4, 3, 3], 4)] {
            let (x, weight, bias) = (random(&shape), random(&shape[1..2]), random(&shape[1..2]));
            for after in [After::Nothing, After::Silu] {
                let plain = composed(&x, groups, &weight, &bias, 1e-6, after).unwrap();
                let fused = group_norm(&x, groups, &weight, &bias, 1e-6, after).unwrap();
                assert!(largest(&(fused - &plain).unwrap()) < 4e-6 * largest(&plain), "{shape:?} {after:?}");

                let half = group_norm(&x.to_dtype(DType::BF16).unwrap(), groups, &weight, &bias, 1e-6, after).unwrap();
                assert_eq!(half.dtype(), DType::BF16);
                let apart = largest(&(half.to_dtype(DType::F32).unwrap() - &plain).unwrap());
                assert!(apart < 0.02 * largest(&plain).max(1.0), "{shape:?} {after:?} bf16 {apart}");
            }
        }
    }

    #[test]
    fn groups_must_divide_the_channels() {
        let x = Tensor::zeros((1, 6, 2, 2), DType::F32, &Device::Cpu).unwrap();
        let one = Tensor::ones(6, DType::F32, &Device::Cpu).unwrap();
        assert!(group_norm(&x, 4, &one, &one, 1e-6, After::Nothing).is_err());
    }
}
