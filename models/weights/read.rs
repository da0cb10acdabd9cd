//! From stored bytes to tensors: one copy, straight into the type and place where the tensor will live.

use candle_core::quantized::QTensor;
use candle_core::{DType, Device, Result, Tensor, bail};
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;

use super::{Checkpoint, Kind, Stored};

/// Stored rows that go, one below the other, into one tensor.
#[derive(Debug, Clone)]
pub(super) struct Rows {
    pub(super) stored: Stored,
    pub(super) half: Option<usize>,
}

impl Rows {
    /// Shape of these rows.
    pub(super) fn shape(&self) -> Vec<usize> {
        let mut shape = self.stored.shape.clone();
        if let (Some(_), Some(rows)) = (self.half, shape.first_mut()) {
            *rows /= 2;
        }
        shape
    }

    pub(super) fn bytes<'a>(&self, checkpoint: &'a Checkpoint) -> &'a [u8] {
        let bytes = checkpoint.bytes(&self.stored);
        let middle = bytes.len() / 2;
        match self.half {
            None => bytes,
            Some(0) => &bytes[..middle],
            Some(_) => &bytes[middle..],
        }
    }
}

/// Rows that stay in their file.
pub(super) struct InFile {
    pub(super) checkpoint: Checkpoint,
    pub(super) rows: Rows,
}

impl AsRef<[u8]> for InFile {
    fn as_ref(&self) -> &[u8] {
        self.rows.bytes(&self.checkpoint)
    }
}

/// The type of computation that values are stored in, if it is one.
pub(super) fn computed(stored: Kind) -> Option<DType> {
    [DType::F32, DType::F16, DType::BF16].into_iter().find(|dtype| plain(*dtype) == stored)
}

impl Checkpoint {
    /// One stored tensor in `dtype` (f32, bf16 or f16), on the host.
    pub fn tensor(&self, stored: &Stored, dtype: DType) -> Result<Tensor> {
        let rows = Rows { stored: stored.clone(), half: None };
        dense(self, &[rows], &stored.shape, dtype, &Device::Cpu)
    }
}

/// The rows as one tensor of `dtype`.
pub(super) fn dense(checkpoint: &Checkpoint, rows: &[Rows], shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    // Straight from the file to a GPU; in main memory all cores copy. Cards also change the type, which takes them no time.
    let stored = rows.first().and_then(|part| computed(part.stored.kind)).filter(|_| device.is_cuda()).unwrap_or(dtype);
    if rows.iter().all(|part| part.stored.kind == plain(stored)) && !device.is_cpu() {
        return kernels::upload(&parts(checkpoint, rows), stored, shape, device)?.to_dtype(dtype);
    }
    if rows.iter().any(|part| matches!(part.stored.kind, Kind::Gguf(_))) {
        return kernels::widen_blocks(&quantised(checkpoint, rows, shape, device)?, dtype, &[]);
    }
    let host = match dtype {
        DType::F32 => Tensor::from_vec(gather::<f32>(checkpoint, rows)?, shape, &Device::Cpu),
        DType::BF16 => Tensor::from_vec(gather::<bf16>(checkpoint, rows)?, shape, &Device::Cpu),
        DType::F16 => Tensor::from_vec(gather::<f16>(checkpoint, rows)?, shape, &Device::Cpu),
        other => bail!("weights cannot be computed with in {other:?}"),
    }?;
    kernels::to_device(&host, device)
}

/// Weights stored as fp8 e4m3, kept so; on Metal, which has no such values, as their bytes.
pub(super) fn fp8(checkpoint: &Checkpoint, rows: &[Rows], shape: &[usize], device: &Device) -> Result<Tensor> {
    let kept = if device.is_metal() { DType::U8 } else { DType::F8E4M3 };
    kernels::upload(&parts(checkpoint, rows), kept, shape, device)
}

/// GGUF blocks, kept so. Rows are whole numbers of blocks, so parts are put together by their bytes.
pub(super) fn quantised(checkpoint: &Checkpoint, rows: &[Rows], shape: &[usize], device: &Device) -> Result<QTensor> {
    let Some(Kind::Gguf(kind)) = rows.first().map(|part| part.stored.kind) else { bail!("not a GGUF tensor") };
    if rows.iter().any(|part| part.stored.kind != Kind::Gguf(kind)) {
        bail!("the parts of this weight are quantised differently");
    }
    kernels::upload_blocks(&parts(checkpoint, rows), kind, shape, device)
}

fn parts<'a>(checkpoint: &'a Checkpoint, rows: &[Rows]) -> Vec<&'a [u8]> {
    rows.iter().map(|part| part.bytes(checkpoint)).collect()
}

fn plain(dtype: DType) -> Kind {
    Kind::Plain(match dtype {
        DType::BF16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        DType::F8E4M3 => Dtype::F8_E4M3,
        _ => Dtype::F32,
    })
}

/// A type that weights are computed in.
trait Element: bytemuck::Zeroable + Send + Sync + candle_core::WithDType {
    fn from_f32(value: f32) -> Self;
    fn from_f16(value: f16) -> Self {
        Self::from_f32(value.to_f32())
    }
    fn from_bf16(value: bf16) -> Self {
        Self::from_f32(value.to_f32())
    }
}

impl Element for f32 {
    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Element for bf16 {
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
    fn from_bf16(value: bf16) -> Self {
        value
    }
}

impl Element for f16 {
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
    fn from_f16(value: f16) -> Self {
        value
    }
}

/// Elements converted by one task.
const CHUNK: usize = 1 << 18;

fn gather<T: Element>(checkpoint: &Checkpoint, rows: &[Rows]) -> Result<Vec<T>> {
    let counts: Vec<usize> = rows.iter().map(|part| part.shape().iter().product()).collect();
    let mut all = kernels::zeros(counts.iter().sum());
    let mut rest = all.as_mut_slice();
    for (part, count) in rows.iter().zip(counts) {
        let (out, after) = rest.split_at_mut(count);
        rest = after;
        let Kind::Plain(dtype) = part.stored.kind else { bail!("not a plain tensor") };
        convert(dtype, part.bytes(checkpoint), out)?;
    }
    Ok(all)
}

fn convert<T: Element>(dtype: Dtype, bytes: &[u8], out: &mut [T]) -> Result<()> {
    fn each<const N: usize, T: Element>(bytes: &[u8], out: &mut [T], decode: impl Fn([u8; N]) -> T + Sync) -> Result<()> {
        if bytes.len() != out.len() * N {
            bail!("{} bytes for {} elements", bytes.len(), out.len());
        }
        out.par_chunks_mut(CHUNK).zip(bytes.par_chunks(CHUNK * N)).for_each(|(out, bytes)| {
            for (value, raw) in out.iter_mut().zip(bytes.as_chunks().0) {
                *value = decode(*raw);
            }
        });
        Ok(())
    }
    match dtype {
        Dtype::F32 => each(bytes, out, |raw| T::from_f32(f32::from_le_bytes(raw))),
        // A type to itself keeps every bit.
        Dtype::F16 => each(bytes, out, |raw| T::from_f16(f16::from_le_bytes(raw))),
        Dtype::BF16 => each(bytes, out, |raw| T::from_bf16(bf16::from_le_bytes(raw))),
        Dtype::F64 => each(bytes, out, |raw| T::from_f32(f64::from_le_bytes(raw) as f32)),
        Dtype::F8_E4M3 => {
            let table: Vec<T> = (0..=u8::MAX).map(|byte| T::from_f32(float8::F8E4M3::from_bits(byte).to_f32())).collect();
            each(bytes, out, |[byte]| table[byte as usize])
        }
        // e5m2 is the upper byte of an f16.
        Dtype::F8_E5M2 => each(bytes, out, |[byte]| T::from_f16(f16::from_le_bytes([0, byte]))),
        other => bail!("stored as {other:?}, which is not a number type of weights"),
    }
}
