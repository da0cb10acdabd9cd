//! Group norm with SiLU after it, of pixels whose channels lie side by side.
//!
//! Fuses centring, scaling, the affine map and SiLU: composed of candle ops these read and write a picture's activations about
//! ten times.

use candle_core::{DType, Result, Tensor, bail};
use rayon::prelude::*;

use super::cpu::{self, silu};
use crate::launch::{Launch, Pointer, applies, launch, output, suffix};

/// What follows the norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    Nothing,
    Silu,
}

/// x `(b, y, x, c)`, weight and bias `(c)` -> `(x - mean) / sqrt(variance + eps) * weight + bias`, then `after`; same shape and dtype.
///
/// Mean and variance are those of each picture's `c / groups` neighbouring channels, in f32. Errors if the groups do not divide c.
pub fn group_norm(x: &Tensor, groups: usize, weight: &Tensor, bias: &Tensor, eps: f32, after: After) -> Result<Tensor> {
    let (_, _, _, c) = x.dims4()?;
    if groups == 0 || !c.is_multiple_of(groups) || weight.dims() != [c] || bias.dims() != [c] {
        bail!("group norm of {:?} in {groups} groups with weight {:?} and bias {:?}", x.shape(), weight.shape(), bias.shape());
    }
    // Parameters are few, and f32 inside.
    let (weight, bias) = (weight.to_dtype(DType::F32)?.contiguous()?, bias.to_dtype(DType::F32)?.contiguous()?);
    if let Some(y) = by_kernel(x, groups, [&weight, &bias], eps, after)? {
        return Ok(y);
    }
    if x.device().is_cpu() {
        let op = GroupNorm { groups, weight: weight.to_vec1()?, bias: bias.to_vec1()?, eps, after };
        return op.run(x);
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
    affine: Pointer,
    y: Pointer,
    area: u64,
    pixels: u32,
    blocks: u32,
    c: u32,
    groups: u32,
    silu: u32,
    eps: f32,
}

const THREADS: usize = 256;
/// Most channels: a block has all of them, eight for each thread.
const MOST_CHANNELS: usize = 8 * THREADS;
/// Blocks of one picture's statistics at most, and values of a block at least.
const MOST_BLOCKS: usize = 1024;
const OF_A_BLOCK: usize = 16 << 10;

/// `None` if the kernel does not apply.
fn by_kernel(x: &Tensor, groups: usize, [weight, bias]: [&Tensor; 2], eps: f32, after: After) -> Result<Option<Tensor>> {
    let (b, height, width, c) = x.dims4()?;
    let (area, dtype) = (height * width, x.dtype());
    let fits = x.is_contiguous() && x.layout().start_offset().is_multiple_of(8) && c.is_multiple_of(8) && c <= MOST_CHANNELS;
    if !(applies(x) && suffix(dtype).is_some() && fits && x.elem_count() > 0) {
        return Ok(None);
    }
    let pixels = area.div_ceil((area * c).div_ceil(OF_A_BLOCK).min(MOST_BLOCKS));
    let blocks = area.div_ceil(pixels);
    let parts = output((b, groups, blocks, 3), DType::F32, x.device())?;
    let affine = output((b, 2, c), DType::F32, x.device())?;
    let y = output(x.shape(), dtype, x.device())?;
    let arguments = Arguments {
        x: Pointer::NULL,
        weight: Pointer::NULL,
        bias: Pointer::NULL,
        parts: Pointer::NULL,
        affine: Pointer::NULL,
        y: Pointer::NULL,
        area: area as u64,
        pixels: pixels as u32,
        blocks: blocks as u32,
        c: c as u32,
        groups: groups as u32,
        silu: u32::from(after == After::Silu),
        eps,
    };
    launch([x], [&parts], |[x], [parts]| Launch {
        kernel: "group_norm_parts",
        values: dtype,
        grid: [blocks, b, 1],
        threads: THREADS,
        shared: 2 * MOST_CHANNELS * DType::F32.size_in_bytes(),
        arguments: Arguments { x, parts, ..arguments },
    })?;
    launch([weight, bias, &parts], [&affine], |[weight, bias, parts], [affine]| Launch {
        kernel: "group_norm_join",
        values: DType::F32,
        grid: [groups, b, 1],
        threads: THREADS,
        shared: 128,
        arguments: Arguments { weight, bias, parts, affine, ..arguments },
    })?;
    let pixels = (OF_A_BLOCK / c).min(area);
    launch([x, &affine], [&y], |[x, affine], [y]| Launch {
        kernel: "group_norm_apply",
        values: dtype,
        grid: [area.div_ceil(pixels), b, 1],
        threads: THREADS,
        shared: 0,
        arguments: Arguments { x, affine, y, pixels: pixels as u32, ..arguments },
    })?;
    Ok(Some(y))
}

/// Largest f32 copy of an input, in bytes, that [`composed`] makes at once.
const SLICE_BYTES: usize = 256 << 20;

/// By candle ops, a few groups at a time so that the f32 copies stay small next to the activations.
fn composed(x: &Tensor, groups: usize, weight: &Tensor, bias: &Tensor, eps: f32, after: After) -> Result<Tensor> {
    let (b, height, width, c) = x.dims4()?;
    let (per_group, dtype) = (c / groups, x.dtype());
    let group_bytes = b * height * width * per_group * DType::F32.size_in_bytes();
    let at_once = (SLICE_BYTES / group_bytes.max(1)).clamp(1, groups);
    let slice = |first: usize| {
        let n = at_once.min(groups - first);
        let (from, channels) = (first * per_group, n * per_group);
        // bf16 has 8 bits of mantissa: statistics over millions of pixels need f32.
        let x = x.narrow(3, from, channels)?.to_dtype(DType::F32)?.reshape((b, height, width, n, per_group))?;
        // Row by row first: one long sum for each group would leave most of a GPU idle.
        let mean = |x: &Tensor| x.mean_keepdim(2)?.mean_keepdim(1)?.mean_keepdim(4);
        let x = x.broadcast_sub(&mean(&x)?)?;
        let x = x.broadcast_div(&(mean(&x.sqr()?)? + f64::from(eps))?.sqrt()?)?;
        let (weight, bias) = (weight.narrow(0, from, channels)?, bias.narrow(0, from, channels)?);
        let x = x.broadcast_mul(&weight.reshape((n, per_group))?)?.broadcast_add(&bias.reshape((n, per_group))?)?;
        let x = if after == After::Silu { x.silu()? } else { x };
        x.reshape((b, height, width, channels))?.to_dtype(dtype)
    };
    let slices = (0..groups).step_by(at_once).map(slice).collect::<Result<Vec<_>>>()?;
    Tensor::cat(&slices, 3)
}

/// The CPU kernel: stretches of pixels in parallel, read once for the statistics and once to apply them.
struct GroupNorm {
    groups: usize,
    weight: Vec<f32>,
    bias: Vec<f32>,
    eps: f32,
    after: After,
}

/// Values that one task works on; they stay in the second-level cache.
const TASK: usize = 1 << 15;
/// Values that a loop works on at least: a pixel may have fewer.
const WIDE: usize = 256;

impl GroupNorm {
    fn run(&self, x: &Tensor) -> Result<Tensor> {
        let c = self.weight.len();
        let picture = x.elem_count() / x.dim(0)?.max(1);
        // All that a loop works on: some pixels.
        let wide = c * WIDE.div_ceil(c.max(1));
        let y = cpu::read(x, |x| {
            let mut y: Vec<f32> = crate::zeros(x.len());
            for (x, y) in x.chunks_exact(picture.max(1)).zip(y.chunks_exact_mut(picture.max(1))) {
                let at_once = wide * (TASK / wide).max(1);
                let parts: Vec<_> = x.par_chunks(at_once).map(|x| self.statistics(x, wide)).collect();
                let (scale, shift) = self.affine(&parts, wide);
                x.par_chunks(at_once).zip(y.par_chunks_mut(at_once)).for_each(|(x, y)| self.apply(x, [&scale, &shift], y));
            }
            y
        })?;
        cpu::from_f32(y, x.shape(), x.dtype())
    }

    /// Of each group: count, mean and squared distance from it.
    fn statistics(&self, x: &[f32], wide: usize) -> Vec<[f64; 3]> {
        let (c, groups) = (self.weight.len(), self.groups);
        let of_group = c / groups;
        let count = (x.len() / groups) as f64;
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || {
                let means: Vec<f64> =
                    sums(x, &vec![0.0; wide], of_group, groups, |x, _| x).iter().map(|sum| sum / count).collect();
                let centres: Vec<f32> = (0..wide).map(|i| means[i % c / of_group] as f32).collect();
                let squares = sums(x, &centres, of_group, groups, |x, centre| (x - centre) * (x - centre));
                means.iter().zip(squares).map(|(mean, squares)| [count, *mean, squares]).collect()
            },
        )
    }

    /// What each channel's values are multiplied with, and what is added; repeated to `wide` values.
    fn affine(&self, parts: &[Vec<[f64; 3]>], wide: usize) -> (Vec<f32>, Vec<f32>) {
        let c = self.weight.len();
        let of_group = |group: usize| {
            // Distances as from the mean of all (Chan et al.).
            let all: f64 = parts.iter().map(|part| part[group][0]).sum();
            let mean = parts.iter().map(|part| part[group][0] * part[group][1]).sum::<f64>() / all;
            let square = |[count, of_part, squares]: [f64; 3]| squares + count * (of_part - mean) * (of_part - mean);
            let variance = parts.iter().map(|part| square(part[group])).sum::<f64>() / all;
            (mean as f32, 1.0 / (variance as f32 + self.eps).sqrt())
        };
        let groups: Vec<_> = (0..self.groups).map(of_group).collect();
        let channel = |i: usize| {
            let (mean, factor) = groups[i % c / (c / self.groups)];
            let scale = self.weight[i % c] * factor;
            (scale, self.bias[i % c] - mean * scale)
        };
        (0..wide).map(channel).unzip()
    }

    fn apply(&self, x: &[f32], [scale, shift]: [&[f32]; 2], y: &mut [f32]) {
        let after = self.after;
        pulp::Arch::new().dispatch(
            #[inline(always)]
            move || {
                let y = y; // moved, so that the closure is called directly and not through a shim without wide vectors
                for (x, y) in x.chunks(scale.len()).zip(y.chunks_mut(scale.len())) {
                    let affine = x.iter().zip(scale).zip(shift).map(|((x, scale), shift)| x * scale + shift);
                    match after {
                        After::Nothing => y.iter_mut().zip(affine).for_each(|(y, v)| *y = v),
                        After::Silu => y.iter_mut().zip(affine).for_each(|(y, v)| *y = silu(v)),
                    }
                }
            },
        );
    }
}

/// The sum of `f(value, its centre)` over each group, centres being those of some pixels: in f32 within short stretches, in f64 across.
#[inline(always)]
fn sums(x: &[f32], centres: &[f32], of_group: usize, groups: usize, f: impl Fn(f32, f32) -> f32) -> Vec<f64> {
    const SHORT: usize = 64;
    let (mut short, mut all) = (vec![0f32; centres.len()], vec![0f64; groups]);
    for x in x.chunks(SHORT * centres.len()) {
        short.fill(0.0);
        for x in x.chunks(centres.len()) {
            short.iter_mut().zip(x).zip(centres).for_each(|((sum, x), centre)| *sum += f(*x, *centre));
        }
        for (i, short) in short.chunks_exact(of_group).enumerate() {
            all[i % groups] += short.iter().map(|sum| f64::from(*sum)).sum::<f64>();
        }
    }
    all
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
        for (shape, groups) in
            [([2, 5, 7, 8], 4), ([1, 133, 90, 6], 2), ([3, 1, 1, 4], 1), ([1, 3, 3, 4], 4), ([2, 9, 5, 300], 3)]
        {
            let (x, weight, bias) = (random(&shape), random(&shape[3..]), random(&shape[3..]));
            for after in [After::Nothing, After::Silu] {
                let plain = composed(&x, groups, &weight, &bias, 1e-6, after).unwrap();
                let fused = group_norm(&x, groups, &weight, &bias, 1e-6, after).unwrap();
                assert!(largest(&(fused - &plain).unwrap()) < 4e-6 * largest(&plain), "{shape:?} {after:?}");

                // Of the same values: a group of four that are close together makes much of their rounding.
                let low = x.to_dtype(DType::BF16).unwrap();
                let plain = composed(&low.to_dtype(DType::F32).unwrap(), groups, &weight, &bias, 1e-6, after).unwrap();
                let half = group_norm(&low, groups, &weight, &bias, 1e-6, after).unwrap();
                assert_eq!(half.dtype(), DType::BF16);
                let apart = largest(&(half.to_dtype(DType::F32).unwrap() - &plain).unwrap());
                assert!(apart < 0.02 * largest(&plain).max(1.0), "{shape:?} {after:?} bf16 {apart}");
            }
        }
    }

    #[test]
    fn groups_must_divide_the_channels() {
        let x = Tensor::zeros((1, 2, 2, 6), DType::F32, &Device::Cpu).unwrap();
        let one = Tensor::ones(6, DType::F32, &Device::Cpu).unwrap();
        assert!(group_norm(&x, 4, &one, &one, 1e-6, After::Nothing).is_err());
    }
}
