//! Two-dimensional convolution of pixels whose channels lie side by side.
//!
//! The kernel for cards unfolds nothing. Elsewhere a part of the input at a time is unfolded and multiplied: all of it would be nine
//! times 1 GB for 256 channels of 1024 x 1024 in f32.

use candle_core::{DType, Result, Tensor, bail};
use rayon::prelude::*;

use super::cpu;
use crate::cudnn;
use crate::launch::{Launch, Pointer, applies, in_eights, launch, output};
use crate::whose::{Whose, Work, chosen};

/// How a picture is enlarged, bordered with zeros and stepped through, alike in both directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    pub stride: usize,
    /// Zeros above and to the left.
    pub before: usize,
    /// Zeros below and to the right.
    pub after: usize,
    /// Each pixel of the input stands for so many by so many, before the border is added.
    pub enlarge: usize,
}

impl Window {
    /// A 3 x 3 kernel that keeps the size.
    pub const SAME: Self = Self { stride: 1, before: 1, after: 1, enlarge: 1 };
    /// A 3 x 3 kernel that halves an even size; zeros only below and to the right.
    pub const HALVE: Self = Self { stride: 2, before: 0, after: 1, enlarge: 1 };
    /// A 3 x 3 kernel that keeps the size of the input doubled.
    pub const DOUBLE: Self = Self { stride: 1, before: 1, after: 1, enlarge: 2 };

    /// The size that comes out of `size` with a kernel of `side`, if any.
    fn output(self, size: usize, side: usize) -> Option<usize> {
        Some((size * self.enlarge + self.before + self.after).checked_sub(side)?.checked_div(self.stride)? + 1)
    }

    /// Where the pixel under place `tap` of the kernel comes from, for pixel `at` of the output; `None` in the border.
    fn source(self, at: usize, tap: usize, size: usize) -> Option<usize> {
        let source = (at * self.stride + tap).checked_sub(self.before)? / self.enlarge;
        (source < size).then_some(source)
    }
}

/// Largest unfolded input, in bytes, that is held at once off the CPU.
const COLUMNS_BYTES: usize = 512 << 20;

/// x `(b, y, x, c)`, weight `(o, s, s, c)`, bias `(o)` -> `(b, y', x', o)` in x's dtype, added to `residual` of that shape if there is
/// one. Errors if the shapes do not fit.
pub fn convolve(x: &Tensor, weight: &Tensor, bias: &Tensor, window: Window, residual: Option<&Tensor>) -> Result<Tensor> {
    let (o, side, other, c) = weight.dims4()?;
    let (b, height, width, channels) = x.dims4()?;
    let (Some(rows), Some(columns)) = (window.output(height, side), window.output(width, side)) else {
        bail!("a kernel of {side} does not fit into {:?}", x.shape());
    };
    let fits = channels == c && side == other && bias.dims() == [o] && window.enlarge > 0;
    if !fits || residual.is_some_and(|residual| residual.dims() != [b, rows, columns, o]) {
        bail!("convolution of {:?} with weight {:?}, bias {:?} and {residual:?}", x.shape(), weight.shape(), bias.shape());
    }
    let convolution = Convolution { x, weight, bias, residual, window, shape: [b, rows, columns, o] };
    if chosen(Work::Convolution) == Some(Whose::Cudnn)
        && let Some(y) = cudnn::convolve([x, weight, bias], residual, window, convolution.shape)?
    {
        return Ok(y);
    }
    if let Some(y) = convolution.by_kernel()? {
        return Ok(y);
    }
    if x.device().is_cpu() { convolution.on_cpu() } else { convolution.in_strips(COLUMNS_BYTES) }
}

/// What [`convolve`] was given.
#[derive(Clone, Copy)]
struct Convolution<'a> {
    x: &'a Tensor,
    weight: &'a Tensor,
    bias: &'a Tensor,
    residual: Option<&'a Tensor>,
    window: Window,
    /// Of the output.
    shape: [usize; 4],
}

/// As `ConvolveArguments` in cuda/convolve.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Arguments {
    x: Pointer,
    weight: Pointer,
    bias: Pointer,
    residual: Pointer,
    y: Pointer,
    c: u32,
    o: u32,
    height: u32,
    width: u32,
    rows: u32,
    columns: u32,
    before: u32,
    doubled: u32,
}

/// Threads and output pixels of a block, channels at a time, and taps of weights, as in cuda/convolve.cu.
const THREADS: usize = 128;
const TILE: [usize; 2] = [8, 16];
const CHUNK: usize = 32;
const RING: usize = 3;

impl Convolution<'_> {
    /// By our kernel: 3 x 3, 16-bit values, strides of one and two; `None` if it does not apply.
    fn by_kernel(self) -> Result<Option<Tensor>> {
        let Self { x, weight, bias, residual, window, shape } = self;
        let [b, rows, columns, o] = shape;
        let (dtype, (_, height, width, c)) = (x.dtype(), x.dims4()?);
        let (kernel, outputs) = match window.stride {
            // Fewer channels of the output in a block where there are few.
            1 if o <= 32 => ("convolve_few", 32),
            1 => ("convolve", 128),
            2 => ("convolve_halve", 128),
            _ => return Ok(None),
        };
        let halves = matches!(dtype, DType::F16 | DType::BF16)
            && [Some(weight), Some(bias), residual].into_iter().flatten().all(|x| x.dtype() == dtype);
        if !(applies(x) && halves && weight.dim(1)? == 3 && window.enlarge <= 2 && b * o > 0) {
            return Ok(None);
        }
        // The kernel reads eight channels at a time: the few tensors that have others (pictures) get some of zeros.
        let in_eights_or_padded = |x: &Tensor| x.pad_with_zeros(3, 0, c.next_multiple_of(8) - c)?.contiguous();
        let (x, weight, bias) = (in_eights_or_padded(x)?, in_eights_or_padded(weight)?, bias.contiguous()?);
        let residual = residual.map(Tensor::contiguous).transpose()?;
        let aligned = |residual: &Tensor| !o.is_multiple_of(8) || in_eights(residual);
        if !(in_eights(&x) && in_eights(&weight) && residual.as_ref().is_none_or(aligned)) {
            return Ok(None);
        }
        let y = output(&shape, dtype, x.device())?;
        let [halo_rows, halo_columns] = TILE.map(|n| (n - 1) * window.stride + 3);
        launch([&x, &weight, &bias, residual.as_ref().unwrap_or(&x)], [&y], |[at_x, weight, bias, beside], [y]| Launch {
            kernel,
            values: dtype,
            grid: [rows.div_ceil(TILE[0]) * columns.div_ceil(TILE[1]) * o.div_ceil(outputs), 1, b],
            threads: THREADS,
            shared: (2 * halo_rows * halo_columns + RING * outputs) * CHUNK * dtype.size_in_bytes(),
            arguments: Arguments {
                x: at_x,
                weight,
                bias,
                residual: if residual.is_some() { beside } else { Pointer::NULL },
                y,
                c: c.next_multiple_of(8) as u32,
                o: o as u32,
                height: height as u32,
                width: width as u32,
                rows: rows as u32,
                columns: columns as u32,
                before: window.before as u32,
                doubled: u32::from(window.enlarge == 2),
            },
        })?;
        Ok(Some(y))
    }

    /// By candle's convolution, which wants planes and unfolds them: so many rows at a time that the unfolded input stays under `budget`
    /// bytes.
    fn in_strips(self, budget: usize) -> Result<Tensor> {
        let Self { x, weight, bias, residual, window, shape: [b, rows, columns, _] } = self;
        let Window { stride, before, after, enlarge } = window;
        let ((_, height, width, c), side) = (x.dims4()?, weight.dim(1)?);
        let weight = weight.permute((0, 3, 1, 2))?.contiguous()?;
        let row_bytes = b * columns * c * side * side * x.dtype().size_in_bytes();
        let at_once = (budget / row_bytes.max(1)).clamp(1, rows);
        let strip = |first: usize| {
            let n = at_once.min(rows - first);
            // Rows under the strip, counted from the border's first and enlarged; those that are there, and where they come from.
            let (begin, end) = (first * stride, (first + n - 1) * stride + side);
            let clip = |row: usize| row.clamp(before, before + height * enlarge) - before;
            let (inside, from) = (clip(begin)..clip(end), clip(begin) / enlarge);
            let x = x.narrow(1, from, inside.end.div_ceil(enlarge) - from)?.permute((0, 3, 1, 2))?.contiguous()?;
            let x = if enlarge > 1 { x.upsample_nearest2d(x.dim(2)? * enlarge, width * enlarge)? } else { x };
            let x = x.narrow(2, inside.start - from * enlarge, inside.len())?;
            let above = before.saturating_sub(begin).min(end - begin);
            let x = x.pad_with_zeros(2, above, end - begin - inside.len() - above)?.pad_with_zeros(3, before, after)?;
            let y = x.contiguous()?.conv2d(&weight, 0, stride, 1, 1)?.permute((0, 2, 3, 1))?.broadcast_add(bias)?;
            match residual {
                None => Ok(y),
                Some(residual) => y + residual.narrow(1, first, n)?,
            }
        };
        let strips = (0..rows).step_by(at_once).map(strip).collect::<Result<Vec<_>>>()?;
        Tensor::cat(&strips, 1)
    }

    /// In f32, which CPUs multiply in: stretches of output pixels in parallel, each an unfolded stretch of input times the weight.
    fn on_cpu(self) -> Result<Tensor> {
        let Self { x, weight, bias, residual, shape: [_, _, _, o], .. } = self;
        let mut y = match residual {
            Some(residual) => cpu::read(residual, <[f32]>::to_vec)?,
            None => crate::zeros(self.shape.iter().product()),
        };
        let depth = weight.elem_count() / o.max(1);
        // A stretch stays in the second-level cache, and is long enough to pay for packing the weight.
        let stretch = ((1 << 18) / depth.max(1)).clamp(256, 4096);
        cpu::read(x, |x| {
            cpu::read(weight, |weight| {
                cpu::read(bias, |bias| {
                    let tasks = y.par_chunks_mut((stretch * o).max(1)).enumerate();
                    tasks.for_each_init(Vec::new, |unfolded, (i, y)| {
                        y.chunks_exact_mut(o).for_each(|y| y.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias));
                        unfolded.resize(y.len() / o * depth, 0.0);
                        self.unfold(x, i * stretch, unfolded);
                        cpu::add_product(unfolded, weight, y, [y.len() / o, o, depth], gemm::Parallelism::None);
                    });
                })
            })
        })???;
        cpu::from_f32(y, &self.shape, self.x.dtype())
    }

    /// Fills `unfolded` `(n, s s c)` with what lies under output pixels `first .. first + n` of all pictures.
    fn unfold(&self, x: &[f32], first: usize, unfolded: &mut [f32]) {
        let (dims, side, window) = (self.x.dims(), self.weight.dims()[1], self.window);
        let [_, rows, columns, _] = self.shape;
        let (height, width, c) = (dims[1], dims[2], dims[3]);
        for (i, taps) in unfolded.chunks_exact_mut(side * side * c).enumerate() {
            let (row, column) = ((first + i) / columns, (first + i) % columns);
            let picture = &x[row / rows * height * width * c..];
            let begin = (column * window.stride).checked_sub(window.before).filter(|x| x + side <= width && window.enlarge == 1);
            for (tap, taps) in taps.chunks_exact_mut(side * c).enumerate() {
                let Some(y) = window.source(row % rows, tap, height) else {
                    taps.fill(0.0);
                    continue;
                };
                let row = &picture[y * width * c..][..width * c];
                if let Some(begin) = begin {
                    taps.copy_from_slice(&row[begin * c..(begin + side) * c]);
                    continue;
                }
                for (tap, pixel) in taps.chunks_exact_mut(c).enumerate() {
                    match window.source(column, tap, width) {
                        Some(x) => pixel.copy_from_slice(&row[x * c..][..c]),
                        None => pixel.fill(0.0),
                    }
                }
            }
        }
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

    /// candle's convolution of an explicitly enlarged and bordered picture.
    fn reference(x: &Tensor, weight: &Tensor, bias: &Tensor, window: Window) -> Tensor {
        let planes = |x: &Tensor| x.permute((0, 3, 1, 2)).unwrap().contiguous().unwrap();
        let (Window { stride, before, after, enlarge }, x) = (window, planes(x));
        let x = x.upsample_nearest2d(x.dim(2).unwrap() * enlarge, x.dim(3).unwrap() * enlarge).unwrap();
        let x = x.pad_with_zeros(2, before, after).unwrap().pad_with_zeros(3, before, after).unwrap();
        let y = x.conv2d(&planes(weight), 0, stride, 1, 1).unwrap().permute((0, 2, 3, 1)).unwrap();
        y.broadcast_add(bias).unwrap()
    }

    #[test]
    fn every_window_equals_candle() {
        let plain = Window { stride: 1, before: 0, after: 0, enlarge: 1 };
        let odd = Window { stride: 3, before: 2, after: 1, enlarge: 3 };
        for (shape, o, side) in
            [([2, 5, 7, 3], 4, 3), ([1, 3, 3, 1], 1, 3), ([1, 64, 40, 20], 6, 3), ([2, 4, 6, 5], 7, 1), ([1, 9, 9, 2], 3, 5)]
        {
            let (x, weight, bias) = (random(&shape), random(&[o, side, side, shape[3]]), random(&[o]));
            for window in [Window::SAME, Window::HALVE, Window::DOUBLE, plain, odd] {
                if window.before >= side {
                    continue;
                }
                let plain = reference(&x, &weight, &bias, window);
                let other = random(plain.dims());
                for residual in [None, Some(&other)] {
                    let expected = residual.map_or(plain.clone(), |residual| (&plain + residual).unwrap());
                    let got = convolve(&x, &weight, &bias, window, residual).unwrap();
                    assert!(apart(&got, &expected) < 1e-4, "{shape:?} {window:?}");
                    let shape: [usize; 4] = plain.dims().try_into().unwrap();
                    let convolution = Convolution { x: &x, weight: &weight, bias: &bias, residual, window, shape };
                    for at_once in [1, 2, shape[1]] {
                        let budget = at_once * shape[2] * x.dim(0).unwrap() * x.dim(3).unwrap() * side * side * 4;
                        let got = convolution.in_strips(budget).unwrap();
                        assert!(apart(&got, &expected) < 1e-4, "{shape:?} {window:?} {at_once} rows at once");
                    }
                }
            }
        }
    }

    #[test]
    fn halves_stay_halves() {
        let (x, weight, bias) = (random(&[1, 8, 8, 4]), random(&[4, 3, 3, 4]), random(&[4]));
        let half = |x: &Tensor| x.to_dtype(DType::BF16).unwrap();
        let got = convolve(&half(&x), &half(&weight), &half(&bias), Window::SAME, None).unwrap();
        assert_eq!(got.dtype(), DType::BF16);
        assert!(apart(&got.to_dtype(DType::F32).unwrap(), &reference(&x, &weight, &bias, Window::SAME)) < 0.2);
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        let (x, weight, bias) = (random(&[1, 8, 8, 4]), random(&[4, 3, 3, 4]), random(&[4]));
        let plain = Window { stride: 1, before: 0, after: 0, enlarge: 1 };
        let of = |x: &Tensor, weight: &Tensor, window| convolve(x, weight, &bias, window, None);
        assert!(of(&x, &weight, plain).is_ok());
        assert!(of(&x, &random(&[4, 3, 3, 3]), plain).is_err());
        assert!(of(&random(&[1, 1, 1, 4]), &weight, plain).is_err());
        assert!(of(&x, &weight, Window { stride: 0, ..plain }).is_err());
        assert!(of(&x, &weight, Window { enlarge: 0, ..Window::SAME }).is_err());
        assert!(convolve(&x, &weight, &bias, plain, Some(&x)).is_err());
    }
}
