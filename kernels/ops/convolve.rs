//! Two-dimensional convolution without ever holding all columns of the input at once.
//!
//! candle unfolds the whole input on GPUs: nine times 1 GB for 256 channels of 1024 x 1024 in f32. Here strips of rows are
//! unfolded in turn. On the CPU candle unfolds element by element; here rows are copied as they lie.

use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

/// How a picture is bordered with zeros and stepped through, alike in both directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    pub stride: usize,
    /// Zeros above and to the left.
    pub before: usize,
    /// Zeros below and to the right.
    pub after: usize,
}

impl Window {
    /// A 3 x 3 kernel that keeps the size.
    pub const SAME: Self = Self { stride: 1, before: 1, after: 1 };
    /// A 3 x 3 kernel that halves an even size; zeros only below and to the right.
    pub const HALVE: Self = Self { stride: 2, before: 0, after: 1 };

    /// The size that comes out of `size` with a kernel of `side`, if any.
    fn output(self, size: usize, side: usize) -> Option<usize> {
        Some((size + self.before + self.after).checked_sub(side)? / self.stride + 1)
    }
}

/// Largest unfolded input, in bytes, that is held at once off the CPU.
const COLUMNS_BYTES: usize = 512 << 20;

/// x `(b, c, y, x)`, weight `(o, c, s, s)`, bias `(o)` -> `(b, o, y', x')` in x's dtype. Errors if the shapes do not fit.
pub fn convolve(x: &Tensor, weight: &Tensor, bias: &Tensor, window: Window) -> Result<Tensor> {
    let (o, c, side, other) = weight.dims4()?;
    let (_, channels, height, width) = x.dims4()?;
    let (Some(rows), Some(columns)) = (window.output(height, side), window.output(width, side)) else {
        bail!("a kernel of {side} does not fit into {:?}", x.shape());
    };
    if channels != c || side != other || bias.dims() != [o] {
        bail!("convolution of {:?} with weight {:?} and bias {:?}", x.shape(), weight.shape(), bias.shape());
    }
    if !x.device().is_cpu() {
        return strips(x, weight, bias, window, COLUMNS_BYTES);
    }
    let dtype = x.dtype();
    // CPUs multiply in f32.
    let wide = |x: &Tensor| x.to_dtype(DType::F32)?.contiguous();
    let op = Unfold { window, side, rows, columns };
    wide(x)?.apply_op3_no_bwd(&wide(weight)?, &wide(bias)?, &op)?.to_dtype(dtype)
}

/// By candle's convolution, so many rows at a time that the unfolded input stays under `budget` bytes.
fn strips(x: &Tensor, weight: &Tensor, bias: &Tensor, window: Window, budget: usize) -> Result<Tensor> {
    let (b, c, height, width) = x.dims4()?;
    let side = weight.dim(2)?;
    let rows = (height + window.before + window.after - side) / window.stride + 1;
    let columns = (width + window.before + window.after - side) / window.stride + 1;
    let row_bytes = b * columns * c * side * side * x.dtype().size_in_bytes();
    let at_once = (budget / row_bytes.max(1)).clamp(1, rows);
    let bias = bias.reshape((1, (), 1, 1))?;
    if at_once == rows && window.before == window.after {
        return x.conv2d(weight, window.before, window.stride, 1, 1)?.broadcast_add(&bias);
    }
    let x = x.pad_with_zeros(2, window.before, window.after)?.pad_with_zeros(3, window.before, window.after)?;
    let strip = |first: usize| {
        let n = at_once.min(rows - first);
        let x = x.narrow(2, first * window.stride, (n - 1) * window.stride + side)?.contiguous()?;
        x.conv2d(weight, 0, window.stride, 1, 1)?.broadcast_add(&bias)
    };
    let strips = (0..rows).step_by(at_once).map(strip).collect::<Result<Vec<_>>>()?;
    Tensor::cat(&strips, 2)
}

/// The CPU kernel: stretches of output pixels in parallel, each an unfolded stretch of input times the weight.
struct Unfold {
    window: Window,
    side: usize,
    /// Size of the output.
    rows: usize,
    columns: usize,
}

/// One picture `(c, y, x)`.
struct Picture<'a> {
    pixels: &'a [f32],
    height: usize,
    width: usize,
}

impl Unfold {
    /// Fills `unfolded` `(c s s, n)` with what lies under output pixels `first .. first + n` of a picture.
    fn unfold(&self, picture: &Picture, first: usize, n: usize, unfolded: &mut [f32]) {
        let (side, area) = (self.side, picture.height * picture.width);
        for (row, out) in unfolded.chunks_mut(n).enumerate() {
            let (channel, ky, kx) = (row / (side * side), row / side % side, row % side);
            let channel = &picture.pixels[channel * area..][..area];
            let mut done = 0;
            while done < n {
                let (y, x) = ((first + done) / self.columns, (first + done) % self.columns);
                let stretch = (self.columns - x).min(n - done);
                let out = &mut out[done..done + stretch];
                match (y * self.window.stride + ky).checked_sub(self.window.before).filter(|y| *y < picture.height) {
                    Some(y) => self.copy(&channel[y * picture.width..][..picture.width], x, kx, out),
                    None => out.fill(0.0),
                }
                done += stretch;
            }
        }
    }

    /// The pixels of one row of the input under output pixels `x ..` at place `kx` of the kernel; zeros beyond its ends.
    fn copy(&self, row: &[f32], x: usize, kx: usize, out: &mut [f32]) {
        let Window { stride, before, .. } = self.window;
        let at = |i: usize| ((x + i) * stride + kx).checked_sub(before);
        // The output pixels whose input lies inside the row.
        let from = before.saturating_sub(x * stride + kx).div_ceil(stride).min(out.len());
        let inside = (row.len() + before).saturating_sub(x * stride + kx).div_ceil(stride).clamp(from, out.len());
        out[..from].fill(0.0);
        out[inside..].fill(0.0);
        let Some(start) = at(from) else { return };
        let out = &mut out[from..inside];
        if stride == 1 {
            out.copy_from_slice(&row[start..start + out.len()]);
        } else {
            out.iter_mut().zip(row[start.min(row.len())..].iter().step_by(stride)).for_each(|(out, pixel)| *out = *pixel);
        }
    }
}

/// Output that tasks write to side by side.
struct Shared(*mut f32);

#[expect(unsafe_code, reason = "tasks write to disjoint columns of the output, which slices cannot express")]
// SAFETY: see `Unfold::cpu_fwd`: no two tasks touch the same element.
unsafe impl Sync for Shared {}

impl CustomOp3 for Unfold {
    fn name(&self) -> &'static str {
        "convolve"
    }

    #[expect(unsafe_code, reason = "gemm takes pointers, and writes into columns of the output")]
    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight, bias) = (plain(x, x_layout)?, plain(weight, weight_layout)?, plain(bias, bias_layout)?);
        let (b, c, height, width) = x_layout.shape().dims4()?;
        let (o, area, depth) = (bias.len(), self.rows * self.columns, c * self.side * self.side);
        let mut y = vec![0f32; b * o * area];
        y.par_chunks_mut(area.max(1)).enumerate().for_each(|(i, y)| y.fill(bias[i % o]));

        // A stretch's columns stay in the second-level cache, and are many enough to pay for packing the weight.
        let stretch = ((1 << 18) / depth).clamp(256, 4096).min(area);
        let stretches = area.div_ceil(stretch);
        let shared = Shared(y.as_mut_ptr());
        (0..b * stretches).into_par_iter().for_each_init(Vec::new, |unfolded, task| {
            let (item, first) = (task / stretches, task % stretches * stretch);
            let n = stretch.min(area - first);
            let picture = Picture { pixels: &x[item * c * height * width..][..c * height * width], height, width };
            unfolded.resize(depth * n, 0.0);
            self.unfold(&picture, first, n, unfolded);
            let shared = &shared;
            // SAFETY: the matrices lie within `weight`, `unfolded` and `y`; this task alone writes to columns
            // `first .. first + n` of picture `item`, and `y` outlives the loop.
            unsafe {
                let out = shared.0.add(item * o * area + first);
                let (lhs, rhs) = (weight.as_ptr(), unfolded.as_ptr());
                let (one_row, one_column) = (depth as isize, n as isize);
                gemm::gemm(
                    o,
                    n,
                    depth,
                    out,
                    1,
                    area as isize,
                    true,
                    lhs,
                    1,
                    one_row,
                    rhs,
                    1,
                    one_column,
                    1.0,
                    1.0,
                    false,
                    false,
                    false,
                    gemm::Parallelism::None,
                );
            }
        });
        Ok((CpuStorage::F32(y), Shape::from((b, o, self.rows, self.columns))))
    }
}

fn plain<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&values[start..end]),
        _ => bail!("convolve needs contiguous f32"),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn apart(a: &Tensor, b: &Tensor) -> f32 {
        assert_eq!(a.dims(), b.dims());
        (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    fn random(shape: &[usize]) -> Tensor {
        Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
    }

    /// candle's convolution of an explicitly bordered picture.
    fn reference(x: &Tensor, weight: &Tensor, bias: &Tensor, window: Window) -> Tensor {
        let (before, after) = (window.before, window.after);
        let x = x.pad_with_zeros(2, before, after).unwrap().pad_with_zeros(3, before, after).unwrap();
        x.conv2d(weight, 0, window.stride, 1, 1).unwrap().broadcast_add(&bias.reshape((1, (), 1, 1)).unwrap()).unwrap()
    }

    #[test]
    fn every_window_equals_candle() {
        let plain = Window { stride: 1, before: 0, after: 0 };
        let odd = Window { stride: 3, before: 2, after: 1 };
        for (shape, o, side) in
            [([2, 3, 5, 7], 4, 3), ([1, 1, 3, 3], 1, 3), ([1, 20, 64, 40], 6, 3), ([2, 5, 4, 6], 7, 1), ([1, 2, 9, 9], 3, 5)]
        {
            let (x, weight, bias) = (random(&shape), random(&[o, shape[1], side, side]), random(&[o]));
            for window in [Window::SAME, Window::HALVE, plain, odd] {
                let Some(rows) = window.output(shape[2], side) else { continue };
                let expected = reference(&x, &weight, &bias, window);
                let got = convolve(&x, &weight, &bias, window).unwrap();
                assert!(apart(&got, &expected) < 1e-4, "{shape:?} {window:?}");
                for at_once in [1, 2, rows] {
                    let budget = at_once * expected.dim(3).unwrap() * shape[0] * shape[1] * side * side * 4;
                    let got = strips(&x, &weight, &bias, window, budget).unwrap();
                    assert!(apart(&got, &expected) < 1e-4, "{shape:?} {window:?} {at_once} rows at once");
                }
            }
        }
    }

    #[test]
    fn halves_stay_halves() {
        let (x, weight, bias) = (random(&[1, 4, 8, 8]), random(&[4, 4, 3, 3]), random(&[4]));
        let half = |x: &Tensor| x.to_dtype(DType::BF16).unwrap();
        let got = convolve(&half(&x), &half(&weight), &half(&bias), Window::SAME).unwrap();
        assert_eq!(got.dtype(), DType::BF16);
        assert!(apart(&got.to_dtype(DType::F32).unwrap(), &reference(&x, &weight, &bias, Window::SAME)) < 0.2);
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        let (x, weight, bias) = (random(&[1, 4, 8, 8]), random(&[4, 3, 3, 3]), random(&[4]));
        assert!(convolve(&x, &weight, &bias, Window::SAME).is_err());
        let tiny = random(&[1, 3, 1, 1]);
        assert!(convolve(&tiny, &weight, &bias, Window { stride: 1, before: 0, after: 0 }).is_err());
    }
}
