//! Norms over the last dimension with statistics in f32, and what FLUX.1 does around them.

use candle_core::{D, DType, Result, Tensor, bail};

use super::cpu;
use super::fp8::{Fp8Rows, quantise_fp8};
use crate::launch::{Launch, Pointer, applies, in_eights, launch, output, suffix, threads_of_a_row};

/// x `(.., d)` -> `(x - mean) / sqrt(variance + eps)` over d, same shape and dtype.
pub fn layer_norm(x: &Tensor, eps: f32) -> Result<Tensor> {
    if x.device().is_cpu() {
        return cpu::rows(
            x,
            #[inline(always)]
            |_, x, y| normalise(x, eps, y, |_, v| v),
        );
    }
    let dtype = x.dtype();
    // bf16 has 8 bits of mantissa: a mean over thousands of channels needs f32.
    let x = x.to_dtype(DType::F32)?;
    let x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(variance + f64::from(eps))?.sqrt()?)?.to_dtype(dtype)
}

/// x `(b, l, d)`, scale and shift `(b, 1, d)` -> `layer_norm(x) * (1 + scale) + shift`, same shape and dtype as x.
///
/// Fused on the CPU, where composed ops would read and write x three times.
pub fn modulated_norm(x: &Tensor, scale: &Tensor, shift: &Tensor, eps: f32) -> Result<Tensor> {
    let (b, l, d) = x.dims3()?;
    if [scale, shift].iter().any(|rows| rows.dims() != [b, 1, d]) {
        bail!("a norm of {:?} was given scale {:?} and shift {:?}", x.shape(), scale.shape(), shift.shape());
    }
    if let Some(pass) = Pass::of(x, None, Some([scale, shift]), eps)? {
        let y = pass.like_x()?;
        pass.run(None, Some(&y), None)?;
        return Ok(y);
    }
    if !x.device().is_cpu() {
        return layer_norm(x, eps)?.broadcast_mul(&(scale + 1.)?)?.broadcast_add(shift);
    }
    cpu::read(scale, |scale| {
        cpu::read(shift, |shift| {
            cpu::rows(
                x,
                #[inline(always)]
                |row, x, y| {
                    let (scale, shift) = (item(scale, row / l, d), item(shift, row / l, d));
                    normalise(x, eps, y, |i, v| v * (1.0 + scale[i]) + shift[i]);
                },
            )
        })?
    })?
}

/// [`quantise_fp8`] of [`modulated_norm`].
pub fn modulated_norm_fp8(x: &Tensor, scale: &Tensor, shift: &Tensor, eps: f32) -> Result<Fp8Rows> {
    let Some(pass) = Pass::of(x, None, Some([scale, shift]), eps)? else {
        return quantise_fp8(&modulated_norm(x, scale, shift, eps)?);
    };
    let rows = Fp8Rows::new(x.dims(), x.device())?;
    pass.run(None, Some(&rows.data), Some(&rows.scale))?;
    Ok(rows)
}

/// x and update `(b, l, d)`, gate `(b, 1, d)` -> `x + gate * update`, in x's dtype.
pub fn add_gated(x: &Tensor, gate: &Tensor, update: &Tensor) -> Result<Tensor> {
    let (_, l, d) = x.dims3()?;
    if let Some(pass) = Pass::of(x, Some([gate, update]), None, 0.)? {
        let sum = pass.like_x()?;
        pass.run(Some(&sum), None, None)?;
        return Ok(sum);
    }
    if !x.device().is_cpu() {
        return x + update.broadcast_mul(gate)?;
    }
    if update.dims() != x.dims() {
        candle_core::bail!("an update of {:?} for {:?}", update.shape(), x.shape());
    }
    cpu::read(gate, |gate| {
        cpu::read(update, |update| {
            cpu::rows(
                x,
                #[inline(always)]
                |row, x, y| {
                    let (gate, update) = (item(gate, row / l, d), item(update, row, d));
                    y.iter_mut().zip(x).zip(gate).zip(update).for_each(|(((y, x), gate), update)| *y = x + gate * update);
                },
            )
        })?
    })?
}

/// [`add_gated`], and the [`modulated_norm`] of its result: `(sum, norm)`, each as x.
pub fn add_gated_then_norm(
    x: &Tensor,
    [gate, update]: [&Tensor; 2],
    [scale, shift]: [&Tensor; 2],
    eps: f32,
) -> Result<(Tensor, Tensor)> {
    if let Some(pass) = Pass::of(x, Some([gate, update]), Some([scale, shift]), eps)? {
        let (sum, y) = (pass.like_x()?, pass.like_x()?);
        pass.run(Some(&sum), Some(&y), None)?;
        return Ok((sum, y));
    }
    let sum = add_gated(x, gate, update)?;
    let y = modulated_norm(&sum, scale, shift, eps)?;
    Ok((sum, y))
}

/// The same with the [`quantise_fp8`] of the norm.
pub fn add_gated_then_norm_fp8(
    x: &Tensor,
    [gate, update]: [&Tensor; 2],
    [scale, shift]: [&Tensor; 2],
    eps: f32,
) -> Result<(Tensor, Fp8Rows)> {
    let Some(pass) = Pass::of(x, Some([gate, update]), Some([scale, shift]), eps)? else {
        let (sum, y) = add_gated_then_norm(x, [gate, update], [scale, shift], eps)?;
        return Ok((sum, quantise_fp8(&y)?));
    };
    let (sum, rows) = (pass.like_x()?, Fp8Rows::new(x.dims(), x.device())?);
    pass.run(Some(&sum), Some(&rows.data), Some(&rows.scale))?;
    Ok((sum, rows))
}

/// As `NormArguments` in cuda/norm.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Arguments {
    x: Pointer,
    update: Pointer,
    gate: Pointer,
    scale: Pointer,
    shift: Pointer,
    sum: Pointer,
    y: Pointer,
    row_scale: Pointer,
    x_item: u64,
    x_token: u64,
    gate_item: u64,
    scale_item: u64,
    shift_item: u64,
    l: u32,
    d: u32,
    eps: f32,
}

/// What the kernel does in one pass over x `(b, l, d)`: an update through its gate, then the norm and its modulation, either left out if
/// not given.
struct Pass<'a> {
    x: &'a Tensor,
    added: Option<[&'a Tensor; 2]>,
    modulation: Option<[&'a Tensor; 2]>,
    eps: f32,
    threads: usize,
}

impl<'a> Pass<'a> {
    /// `None` if the kernel does not apply.
    fn of(x: &'a Tensor, added: Option<[&'a Tensor; 2]>, modulation: Option<[&'a Tensor; 2]>, eps: f32) -> Result<Option<Self>> {
        let (b, l, d) = x.dims3()?;
        let row_fits = |row: &Tensor| row.dims() == [b, 1, d] && row.dtype() == x.dtype() && in_eights(row);
        let update_fits = |u: &Tensor| u.dims() == x.dims() && u.dtype() == x.dtype() && u.is_contiguous() && in_eights(u);
        let applicable = applies(x) && suffix(x.dtype()).is_some() && in_eights(x) && b * l > 0;
        let fits = applicable
            && added.is_none_or(|[gate, update]| row_fits(gate) && update_fits(update))
            && modulation.is_none_or(|rows| rows.into_iter().all(row_fits));
        Ok(threads_of_a_row(d).filter(|_| fits).map(|threads| Self { x, added, modulation, eps, threads }))
    }

    fn like_x(&self) -> Result<Tensor> {
        output(self.x.shape(), self.x.dtype(), self.x.device())
    }

    /// Writes the sum if there is an update, the norm if there is a modulation: e4m3 if there is a `(b, l, 1)` for the scales of its rows.
    fn run(&self, sum: Option<&Tensor>, y: Option<&Tensor>, row_scale: Option<&Tensor>) -> Result<()> {
        let x = self.x;
        let (b, l, d) = x.dims3()?;
        let [gate, update] = self.added.map_or([None; 2], |both| both.map(Some));
        let [scale, shift] = self.modulation.map_or([None; 2], |both| both.map(Some));
        let Some(first) = y.or(sum) else { return Ok(()) };
        // What is not there is x or an output again, and its pointer is not passed on.
        let inputs = [Some(x), update, gate, scale, shift];
        let outputs = [sum, y, row_scale];
        let item = |row: Option<&Tensor>| row.map_or(0, |row| row.stride()[0] as u64);
        launch(inputs.map(|input| input.unwrap_or(x)), outputs.map(|output| output.unwrap_or(first)), |at, to| {
            let of = |there: Option<&Tensor>, pointer| if there.is_some() { pointer } else { Pointer::NULL };
            let arguments = Arguments {
                x: at[0],
                update: of(update, at[1]),
                gate: of(gate, at[2]),
                scale: of(scale, at[3]),
                shift: of(shift, at[4]),
                sum: of(sum, to[0]),
                y: of(y, to[1]),
                row_scale: of(row_scale, to[2]),
                x_item: x.stride()[0] as u64,
                x_token: x.stride()[1] as u64,
                gate_item: item(gate),
                scale_item: item(scale),
                shift_item: item(shift),
                l: l as u32,
                d: d as u32,
                eps: self.eps,
            };
            let threads = self.threads;
            Launch { kernel: "norm", values: x.dtype(), grid: [b * l, 1, 1], threads, shared: 128, arguments }
        })
    }
}

/// x `(.., d)`, scale `(d)` f32 -> `x / sqrt(mean(x²) + eps) * scale`, same shape and dtype as x.
pub fn rms_norm(x: &Tensor, scale: &Tensor, eps: f32) -> Result<Tensor> {
    if x.dims().last() != Some(&scale.elem_count()) {
        bail!("a norm's scale of {:?} for {:?}", scale.shape(), x.shape());
    }
    if let Some(y) = rms_by_kernel(x, scale, eps)? {
        return Ok(y);
    }
    if x.device().is_cpu() {
        return cpu::read(scale, |scale| {
            cpu::rows(
                x,
                #[inline(always)]
                |_, x, y| root_mean_square(x, scale, eps, y),
            )
        })?;
    }
    let dtype = x.dtype();
    let x = x.to_dtype(DType::F32)?;
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean + f64::from(eps))?.sqrt()?)?.broadcast_mul(scale)?.to_dtype(dtype)
}

/// As `RmsArguments` in cuda/norm.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct RmsArguments {
    x: Pointer,
    scale: Pointer,
    y: Pointer,
    row: u64,
    d: u32,
    eps: f32,
}

/// `None` if the kernel does not apply.
fn rms_by_kernel(x: &Tensor, scale: &Tensor, eps: f32) -> Result<Option<Tensor>> {
    let d = scale.dim(0)?;
    let scale_fits = scale.dtype() == DType::F32 && scale.is_contiguous() && in_eights(scale);
    let fits = in_eights(x) && x.is_contiguous() && x.elem_count() > 0 && x.dims().last() == Some(&d);
    let applicable = applies(x) && suffix(x.dtype()).is_some() && fits && scale_fits;
    let Some(threads) = threads_of_a_row(d).filter(|_| applicable) else { return Ok(None) };
    let y = output(x.shape(), x.dtype(), x.device())?;
    launch([x, scale], [&y], |[x_at, scale], [y]| Launch {
        kernel: "rms",
        values: x.dtype(),
        grid: [x.elem_count() / d, 1, 1],
        threads,
        shared: 128,
        arguments: RmsArguments { x: x_at, scale, y, row: d as u64, d: d as u32, eps },
    })?;
    Ok(Some(y))
}

/// The values of one item of width d.
#[inline(always)]
fn item(values: &[f32], index: usize, d: usize) -> &[f32] {
    &values[index * d..(index + 1) * d]
}

/// `y[i] = then(i, (x[i] - mean) / sqrt(variance + eps))`.
#[inline(always)]
fn normalise(x: &[f32], eps: f32, y: &mut [f32], then: impl Fn(usize, f32) -> f32) {
    let centre = cpu::mean(x, |v| v);
    let factor = 1.0 / (cpu::mean(x, |v| (v - centre) * (v - centre)) + eps).sqrt();
    y.iter_mut().zip(x).enumerate().for_each(|(i, (y, x))| *y = then(i, (x - centre) * factor));
}

/// `y = x / sqrt(mean(x²) + eps) * scale`.
#[inline(always)]
pub(super) fn root_mean_square(x: &[f32], scale: &[f32], eps: f32, y: &mut [f32]) {
    let factor = 1.0 / (cpu::mean(x, |v| v * v) + eps).sqrt();
    y.iter_mut().zip(x.iter().zip(scale)).for_each(|(y, (x, scale))| *y = x * factor * scale);
}
