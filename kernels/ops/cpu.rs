//! What the CPU kernels share: rows in parallel, and arithmetic that the compiler can turn into vectors.

use candle_core::{DType, Device, Result, Shape, Storage, Tensor, WithDType, bail};
use rayon::prelude::*;

/// Values that one task should work on: smaller tasks cost more to hand out than to do.
const TASK: usize = 1 << 14;

/// `f(row, x's row, y's row)` for all rows of x's last dimension, in f32 -> y, in x's dtype.
///
/// Runs with the widest vectors of the processor at hand, whatever the program was built for; for that `f` must be
/// `#[inline(always)]`.
pub(super) fn rows(x: &Tensor, f: impl Fn(usize, &[f32], &mut [f32]) + Sync) -> Result<Tensor> {
    let Some(d) = x.dims().last().copied().filter(|d| *d > 0) else { return Ok(x.clone()) };
    let y = read(x, |x| {
        let mut y = vec![0f32; x.len()];
        let (at_once, f) = ((TASK / d).max(1), &f);
        let task = |(i, (x, y)): (usize, (&[f32], &mut [f32]))| {
            pulp::Arch::new().dispatch(
                #[inline(always)]
                move || {
                    let y = y; // moved, so that the closure is called directly and not through a shim without wide vectors
                    for (j, (x, y)) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)).enumerate() {
                        f(i * at_once + j, x, y);
                    }
                },
            );
        };
        x.par_chunks(at_once * d).zip(y.par_chunks_mut(at_once * d)).enumerate().for_each(task);
        y
    })?;
    from_f32(y, x.shape(), x.dtype())
}

/// Calls `f` with the values of `x` in f32, row-major. CPUs compute in f32; other dtypes are widened.
pub(super) fn read<R>(x: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    read_as(&x.to_dtype(DType::F32)?, f)
}

/// Calls `f` with the values of `x`, row-major. Errors unless `x` is of dtype `T`.
pub(super) fn read_as<T: WithDType, R>(x: &Tensor, f: impl FnOnce(&[T]) -> R) -> Result<R> {
    let x = x.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    let (Storage::Cpu(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
        bail!("a CPU kernel was given a tensor on another device");
    };
    Ok(f(&storage.as_slice::<T>()?[start..end]))
}

/// y `(n, output)` += x `(n, input)` weight `(output, input)` transposed.
#[expect(unsafe_code, reason = "gemm takes pointers")]
pub(super) fn add_product(
    x: &[f32],
    weight: &[f32],
    y: &mut [f32],
    [n, output, input]: [usize; 3],
    parallelism: gemm::Parallelism,
) {
    assert!(y.len() == n * output && x.len() == n * input && weight.len() == output * input);
    let (y_row, input_row) = (output as isize, input as isize);
    // SAFETY: all three are row-major and, as asserted, as long as their shapes say.
    unsafe {
        gemm::gemm(
            n,
            output,
            input,
            y.as_mut_ptr(),
            1,
            y_row,
            true,
            x.as_ptr(),
            1,
            input_row,
            weight.as_ptr(),
            input_row,
            1,
            1.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Rows of a matrix by their number.
pub(super) type Rows<'x> = dyn Fn(usize) -> &'x [f32] + Sync + 'x;

/// Calls `f` with the rows of `x` `(b, l, d)` f32 by their number; x may be a view whose rows lie apart.
pub(super) fn read_rows<R>(x: &Tensor, f: impl for<'x> FnOnce(&Rows<'x>) -> R) -> Result<R> {
    let (_, l, d) = x.dims3()?;
    let x = if x.stride()[2] == 1 { x.clone() } else { x.contiguous()? };
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { bail!("a CPU kernel was given a tensor on another device") };
    let values = &storage.as_slice::<f32>()?[layout.start_offset()..];
    let stride = layout.stride();
    Ok(f(&|row| &values[row / l * stride[0] + row % l * stride[1]..][..d]))
}

/// The values as a tensor of `dtype`.
pub(super) fn from_f32(values: Vec<f32>, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    Tensor::from_vec(values, shape.into(), &Device::Cpu)?.to_dtype(dtype)
}

/// Mean of `f` over x.
#[inline(always)]
pub(super) fn mean(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    (sum(x, f) / x.len() as f64) as f32
}

/// The sum of `f` over x: in f32 within short stretches and side by side so that the compiler can use vectors, in f64 across.
#[inline(always)]
pub(super) fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f64 {
    const SIDE: usize = 16;
    let stretch = |x: &[f32]| {
        let (blocks, rest) = x.as_chunks::<SIDE>();
        let mut sums = [0f32; SIDE];
        for block in blocks {
            sums.iter_mut().zip(block).for_each(|(sum, v)| *sum += f(*v));
        }
        f64::from(sums.iter().sum::<f32>()) + rest.iter().map(|v| f64::from(f(*v))).sum::<f64>()
    };
    x.chunks(4096).map(stretch).sum()
}

/// `x / (1 + e⁻ˣ)`.
#[inline(always)]
pub(super) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// eˣ to 2e-7, without branches or calls so that loops over it are vectorised (libm's takes four times as long).
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    /// Adding it leaves the nearest whole number in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts, the first with trailing zeros, so that n ln 2 is exact.
    const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN2[0] - n * LN2[1];
    // Cephes' polynomial for |r| <= ln 2 / 2.
    let p = 1.987_569_1e-4 * r + 1.398_199_9e-3;
    let p = (((p * r + 8.333_452e-3) * r + 4.166_579_6e-2) * r + 0.166_666_65) * r + 0.5;
    let p = p * r * r + r + 1.0;
    let power = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32).wrapping_add(127) << 23;
    p * f32::from_bits(power as u32)
}

/// `0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))`, written as `x / (1 + e⁻²ᵘ)`.
#[inline(always)]
pub(super) fn gelu(x: f32) -> f32 {
    /// 2 √(2/π).
    const FACTOR: f32 = 1.595_769_2;
    x / (1.0 + exp(-FACTOR * (x + 0.044_715 * x * x * x)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_short_exp_is_within_two_ulp() {
        for i in -8700..8800 {
            let x = i as f32 * 0.01 + 0.003;
            let truth = f64::from(x).exp();
            assert!((f64::from(exp(x)) - truth).abs() < 2.4e-7 * truth, "{x}");
        }
        assert_eq!(silu(-1e30), -1e30 / (1.0 + exp(88.0)));
        assert_eq!(silu(100.0), 100.0);
    }
}
