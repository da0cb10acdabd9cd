//! Activation functions, each in one vectorised pass on the CPU (libm's tanh and exp took a fifth of a step).

use candle_core::{Result, Tensor};

use super::cpu;

/// The tanh form of gelu, x of any shape -> the same shape and dtype.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
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
