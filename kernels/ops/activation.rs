//! Activation functions, each in one vectorised pass on the CPU (libm's tanh and exp took a fifth of a step).

use candle_core::{D, Result, Tensor};

use super::cpu;
use crate::launch::{Launch, Pointer, applies, in_eights, launch, output, suffix};

/// The tanh form of gelu, x of any shape -> the same shape and dtype.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    if let Some(y) = by_kernel(None, x)? {
        return Ok(y);
    }
    if x.device().is_cpu() {
        cpu::rows(
            x,
            #[inline(always)]
            |_, x, y| y.iter_mut().zip(x).for_each(|(y, x)| *y = cpu::gelu(*x)),
        )
    } else {
        x.gelu()
    }
}

/// attended `(b, l, d)`, x `(b, l, m)` -> `[attended, gelu(x)]` `(b, l, d + m)`, in x's dtype. Both may be views.
pub fn gelu_beside(attended: &Tensor, x: &Tensor) -> Result<Tensor> {
    match by_kernel(Some(attended), x)? {
        Some(y) => Ok(y),
        None => Tensor::cat(&[attended, &gelu(x)?], D::Minus1),
    }
}

/// As `GeluArguments` in cuda/activation.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Arguments {
    beside: Pointer,
    x: Pointer,
    y: Pointer,
    beside_row: u64,
    x_row: u64,
    width: u32,
    d: u32,
}

/// Threads of a block, for eight values each.
const THREADS: usize = 256;

/// `None` if the kernel does not apply.
fn by_kernel(beside: Option<&Tensor>, x: &Tensor) -> Result<Option<Tensor>> {
    let (Some((d, outer)), true) = (x.dims().split_last(), applies(x) && suffix(x.dtype()).is_some()) else { return Ok(None) };
    let fits = |x: &Tensor| in_eights(x) && one_stride(x).is_some();
    let beside_fits =
        |other: &Tensor| fits(other) && other.dtype() == x.dtype() && other.rank() == x.rank() && other.dims().starts_with(outer);
    if x.elem_count() == 0 || !fits(x) || !beside.is_none_or(beside_fits) {
        return Ok(None);
    }
    let (rows, width) = (outer.iter().product(), beside.map_or(0, |other| other.dims()[outer.len()]));
    let all = width + d;
    let mut shape = outer.to_vec();
    shape.push(all);
    let y = output(shape, x.dtype(), x.device())?;
    launch([beside.unwrap_or(x), x], [&y], |[beside_at, x_at], [y]| Launch {
        kernel: "gelu_beside",
        values: x.dtype(),
        grid: [rows, all.div_ceil(8 * THREADS), 1],
        threads: THREADS,
        shared: 0,
        arguments: Arguments {
            beside: if beside.is_some() { beside_at } else { Pointer::NULL },
            x: x_at,
            y,
            beside_row: beside.and_then(one_stride).unwrap_or(0) as u64,
            x_row: one_stride(x).unwrap_or(0) as u64,
            width: width as u32,
            d: *d as u32,
        },
    })?;
    Ok(Some(y))
}

/// From one row to the next, if that is the same over all outer dimensions.
fn one_stride(x: &Tensor) -> Option<usize> {
    let outer = x.rank() - 1;
    let mut dims = x.dims()[..outer].iter().zip(&x.stride()[..outer]).rev().filter(|(n, _)| **n > 1);
    let Some((n, row)) = dims.next() else { return Some(0) };
    let mut next = n * row;
    dims.all(|(n, stride)| std::mem::replace(&mut next, n * stride) == *stride).then_some(*row)
}

/// Softmax over the last dimension, in f32.
pub(super) fn softmax(scores: &Tensor) -> Result<Tensor> {
    if !scores.device().is_cpu() {
        return candle_nn::ops::softmax_last_dim(scores);
    }
    cpu::rows(
        scores,
        #[inline(always)]
        |_, x, y| {
            let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            y.iter_mut().zip(x).for_each(|(y, x)| *y = cpu::exp(x - largest));
            let total = cpu::sum(y, |v| v) as f32;
            y.iter_mut().for_each(|y| *y /= total);
        },
    )
}
