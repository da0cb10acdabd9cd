//! From stored bytes to tensors: one copy, straight into the type and place where the tensor will live.

use candle_core::quantized::{QStorage, QTensor};
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

    fn bytes<'a>(&self, checkpoint: &'a Checkpoint) -> &'a [u8] {
        let bytes = checkpoint.bytes(&self.stored);
        let middle = bytes.len() / 2;
        match self.half {
            None => bytes,
            Some(0) => &bytes[..middle],
            Some(_) => &bytes[middle..],
        }
    }
}

/// The rows as one tensor of `dtype`.
pub(super) fn dense(checkpoint: &Checkpoint, rows: &[Rows], shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    if let [one] = rows
        && one.stored.kind == plain(dtype)
    {
        return Tensor::from_raw_buffer(one.bytes(checkpoint), dtype, shape, device);
    }
    if rows.iter().any(|part| matches!(part.stored.kind, Kind::Gguf(_))) {
        return quantised(checkpoint, rows, shape, device)?.dequantize(device)?.to_dtype(dtype);
    }
    match dtype {
        DType::F32 => Tensor::from_vec(gather::<f32>(checkpoint, rows)?, shape, device),
        DType::BF16 => Tensor::from_vec(gather::<bf16>(checkpoint, rows)?, shape, device),
        DType::F16 => Tensor::from_vec(gather::<f16>(checkpoint, rows)?, shape, device),
        other => bail!("weights cannot be computed with in {other:?}"),
    }
}

/// Weights stored as fp8 e4m3, kept so.
pub(super) fn fp8(checkpoint: &Checkpoint, rows: &[Rows], shape: &[usize], device: &Device) -> Result<Tensor> {
    let bytes: Vec<u8> = rows.iter().flat_map(|part| part.bytes(checkpoint)).copied().collect();
    Tensor::from_raw_buffer(&bytes, DType::F8E4M3, shape, device)
}

/// GGUF blocks, kept so. Rows are whole numbers of blocks, so parts are put together by their bytes.
pub(super) fn quantised(checkpoint: &Checkpoint, rows: &[Rows], shape: &[usize], device: &Device) -> Result<QTensor> {
    let Some(Kind::Gguf(kind)) = rows.first().map(|part| part.stored.kind) else { bail!("not a GGUF tensor") };
    if rows.iter().any(|part| part.stored.kind != Kind::Gguf(kind)) {
        bail!("the parts of this weight are quantised differently");
    }
    let bytes: Vec<u8> = rows.iter().flat_map(|part| part.bytes(checkpoint)).copied().collect();
    QTensor::new(QStorage::from_data(bytes.into(), device, kind)?, shape)
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
trait Element: Copy + Send + Sync + Default + candle_core::WithDType {
    fn from_f32(value: f32) -> Self;
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
}

impl Element for f16 {
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
}

/// Elements converted by one task.
const CHUNK: usize = 1 << 18;

fn gather<T: Element>(checkpoint: &Checkpoint, rows: &[Rows]) -> Result<Vec<T>> {
    let counts: Vec<usize> = rows.iter().map(|part| part.shape().iter().product()).collect();
    let mut all = vec![T::default(); counts.iter().sum()];
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
    fn each<const N: usize, T: Element>(bytes: &[u8], out: &mut [T], decode: impl Fn([u8; N]) -> f32 + Sync) {
        out.par_chunks_mut(CHUNK).zip(bytes.par_chunks(CHUNK * N)).for_each(|(out, bytes)| {
            for (value, raw) in out.iter_mut().zip(bytes.as_chunks().0) {
                *value = T::from_f32(decode(*raw));
            }
        });
    }
    match dtype {
        Dtype::F32 => each(bytes, out, f32::from_le_bytes),
        Dtype::F16 => each(bytes, out, |raw| f16::from_le_bytes(raw).to_f32()),
        Dtype::BF16 => each(bytes, out, |raw| bf16::from_le_bytes(raw).to_f32()),
        Dtype::F64 => each(bytes, out, |raw| f64::from_le_bytes(raw) as f32),
        Dtype::F8_E4M3 => {
            let table: Vec<f32> = (0..=u8::MAX).map(|byte| float8::F8E4M3::from_bits(byte).to_f32()).collect();
            each(bytes, out, |[byte]| table[byte as usize]);
        }
        Dtype::F8_E5M2 => {
            // e5m2 is the upper byte of an f16.
            each(bytes, out, |[byte]| f16::from_le_bytes([0, byte]).to_f32());
        }
        other => bail!("stored as {other:?}, which is not a number type of weights"),
    }
    Ok(())
}
