//! Activation functions, each in one vectorised pass on the CPU (libm's tanh and exp took a fifth of a step).

use candle_core::{D, DType, Result, Tensor};

use super::cpu;
use super::fp8::{Fp8Rows, quantise_fp8};
use crate::launch::{Launch, Pointer, applies, in_eights, launch, output, suffix, threads_of_a_row};

/// The tanh form of gelu, x of any shape -> the same shape and dtype.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    if let Some(sides) = Sides::of(None, x) {
        return sides.values();
    }
    if x.device().is_cpu() {
        cpu::rows(
            x,
            #[inline(always)]
            |_, x, y| y.iter_mut().zip(x).for_each(|(y, x)| *y = cpu::gelu(*x)),
        )
    } else if x.device().is_metal() {
        // candle's kernel rounds between its steps there.
        x.to_dtype(DType::F32)?.gelu()?.to_dtype(x.dtype())
    } else {
        x.gelu()
    }
}

/// attended `(b, l, d)`, x `(b, l, m)` -> `[attended, gelu(x)]` `(b, l, d + m)`, in x's dtype. Both may be views.
pub fn gelu_beside(attended: &Tensor, x: &Tensor) -> Result<Tensor> {
    match Sides::of(Some(attended), x) {
        Some(sides) => sides.values(),
        None => Tensor::cat(&[attended, &gelu(x)?], D::Minus1),
    }
}

/// [`quantise_fp8`] of [`gelu_beside`].
pub fn gelu_beside_fp8(attended: &Tensor, x: &Tensor) -> Result<Fp8Rows> {
    let sides = Sides::of(Some(attended), x).and_then(|sides| threads_of_a_row(sides.width()).map(|threads| (sides, threads)));
    match sides {
        Some((sides, threads)) => sides.fp8(threads),
        None => quantise_fp8(&gelu_beside(attended, x)?),
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

/// As `GeluRowsArguments` there.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct RowsArguments {
    to: Arguments,
    scale: Pointer,
}

/// Threads of a block, for eight values each.
const THREADS: usize = 256;

/// What the kernels are given: x `(.., d)`, and what its GELU comes beside.
struct Sides<'a> {
    beside: Option<&'a Tensor>,
    x: &'a Tensor,
    /// Of both together.
    shape: Vec<usize>,
    d: usize,
}

impl<'a> Sides<'a> {
    /// `None` if the kernels do not apply.
    fn of(beside: Option<&'a Tensor>, x: &'a Tensor) -> Option<Self> {
        let (d, outer) = x.dims().split_last()?;
        let fits = |x: &Tensor| in_eights(x) && one_stride(x).is_some();
        let beside_fits = |other: &Tensor| {
            fits(other) && other.dtype() == x.dtype() && other.rank() == x.rank() && other.dims().starts_with(outer)
        };
        let applicable = applies(x) && suffix(x.dtype()).is_some() && x.elem_count() > 0;
        if !(applicable && fits(x) && beside.is_none_or(beside_fits)) {
            return None;
        }
        let mut shape = outer.to_vec();
        shape.push(beside.map_or(0, |other| other.dims()[outer.len()]) + d);
        Some(Self { beside, x, shape, d: *d })
    }

    fn width(&self) -> usize {
        self.shape[self.shape.len() - 1]
    }

    fn rows(&self) -> usize {
        self.shape[..self.shape.len() - 1].iter().product()
    }

    fn inputs(&self) -> [&'a Tensor; 2] {
        [self.beside.unwrap_or(self.x), self.x]
    }

    fn arguments(&self, [beside, x]: [Pointer; 2], y: Pointer) -> Arguments {
        Arguments {
            beside: if self.beside.is_some() { beside } else { Pointer::NULL },
            x,
            y,
            beside_row: self.beside.and_then(one_stride).unwrap_or(0) as u64,
            x_row: one_stride(self.x).unwrap_or(0) as u64,
            width: (self.width() - self.d) as u32,
            d: self.d as u32,
        }
    }

    fn values(&self) -> Result<Tensor> {
        let y = output(self.shape.as_slice(), self.x.dtype(), self.x.device())?;
        launch(self.inputs(), [&y], |inputs, [y]| Launch {
            kernel: "gelu_beside",
            values: self.x.dtype(),
            grid: [self.rows(), self.width().div_ceil(8 * THREADS), 1],
            threads: THREADS,
            shared: 0,
            arguments: self.arguments(inputs, y),
        })?;
        Ok(y)
    }

    /// With a block of so many threads for each row.
    fn fp8(&self, threads: usize) -> Result<Fp8Rows> {
        let made = Fp8Rows::new(&self.shape, self.x.device())?;
        launch(self.inputs(), [&made.data, &made.scale], |inputs, [y, scale]| Launch {
            kernel: "gelu_beside_fp8",
            values: self.x.dtype(),
            grid: [self.rows(), 1, 1],
            threads,
            shared: 128,
            arguments: RowsArguments { to: self.arguments(inputs, y), scale },
        })?;
        Ok(made)
    }
}

/// From one row to the next, if that is the same over all outer dimensions.
pub(super) fn one_stride(x: &Tensor) -> Option<usize> {
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
