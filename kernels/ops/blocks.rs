//! GGUF's blocks, widened before a product.

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Result, Tensor};

use crate::launch::{Launch, Pointer, applies_on, launch, output, suffix};
use crate::transfer;

/// blocks `(n, d)` -> the values that they stand for, in `dtype`, rounded once.
pub fn widen_blocks(blocks: &QTensor, dtype: DType) -> Result<Tensor> {
    let device = blocks.device();
    let Some(kernel) = kernel(blocks.dtype(), dtype, &device) else {
        return blocks.dequantize(&device)?.to_dtype(dtype);
    };
    let y = output(blocks.shape(), dtype, &device)?;
    match &device {
        #[cfg(feature = "cuda")]
        Device::Cuda(card) => {
            let stream = card.cuda_stream();
            let (at, _used) = blocks.device_ptr_with_guard(&stream)?;
            launch([], [&y], |[], [to]| widening(kernel, Pointer::to(at), to, &y))?;
        }
        _ => widen_bytes(kernel, &bytes_of(blocks)?, &y)?,
    }
    Ok(y)
}

/// Calls `work` with [`widen_blocks`] of blocks that wait in main memory, on `device`, see [`crate::visit`].
pub fn visit_blocks<R>(blocks: &QTensor, dtype: DType, device: &Device, work: impl FnOnce(Tensor) -> Result<R>) -> Result<R> {
    let data = blocks.data()?;
    let Some(kernel) = kernel(blocks.dtype(), dtype, device) else {
        let there = QStorage::from_data(data, device, blocks.dtype())?;
        return work(widen_blocks(&QTensor::new(there, blocks.shape())?, dtype)?);
    };
    let widened = transfer::visit_bytes(&data, DType::U8, &[data.len()], device, |bytes| {
        let y = output(blocks.shape(), dtype, device)?;
        widen_bytes(kernel, &bytes, &y)?;
        Ok(y)
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

/// Which kernel, if there is one and it applies.
fn kernel(kind: GgmlDType, dtype: DType, device: &Device) -> Option<&'static str> {
    let name = match kind {
        GgmlDType::Q4_0 => "widen_q4_0",
        GgmlDType::Q4_1 => "widen_q4_1",
        GgmlDType::Q5_0 => "widen_q5_0",
        GgmlDType::Q5_1 => "widen_q5_1",
        GgmlDType::Q8_0 => "widen_q8_0",
        GgmlDType::Q2K => "widen_q2_k",
        GgmlDType::Q3K => "widen_q3_k",
        GgmlDType::Q4K => "widen_q4_k",
        GgmlDType::Q5K => "widen_q5_k",
        GgmlDType::Q6K => "widen_q6_k",
        _ => return None,
    };
    (applies_on(device) && suffix(dtype).is_some()).then_some(name)
}

fn widening(kernel: &'static str, x: Pointer, y_at: Pointer, y: &Tensor) -> Launch<Arguments> {
    let n = y.elem_count();
    let arguments = Arguments { x, y: y_at, n: n as u64 };
    Launch { kernel, values: y.dtype(), grid: [n.div_ceil(CHUNK), 1, 1], threads: THREADS, shared: CHUNK_BYTES, arguments }
}

fn widen_bytes(kernel: &'static str, bytes: &Tensor, y: &Tensor) -> Result<()> {
    launch([bytes], [y], |[x], [to]| widening(kernel, x, to, y))
}

/// A copy of the blocks, where they are.
fn bytes_of(blocks: &QTensor) -> Result<Tensor> {
    let data = blocks.data()?;
    Tensor::from_raw_buffer(&data, DType::U8, &[data.len()], &blocks.device())
}
