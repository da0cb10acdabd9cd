//! e4m3 with a scale for each row: widening it, making it of activations, and products of both.
//!
//! On CUDA by our kernels whether or not they are asked for: candle names its own conversions of e4m3 otherwise than it compiles them
//! (0.11.1), so they cannot be found.

use candle_core::{D, DType, Device, Result, Tensor, bail};

use super::activation::{gelu, one_stride};
use super::linear::linear;
use super::merge::{Addend, Place, Source, composed, merge_from, merges_while_widening};
use crate::launch::{Launch, Pointer, in_eights, launch, output, reachable, suffix};

/// Largest number of e4m3.
const LARGEST: f64 = 448.;

/// data `(n, d)` e4m3 (or, for devices without such values, its bytes), scale `()` or `(n, 1)` f32 -> `data * scale` and the sum of all addends, in `dtype`, rounded once. See
/// [`merges_while_widening`] for when addends cost little.
pub fn widen_fp8(data: &Tensor, scale: Option<&Tensor>, dtype: DType, addends: &[Addend]) -> Result<Tensor> {
    if let Some(y) = widen_by_kernel(data, scale, dtype, addends)? {
        return Ok(y);
    }
    if !addends.is_empty() {
        return composed(&widen_fp8(data, scale, DType::F32, &[])?, addends)?.to_dtype(dtype);
    }
    let values = |dtype| if data.dtype() == DType::U8 { of_bytes(data, dtype) } else { data.to_dtype(dtype) };
    match scale {
        None => values(dtype),
        // The product is rounded once: scales are f32.
        Some(scale) => values(DType::F32)?.broadcast_mul(scale)?.to_dtype(dtype),
    }
}

/// Looked up. (The one byte that candle's lookup takes for no index at all is a NaN, which weights do not have.)
fn of_bytes(bytes: &Tensor, dtype: DType) -> Result<Tensor> {
    let all: Vec<u8> = (0..=u8::MAX).collect();
    let table = Tensor::from_raw_buffer(&all, DType::F8E4M3, &[all.len()], &Device::Cpu)?.to_dtype(dtype)?;
    table.to_device(bytes.device())?.index_select(&bytes.flatten_all()?, 0)?.reshape(bytes.shape())
}

/// Rows of e4m3 `(.., d)` with a scale `(.., 1)` f32 for each.
#[derive(Debug, Clone)]
pub struct Fp8Rows {
    pub data: Tensor,
    pub scale: Tensor,
}

impl Fp8Rows {
    /// With nothing in them yet, for what is of this shape.
    pub(crate) fn new(shape: &[usize], device: &Device) -> Result<Self> {
        let of_rows = [&shape[..shape.len() - 1], &[1]].concat();
        Ok(Self { data: output(shape, DType::F8E4M3, device)?, scale: output(of_rows, DType::F32, device)? })
    }

    /// The values, in `dtype`.
    pub fn widen(&self, dtype: DType) -> Result<Tensor> {
        let (data, scale) = (self.data.flatten_to(D::Minus2)?, self.scale.flatten_to(D::Minus2)?);
        widen_fp8(&data, Some(&scale), dtype, &[])?.reshape(self.data.shape())
    }
}

/// x `(.., d)` -> rows of which the products with their scales are nearest to x.
pub fn quantise_fp8(x: &Tensor) -> Result<Fp8Rows> {
    if let Some(rows) = quantise_by_kernel(x)? {
        return Ok(rows);
    }
    let wide = x.to_dtype(DType::F32)?;
    // A row of zeros has any scale but 0.
    let scale = (wide.abs()?.max_keepdim(D::Minus1)? / LARGEST)?.maximum(f32::MIN_POSITIVE)?;
    let data = wide.broadcast_div(&scale)?.clamp(-LARGEST, LARGEST)?.to_dtype(DType::F8E4M3)?;
    Ok(Fp8Rows { data, scale })
}

/// x `(n, input)`, weight `(output, input)` -> `x Wᵀ + b`, through GELU if asked, in `dtype`. On cards that have them by fp8 units
/// (cuBLASLt; except on Hopper the product is rounded to bf16 before its scales), elsewhere by the same arithmetic in f32.
pub fn linear_fp8(x: &Fp8Rows, weight: &Fp8Rows, bias: Option<&Tensor>, through_gelu: bool, dtype: DType) -> Result<Tensor> {
    let ((_, input), (outputs, width)) = (x.data.dims2()?, weight.data.dims2()?);
    if width != input || weight.scale.dims() != [outputs, 1] || bias.is_some_and(|bias| bias.dims() != [outputs]) {
        let (weight, scale) = (weight.data.shape(), weight.scale.shape());
        bail!("an fp8 layer of weight {weight:?} and scale {scale:?} was given {:?}", x.data.shape());
    }
    #[cfg(feature = "cuda")]
    if let Some(y) = crate::lt::linear_fp8(x, weight, bias, through_gelu, dtype)? {
        return Ok(y);
    }
    // Sums are f32 on the units too.
    let bias = bias.map(|bias| bias.to_dtype(DType::F32)).transpose()?;
    let y = linear(&x.widen(DType::F32)?, &weight.widen(DType::F32)?, bias.as_ref())?;
    if through_gelu { gelu(&y)? } else { y }.to_dtype(dtype)
}

/// As `WidenArguments` in cuda/fp8.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Widen {
    x: Pointer,
    scale: Pointer,
    y: Pointer,
    d: u32,
    of_rows: u32,
}

/// As `QuantiseArguments` in cuda/fp8.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Quantise {
    x: Pointer,
    y: Pointer,
    scale: Pointer,
    row: u64,
    d: u32,
}

/// As `ScaleArguments` in cuda/fp8.cu.
#[cfg(any(feature = "cuda", test))]
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Scale {
    row: Pointer,
    column: Pointer,
    bias: Pointer,
    y: Pointer,
    d: u32,
    through_gelu: u32,
}

const THREADS: usize = 256;

/// y `(n, d)`, row `(n, 1)` and column `(d, 1)` f32, bias `(d)` -> y times its row's and column's scale, and the bias, through GELU if asked,
/// in the place of y.
#[cfg(any(feature = "cuda", test))]
pub(crate) fn scale_products(y: &Tensor, [row, column]: [&Tensor; 2], bias: Option<&Tensor>, through_gelu: bool) -> Result<()> {
    let (n, d) = y.dims2()?;
    let scales = [row, column].into_iter().all(|scale| scale.dtype() == DType::F32 && scale.is_contiguous());
    let bias_fits = bias.is_none_or(|bias| bias.dims() == [d] && bias.dtype() == y.dtype() && in_eights(bias));
    if !(in_eights(y) && y.is_contiguous() && scales && row.elem_count() == n && column.elem_count() == d && bias_fits) {
        bail!("products {:?} with scales {:?} and {:?}", y.shape(), row.shape(), column.shape());
    }
    launch([row, column, bias.unwrap_or(row)], [y], |[row, column, bias_at], [y_at]| Launch {
        kernel: "scale_products",
        values: y.dtype(),
        grid: [n, d.div_ceil(8 * THREADS), 1],
        threads: THREADS,
        shared: 0,
        arguments: Scale {
            row,
            column,
            bias: if bias.is_some() { bias_at } else { Pointer::NULL },
            y: y_at,
            d: d as u32,
            through_gelu: u32::from(through_gelu),
        },
    })
}

fn widen_by_kernel(data: &Tensor, scale: Option<&Tensor>, dtype: DType, addends: &[Addend]) -> Result<Option<Tensor>> {
    let (n, d) = data.dims2()?;
    let scale_fits =
        |scale: &Tensor| scale.dtype() == DType::F32 && scale.is_contiguous() && [1, n].contains(&scale.elem_count());
    let fits = data.dtype() == DType::F8E4M3 && data.is_contiguous() && d.is_multiple_of(16) && n > 0 && d > 0;
    let aligned = data.layout().start_offset().is_multiple_of(16);
    if !(reachable(data) && suffix(dtype).is_some() && fits && aligned && scale.is_none_or(scale_fits)) {
        return Ok(None);
    }
    if !addends.is_empty() {
        let source = Source { kernel: "merge_e4m3", weight: Place::Tensor(data), scale };
        let applies = merges_while_widening(addends, dtype, (n, d), data.device());
        return applies.then(|| merge_from(&source, addends, dtype, (n, d), data.device())).transpose();
    }
    let y = output((n, d), dtype, data.device())?;
    // The place of a scale that there is not is held by the data; its pointer is not passed on.
    launch([data, scale.unwrap_or(data)], [&y], |[x, scale_at], [y]| Launch {
        kernel: "widen_fp8",
        values: dtype,
        grid: [n, d.div_ceil(16 * THREADS), 1],
        threads: THREADS,
        shared: 0,
        arguments: Widen {
            x,
            scale: if scale.is_some() { scale_at } else { Pointer::NULL },
            y,
            d: d as u32,
            of_rows: u32::from(scale.is_some_and(|scale| scale.elem_count() == n)),
        },
    })?;
    Ok(Some(y))
}

fn quantise_by_kernel(x: &Tensor) -> Result<Option<Fp8Rows>> {
    let Some((&d, outer)) = x.dims().split_last() else { return Ok(None) };
    let Some(row) = one_stride(x) else { return Ok(None) };
    if !(reachable(x) && suffix(x.dtype()).is_some() && in_eights(x) && x.elem_count() > 0) {
        return Ok(None);
    }
    let n = outer.iter().product();
    let rows = Fp8Rows::new(x.dims(), x.device())?;
    launch([x], [&rows.data, &rows.scale], |[x_at], [y, scale]| Launch {
        kernel: "quantise_fp8",
        values: x.dtype(),
        grid: [n, 1, 1],
        threads: THREADS,
        shared: 128,
        arguments: Quantise { x: x_at, y, scale, row: row as u64, d: d as u32 },
    })?;
    Ok(Some(rows))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[cfg(feature = "emulator")]
    #[test]
    fn products_are_scaled_in_place() {
        let random = |shape: &[usize]| Tensor::randn(0f32, 1., shape, &Device::Cpu).unwrap();
        for (n, d) in [(1, 16), (3, 2064)] {
            let (row, column) = (random(&[n, 1]).abs().unwrap(), random(&[d, 1]).abs().unwrap());
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let (y, bias) = (random(&[n, d]).to_dtype(dtype).unwrap(), random(&[d]).to_dtype(dtype).unwrap());
                for (bias, through_gelu) in [(None, false), (Some(&bias), false), (None, true), (Some(&bias), true)] {
                    let wide = |x: &Tensor| x.to_dtype(DType::F32).unwrap();
                    let want = wide(&y).broadcast_mul(&row).unwrap().broadcast_mul(&column.t().unwrap()).unwrap();
                    let want = if let Some(bias) = bias { want.broadcast_add(&wide(bias)).unwrap() } else { want };
                    let want = if through_gelu { gelu(&want).unwrap() } else { want }.to_dtype(dtype).unwrap();
                    let got = y.copy().unwrap();
                    crate::emulated(|| scale_products(&got, [&row, &column], bias, through_gelu).unwrap());
                    // A unit in the last place: GELU's exponential is not the processor's.
                    let unit = match dtype {
                        DType::F32 => 1e-5,
                        DType::F16 => 1. / 1024.,
                        _ => 1. / 128.,
                    };
                    let values = |x: &Tensor| wide(x).flatten_all().unwrap().to_vec1::<f32>().unwrap();
                    let near = |(got, want): (&f32, &f32)| (got - want).abs() <= unit * want.abs().max(0.1);
                    assert!(values(&got).iter().zip(&values(&want)).all(near), "{n} {d} {dtype:?} {through_gelu}");
                }
            }
            assert!(scale_products(&random(&[n, d]), [&column, &row], None, false).is_err());
        }
    }

    #[test]
    fn bytes_are_what_they_stand_for() {
        let (bytes, cpu): (Vec<u8>, _) = ((0..=254).collect(), &Device::Cpu);
        let as_type = |dtype| Tensor::from_raw_buffer(&bytes, dtype, &[5, 51], cpu).unwrap();
        let scale = Tensor::rand(0.5f32, 2., (5, 1), cpu).unwrap();
        for (scale, dtype) in [(None, DType::F32), (Some(&scale), DType::F32), (Some(&scale), DType::BF16)] {
            let values = |data: DType| {
                let wide = widen_fp8(&as_type(data), scale, dtype, &[]).unwrap().to_dtype(DType::F32).unwrap();
                wide.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            assert_eq!(values(DType::U8), values(DType::F8E4M3));
        }
    }

    #[test]
    #[allow(clippy::print_stdout, reason = "the error is of interest")]
    fn a_product_of_fp8_is_near_and_its_parts_fit() {
        let x = Tensor::randn(0f32, 1., (48, 3072), &Device::Cpu).unwrap();
        let weight = (Tensor::randn(0f32, 1., (96, 3072), &Device::Cpu).unwrap() * 0.02).unwrap();
        let bias = Tensor::randn(0f32, 1., 96, &Device::Cpu).unwrap();
        let (x8, w8) = (quantise_fp8(&x).unwrap(), quantise_fp8(&weight).unwrap());
        let norm = |x: Tensor| f64::from(x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()).sqrt();
        for through_gelu in [false, true] {
            let got = linear_fp8(&x8, &w8, Some(&bias), through_gelu, DType::F32).unwrap();
            let exact = linear(&x, &weight, Some(&bias)).unwrap();
            let exact = if through_gelu { gelu(&exact).unwrap() } else { exact };
            let error = norm((got - &exact).unwrap()) / norm(exact);
            println!("GELU {through_gelu}: {error:.4}");
            assert!(error > 0.005 && error < 0.04, "{error}");
        }
        let short = Fp8Rows { scale: w8.scale.narrow(0, 0, 95).unwrap(), ..w8.clone() };
        assert!(linear_fp8(&x8, &short, None, false, DType::F32).is_err());
        let narrow = Fp8Rows { data: x8.data.narrow(1, 0, 3071).unwrap(), ..x8 };
        assert!(linear_fp8(&narrow, &w8, None, false, DType::F32).is_err());
    }
}
