//! GGUF's blocks, widened before a product, and the product.

use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Result, Tensor};

use super::linear::{linear, linear_gelu};
use super::merge::{Addend, Place, Source, composed, merge_from, merges_while_widening};
use crate::launch::{Launch, Pointer, applies_on, launch, output, suffix};
use crate::transfer;

/// blocks `(n, d)` -> the values that they stand for and the sum of all addends, in `dtype`, rounded once. See
/// [`merges_while_widening`](super::merge::merges_while_widening) for when addends cost little.
pub fn widen_blocks(blocks: &QTensor, dtype: DType, addends: &[Addend]) -> Result<Tensor> {
    let device = blocks.device();
    let kernels = kernels(blocks, dtype, addends, &device);
    match (&device, kernels) {
        (_, None) => {
            let wide = blocks.dequantize(&device)?;
            if addends.is_empty() { wide } else { composed(&wide, addends)? }.to_dtype(dtype)
        }
        #[cfg(feature = "cuda")]
        (Device::Cuda(card), Some(kernels)) => {
            let stream = card.cuda_stream();
            let (at, _used) = blocks.device_ptr_with_guard(&stream)?;
            kernels.run(Place::At(Pointer::to(at)), dtype, blocks.shape().dims2()?, addends, &device)
        }
        (_, Some(kernels)) => kernels.run(Place::Tensor(&bytes_of(blocks)?), dtype, blocks.shape().dims2()?, addends, &device),
    }
}

/// x `(n, input)`, blocks `(output, input)` and addends -> `x Wᵀ + b` with what [`widen_blocks`] makes of them, through GELU if asked, in
/// x's dtype.
pub fn linear_blocks(
    x: &Tensor,
    blocks: &Arc<QTensor>,
    addends: &[Addend],
    bias: Option<&Tensor>,
    through_gelu: bool,
) -> Result<Tensor> {
    // candle's product of blocks, which it would widen by the processor. (For CUDA it has more kernels that come with their own library.)
    #[cfg(feature = "metal")]
    if x.device().is_metal() && addends.is_empty() {
        use candle_core::Module;

        let y = candle_core::quantized::QMatMul::from_arc(blocks.clone())?.forward(&x.to_dtype(DType::F32)?.contiguous()?)?;
        let y = if let Some(bias) = bias { y.broadcast_add(&bias.to_dtype(DType::F32)?)? } else { y };
        return if through_gelu { super::activation::gelu(&y)? } else { y }.to_dtype(x.dtype());
    }
    let weight = widen_blocks(blocks, x.dtype(), addends)?;
    if through_gelu { linear_gelu(x, &weight, bias) } else { linear(x, &weight, bias) }
}

/// Calls `work` with [`widen_blocks`] of blocks that wait in main memory, on `device`, see [`crate::visit`].
pub fn visit_blocks<R>(
    blocks: &QTensor,
    dtype: DType,
    addends: &[Addend],
    device: &Device,
    work: impl FnOnce(Tensor) -> Result<R>,
) -> Result<R> {
    let data = blocks.data()?;
    let Some(kernels) = kernels(blocks, dtype, addends, device) else {
        let there = transfer::upload_blocks(&[&data], blocks.dtype(), blocks.shape().dims(), device)?;
        return work(widen_blocks(&there, dtype, addends)?);
    };
    let shape = blocks.shape().dims2()?;
    let widened = transfer::visit_bytes(&data, DType::U8, &[data.len()], device, |bytes| {
        kernels.run(Place::Tensor(&bytes), dtype, shape, addends, device)
    })?;
    work(widened)
}

/// As `BlocksArguments` in cuda/blocks.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Arguments {
    x: Pointer,
    y: Pointer,
    n: u64,
}

const THREADS: usize = 256;

/// Values of a thread block, and bytes that they take at most.
const CHUNK: usize = 8 * THREADS;
const CHUNK_BYTES: usize = CHUNK / 32 * 34;

/// Of one format.
#[derive(Debug, Clone, Copy)]
struct Kernels {
    widen: &'static str,
    merge: &'static str,
}

fn of_format(kind: GgmlDType) -> Option<Kernels> {
    let (widen, merge) = match kind {
        GgmlDType::Q4_0 => ("widen_q4_0", "merge_q4_0"),
        GgmlDType::Q4_1 => ("widen_q4_1", "merge_q4_1"),
        GgmlDType::Q5_0 => ("widen_q5_0", "merge_q5_0"),
        GgmlDType::Q5_1 => ("widen_q5_1", "merge_q5_1"),
        GgmlDType::Q8_0 => ("widen_q8_0", "merge_q8_0"),
        GgmlDType::Q2K => ("widen_q2_k", "merge_q2_k"),
        GgmlDType::Q3K => ("widen_q3_k", "merge_q3_k"),
        GgmlDType::Q4K => ("widen_q4_k", "merge_q4_k"),
        GgmlDType::Q5K => ("widen_q5_k", "merge_q5_k"),
        GgmlDType::Q6K => ("widen_q6_k", "merge_q6_k"),
        _ => return None,
    };
    Some(Kernels { widen, merge })
}

/// Those that apply.
fn kernels(blocks: &QTensor, dtype: DType, addends: &[Addend], device: &Device) -> Option<Kernels> {
    let added = || merges_while_widening(addends, dtype, blocks.shape().dims2().unwrap_or((0, 0)), device);
    let applies = applies_on(device) && suffix(dtype).is_some() && (addends.is_empty() || added());
    of_format(blocks.dtype()).filter(|_| applies)
}

impl Kernels {
    fn run(self, blocks: Place<'_>, dtype: DType, shape: (usize, usize), addends: &[Addend], device: &Device) -> Result<Tensor> {
        if !addends.is_empty() {
            return merge_from(&Source { kernel: self.merge, weight: blocks, scale: None }, addends, dtype, shape, device);
        }
        let y = output(shape, dtype, device)?;
        let n = y.elem_count();
        let held = if let Place::Tensor(blocks) = blocks { blocks } else { &y };
        launch([held], [&y], |[x], [y]| {
            let x = if let Place::At(there) = blocks { there } else { x };
            let arguments = Arguments { x, y, n: n as u64 };
            Launch {
                kernel: self.widen,
                values: dtype,
                grid: [n.div_ceil(CHUNK), 1, 1],
                threads: THREADS,
                shared: CHUNK_BYTES,
                arguments,
            }
        })?;
        Ok(y)
    }
}

/// A copy of the blocks, where they are.
fn bytes_of(blocks: &QTensor) -> Result<Tensor> {
    let data = blocks.data()?;
    Tensor::from_raw_buffer(&data, DType::U8, &[data.len()], &blocks.device())
}
