//! A LoRA merged into a weight matrix: W' = W + Σ Bᵢ Aᵢ, out of place.
//!
//! Bound by memory: on the CPU, W is read once and W' written once, a few rows at a time, with the sum of those rows kept in cache.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor, WithDType, bail};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use super::cpu;
use super::low_rank::{self, Packed};
use crate::launch::{Launch, Pointer, applies_on, in_eights, launch, output};

/// What is added to some rows of a weight.
#[derive(Debug, Clone)]
pub struct Addend {
    pub rows: Range<usize>,
    pub delta: Delta,
}

#[derive(Debug, Clone)]
pub enum Delta {
    /// up `(rows, r)`, down `(r, input)`, both f32, every scale already in `up`.
    LowRank { up: Tensor, down: Tensor },
    /// `(rows, input)` f32.
    Dense(Tensor),
}

impl Addend {
    /// The same with its tensors in `dtype`.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        let delta = match &self.delta {
            Delta::LowRank { up, down } => Delta::LowRank { up: up.to_dtype(dtype)?, down: down.to_dtype(dtype)? },
            Delta::Dense(delta) => Delta::Dense(delta.to_dtype(dtype)?),
        };
        Ok(Self { rows: self.rows.clone(), delta })
    }

    /// The sum that is added, `(rows, input)` f32.
    fn dense(&self) -> Result<Tensor> {
        match &self.delta {
            Delta::LowRank { up, down } => up.matmul(down),
            Delta::Dense(delta) => Ok(delta.clone()),
        }
    }

    fn fits(&self, output: usize, input: usize) -> bool {
        let (from, to) = (self.rows.start, self.rows.end);
        from <= to
            && to <= output
            && match &self.delta {
                Delta::Dense(delta) => delta.dims() == [to - from, input],
                Delta::LowRank { up, down } => {
                    matches!((up.dims(), down.dims()), ([rows, r], [rank, columns]) if *rows == to - from && r == rank && *columns == input)
                }
            }
    }
}

/// The same sum of fewer addends, if a kernel would not take so many: low-rank ones of the same rows are one of all their ranks.
pub fn joined(addends: Vec<Addend>) -> Result<Vec<Addend>> {
    if addends.len() <= AT_ONCE {
        return Ok(addends);
    }
    let mut joined: Vec<Addend> = Vec::new();
    let mut factors: Vec<(Range<usize>, Vec<Tensor>, Vec<Tensor>)> = Vec::new();
    for addend in addends {
        match addend.delta {
            Delta::LowRank { up, down } => match factors.iter_mut().find(|(rows, ..)| *rows == addend.rows) {
                Some((_, ups, downs)) => {
                    ups.push(up);
                    downs.push(down);
                }
                None => factors.push((addend.rows, vec![up], vec![down])),
            },
            Delta::Dense(_) => joined.push(addend),
        }
    }
    for (rows, ups, downs) in factors {
        joined.push(Addend { rows, delta: Delta::LowRank { up: Tensor::cat(&ups, 1)?, down: Tensor::cat(&downs, 0)? } });
    }
    Ok(joined)
}

fn check(addends: &[Addend], output: usize, input: usize) -> Result<()> {
    match addends.iter().find(|addend| !addend.fits(output, input)) {
        Some(addend) => bail!("rows {:?} of {:?} cannot take {:?}", addend.rows, [output, input], addend.delta),
        None => Ok(()),
    }
}

/// weight `(output, input)` -> a new tensor of the same shape and dtype: the weight and all addends, summed in f32 in the order
/// given and rounded once. Errors if an addend does not fit.
pub fn merge(weight: &Tensor, addends: &[Addend]) -> Result<Tensor> {
    let (output, input) = weight.dims2()?;
    check(addends, output, input)?;
    if let Some(merged) = by_kernel(weight, addends)? {
        return Ok(merged);
    }
    match (weight.device(), weight.dtype()) {
        (Device::Cpu, DType::F32) => in_rows::<f32>(weight, addends),
        (Device::Cpu, DType::BF16) => in_rows::<bf16>(weight, addends),
        (Device::Cpu, DType::F16) => in_rows::<f16>(weight, addends),
        _ => composed(weight, addends),
    }
}

/// As `MergeAddend` in cuda/merge.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct AddendArguments {
    /// The whole change if the rank is 0.
    up: Pointer,
    down: Pointer,
    from: u32,
    to: u32,
    rank: u32,
}

/// Addends of one launch.
const AT_ONCE: usize = 8;

/// As `MergeArguments` in cuda/merge.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Arguments {
    weight: Pointer,
    scale: Pointer,
    merged: Pointer,
    rows: u32,
    columns: u32,
    of_rows: u32,
    count: u32,
    addends: [AddendArguments; AT_ONCE],
}

/// Threads, rows and columns of a block, and how much of the rank at a time, as in cuda/merge.cu.
const THREADS: usize = 256;
const BLOCK: [usize; 2] = [128, 64];
const DEPTH: usize = 16;

/// A weight that a kernel merges into, as it is stored.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source<'a> {
    /// Of the way in which it is stored.
    pub(super) kernel: &'static str,
    pub(super) weight: Place<'a>,
    /// f32, of e4m3: for all values or for each row.
    pub(super) scale: Option<&'a Tensor>,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Place<'a> {
    Tensor(&'a Tensor),
    /// In memory that no tensor holds; the caller does.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "blocks on a card"))]
    At(Pointer),
}

/// Whether a kernel merges `addends`, of type `factors`, into a weight of this shape there, with a result in `dtype`.
fn fits(addends: &[Addend], factors: DType, dtype: DType, (rows, columns): (usize, usize), device: &Device) -> bool {
    let here = |x: &Tensor| x.dtype() == factors && x.is_contiguous() && x.device().same_device(device);
    let addend_fits = |addend: &Addend| match &addend.delta {
        Delta::LowRank { up, down } => up.dim(1).is_ok_and(|r| r > 0) && here(up) && here(down),
        Delta::Dense(delta) => here(delta) && in_eights(delta),
    };
    // For results of 32 bits the kernel's products, which keep 16 bits of the factors, are not fine enough.
    applies_on(device)
        && matches!(dtype, DType::F16 | DType::BF16)
        && rows > 0
        && columns > 0
        && columns.is_multiple_of(8)
        && addends.len() <= AT_ONCE
        && addends.iter().all(addend_fits)
}

/// Whether [`widen_blocks`](super::blocks::widen_blocks) and [`widen_fp8`](super::fp8::widen_fp8) of a weight `(output, input)` into
/// `dtype` on `device` make no pass more for these, which are of that type.
#[must_use]
pub fn merges_while_widening(addends: &[Addend], dtype: DType, shape: (usize, usize), device: &Device) -> bool {
    fits(addends, dtype, dtype, shape, device)
}

/// `None` if the kernel does not apply.
fn by_kernel(weight: &Tensor, addends: &[Addend]) -> Result<Option<Tensor>> {
    let (shape, dtype, device) = (weight.dims2()?, weight.dtype(), weight.device());
    if !(weight.is_contiguous() && in_eights(weight) && fits(addends, DType::F32, dtype, shape, device)) {
        return Ok(None);
    }
    let source = Source { kernel: "merge", weight: Place::Tensor(weight), scale: None };
    merge_from(&source, addends, dtype, shape, device).map(Some)
}

/// What is stored, and all addends, which [`fits`] has seen -> `(rows, columns)` in `dtype`.
pub(super) fn merge_from(
    source: &Source<'_>,
    addends: &[Addend],
    dtype: DType,
    (rows, columns): (usize, usize),
    device: &Device,
) -> Result<Tensor> {
    check(addends, rows, columns)?;
    let merged = output((rows, columns), dtype, device)?;
    // The places of what there is not are held by the result; nothing reads them.
    let factors = |addend: Option<&'_ Addend>| match addend.map(|addend| &addend.delta) {
        Some(Delta::LowRank { up, down }) => [up.clone(), down.clone()],
        Some(Delta::Dense(delta)) => [delta.clone(), delta.clone()],
        None => [merged.clone(), merged.clone()],
    };
    let held: [[Tensor; 2]; AT_ONCE] = std::array::from_fn(|i| factors(addends.get(i)));
    let weight = if let Place::Tensor(weight) = source.weight { weight } else { &merged };
    let inputs: [&Tensor; 2 + 2 * AT_ONCE] = std::array::from_fn(|i| match i {
        0 => weight,
        1 => source.scale.unwrap_or(&merged),
        _ => &held[(i - 2) / 2][i % 2],
    });
    launch(inputs, [&merged], |[weight, scale, factors @ ..], [merged]| {
        let place = |i: usize| {
            let [up, down] = [factors[2 * i], factors[2 * i + 1]];
            addends.get(i).map_or(AddendArguments { up, down, from: 0, to: 0, rank: 0 }, |addend| {
                let rank = if let Delta::LowRank { down, .. } = &addend.delta { down.dims()[0] } else { 0 };
                AddendArguments { up, down, from: addend.rows.start as u32, to: addend.rows.end as u32, rank: rank as u32 }
            })
        };
        Launch {
            kernel: source.kernel,
            values: dtype,
            grid: [rows.div_ceil(BLOCK[0]), columns.div_ceil(BLOCK[1]), 1],
            threads: THREADS,
            shared: (BLOCK[0] + BLOCK[1]) * (DEPTH + 4) * size_of::<f32>(),
            arguments: Arguments {
                weight: if let Place::At(there) = source.weight { there } else { weight },
                scale: if source.scale.is_some() { scale } else { Pointer::NULL },
                merged,
                rows: rows as u32,
                columns: columns as u32,
                of_rows: u32::from(source.scale.is_some_and(|scale| scale.elem_count() == rows)),
                count: addends.len() as u32,
                addends: std::array::from_fn(place),
            },
        }
    })?;
    Ok(merged)
}

/// By candle's own operations, on any device.
pub(super) fn composed(weight: &Tensor, addends: &[Addend]) -> Result<Tensor> {
    let mut sum = weight.to_dtype(DType::F32)?;
    for addend in addends {
        let addend = addend.to_dtype(DType::F32)?;
        let rows = (sum.narrow(0, addend.rows.start, addend.rows.len())? + addend.dense()?)?;
        let after = weight.dim(0)? - addend.rows.end;
        sum = match (addend.rows.start, after) {
            (0, 0) => rows,
            (0, _) => Tensor::cat(&[&rows, &sum.narrow(0, addend.rows.end, after)?], 0)?,
            (before, 0) => Tensor::cat(&[&sum.narrow(0, 0, before)?, &rows], 0)?,
            (before, _) => Tensor::cat(&[&sum.narrow(0, 0, before)?, &rows, &sum.narrow(0, addend.rows.end, after)?], 0)?,
        };
    }
    sum.to_dtype(weight.dtype())
}

/// Values of a weight that one task sums up: enough rows to use each part of the factors several times.
const TASK: usize = 1 << 19;

/// A type that weights are stored in, converted in whole rows so that the compiler can use vectors.
trait Stored: WithDType + bytemuck::Zeroable + Send + Sync {
    fn widen(from: &[Self], to: &mut [f32]);
    fn round(from: &[f32], to: &mut [Self]);
}

impl Stored for f32 {
    fn widen(from: &[Self], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
    fn round(from: &[f32], to: &mut [Self]) {
        to.copy_from_slice(from);
    }
}

impl Stored for bf16 {
    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f32]) {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = f32::from_bits(u32::from(from.to_bits()) << 16));
    }
    #[inline(always)]
    fn round(from: &[f32], to: &mut [Self]) {
        to.iter_mut().zip(from).for_each(|(to, from)| {
            // To the nearest, ties to even; a NaN must not round to infinity.
            let bits = from.to_bits();
            let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
            *to = Self::from_bits(if from.is_nan() { 0x7fc0 } else { rounded });
        });
    }
}

impl Stored for f16 {
    fn widen(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }
    fn round(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }
}

fn in_rows<T: Stored>(weight: &Tensor, addends: &[Addend]) -> Result<Tensor> {
    let (output, input) = weight.dims2()?;
    let addends = addends.iter().map(Rows::new).collect::<Result<Vec<_>>>()?;
    let at_once = (TASK / input.max(1)).max(1).next_multiple_of(low_rank::ROWS);
    let merged = cpu::read_as::<T, _>(weight, |weight| {
        let mut merged: Vec<T> = crate::zeros(output * input);
        let tasks = weight.par_chunks(at_once * input).zip(merged.par_chunks_mut(at_once * input)).enumerate();
        let scratch = || vec![0f32; low_rank::ROWS * low_rank::COLUMNS];
        tasks.for_each_init(scratch, |sum, (i, (weight, merged))| {
            for start in (0..input).step_by(low_rank::COLUMNS) {
                let columns = start..input.min(start + low_rank::COLUMNS);
                let groups = weight.chunks(low_rank::ROWS * input).zip(merged.chunks_mut(low_rank::ROWS * input));
                // A stretch of a few rows is widened, summed and rounded before it leaves the first-level cache; the factors' part for
                // these columns stays in the second.
                for (group, (weight, merged)) in groups.enumerate() {
                    let first = i * at_once + group * low_rank::ROWS;
                    let rows = first..first + weight.len() / input;
                    let sum = &mut sum[..rows.len() * columns.len()];
                    let from = weight.chunks_exact(input).map(|row| &row[columns.clone()]);
                    from.zip(sum.chunks_exact_mut(columns.len())).for_each(|(from, to)| widen(from, to));
                    addends.iter().for_each(|addend| addend.add(sum, &rows, &columns, input));
                    let to = merged.chunks_exact_mut(input).map(|row| &mut row[columns.clone()]);
                    sum.chunks_exact(columns.len()).zip(to).for_each(|(from, to)| round(from, to));
                }
            }
        });
        merged
    })?;
    Tensor::from_vec(merged, (output, input), &Device::Cpu)
}

/// With the widest vectors of the processor at hand.
fn widen<T: Stored>(from: &[T], to: &mut [f32]) {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || T::widen(from, to),
    );
}

fn round<T: Stored>(from: &[f32], to: &mut [T]) {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || T::round(from, to),
    );
}

/// An addend with its values at hand.
struct Rows {
    rows: Range<usize>,
    /// `(rows, r)` and `(r, input)`, or `(rows, input)` alone.
    up: Vec<f32>,
    down: Option<(Packed, usize)>,
}

impl Rows {
    fn new(addend: &Addend) -> Result<Self> {
        let values = |x: &Tensor| cpu::read(x, <[f32]>::to_vec);
        let (up, down) = match &addend.delta {
            Delta::LowRank { up, down } => {
                let (rank, input) = down.dims2()?;
                (values(up)?, Some((cpu::read(down, |down| Packed::new(down, rank, input))?, rank)))
            }
            Delta::Dense(delta) => (values(delta)?, None),
        };
        Ok(Self { rows: addend.rows.clone(), up, down })
    }

    /// Adds what concerns these rows and columns to `sum`, which holds them and nothing else.
    fn add(&self, sum: &mut [f32], rows: &Range<usize>, columns: &Range<usize>, input: usize) {
        let (from, to) = (self.rows.start.max(rows.start), self.rows.end.min(rows.end));
        if from >= to {
            return;
        }
        let width = columns.len();
        let sum = &mut sum[(from - rows.start) * width..(to - rows.start) * width];
        let first = from - self.rows.start;
        match &self.down {
            None => {
                let deltas = self.up[first * input..].chunks_exact(input).map(|row| &row[columns.clone()]);
                deltas.zip(sum.chunks_exact_mut(width)).for_each(|(delta, sum)| low_rank::add(delta, sum));
            }
            Some((down, rank)) => {
                down.add_product(&self.up[first * rank..(first + to - from) * rank], sum, columns.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(shape: &[usize]) -> Tensor {
        Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
    }

    fn low_rank(rows: Range<usize>, rank: usize, input: usize) -> Addend {
        let delta = Delta::LowRank { up: random(&[rows.len(), rank]), down: random(&[rank, input]) };
        Addend { rows, delta }
    }

    #[test]
    fn the_fused_merge_equals_the_composed_one() {
        // More rows than one task takes.
        for (output, input) in [(701, 512), (701, 509), (3, 7)] {
            let rows = |range: Range<usize>| range.start * output / 701..range.end * output / 701;
            let dense = Addend { rows: rows(300..420), delta: Delta::Dense(random(&[rows(300..420).len(), input])) };
            let addends = [
                low_rank(0..output, 4, input),
                low_rank(rows(233..500), 7, input),
                dense,
                low_rank(output - 1..output, 1, input),
            ];
            for (dtype, bound) in [(DType::F32, 2e-5), (DType::F16, 2e-2), (DType::BF16, 0.13)] {
                let weight = random(&[output, input]).to_dtype(dtype).unwrap();
                for addends in [&addends[..], &addends[1..2], &[]] {
                    let (fast, plain) = (merge(&weight, addends).unwrap(), composed(&weight, addends).unwrap());
                    assert_eq!(fast.dtype(), dtype);
                    let apart = (fast.to_dtype(DType::F32).unwrap() - plain.to_dtype(DType::F32).unwrap()).unwrap();
                    let apart = apart.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                    assert!(apart <= bound, "{dtype:?}: {apart}"); // one unit in the last place of values up to 20
                }
            }
        }
    }

    #[test]
    fn a_merge_is_the_same_every_time_and_leaves_the_weight() {
        let weight = random(&[900, 300]).to_dtype(DType::BF16).unwrap();
        let before = weight.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
        let addends = [low_rank(0..900, 8, 300), low_rank(10..20, 3, 300)];
        let bits = || merge(&weight, &addends).unwrap().to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
        let first = bits();
        assert!((0..5).all(|_| bits() == first));
        assert_eq!(weight.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap(), before);
        assert_ne!(first, before);
    }

    #[test]
    fn rounding_is_that_of_the_type() {
        let values: Vec<f32> =
            (0..60_000).map(|i| f32::from_bits((i as u32).wrapping_mul(71_581))).chain([f32::NAN, f32::INFINITY, -0.0]).collect();
        let mut rounded = vec![bf16::ZERO; values.len()];
        bf16::round(&values, &mut rounded);
        for (value, got) in values.iter().zip(&rounded) {
            let want = bf16::from_f32(*value);
            assert!(got.to_bits() == want.to_bits() || value.is_nan() && got.is_nan(), "{value:e}");
        }
        let mut wide = vec![0.0; rounded.len()];
        bf16::widen(&rounded, &mut wide);
        assert!(wide.iter().zip(&rounded).all(|(wide, stored)| wide.to_bits() == stored.to_f32().to_bits() || wide.is_nan()));
    }

    #[test]
    fn addends_that_do_not_fit_are_errors() {
        let weight = random(&[10, 6]);
        for addend in [low_rank(5..11, 2, 6), low_rank(0..10, 2, 7), Addend { rows: 0..3, delta: Delta::Dense(random(&[4, 6])) }]
        {
            assert!(merge(&weight, &[addend]).is_err());
        }
    }
}
