//! Writing safetensors files tensor by tensor, so that no more than one is in memory.

use std::collections::HashMap;
use std::io::{self, Write};

use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use crate::Result;

/// A tensor to be written: its type and shape are known before its bytes are.
pub struct Entry<'a> {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Little endian, row-major.
    pub bytes: Box<dyn FnOnce() -> io::Result<Vec<u8>> + 'a>,
}

impl std::fmt::Debug for Entry<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?} {:?}", self.name, self.dtype, self.shape)
    }
}

/// Writes the entries in the order in which they come.
pub fn write(out: &mut impl Write, metadata: Option<HashMap<String, String>>, entries: Vec<Entry<'_>>) -> io::Result<()> {
    let mut end = 0;
    let mut infos = Vec::with_capacity(entries.len());
    for entry in &entries {
        let start = end;
        end += entry.shape.iter().product::<usize>() * entry.dtype.bitsize() / 8;
        infos.push((
            entry.name.clone(),
            TensorInfo { dtype: entry.dtype, shape: entry.shape.clone(), data_offsets: (start, end) },
        ));
    }
    let header = Metadata::new(metadata, infos).map_err(io::Error::other)?;
    let mut header = serde_json::to_vec(&header)?;
    // Readers that map the file want the data aligned.
    header.resize(header.len().next_multiple_of(8), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for entry in entries {
        let length = entry.shape.iter().product::<usize>() * entry.dtype.bitsize() / 8;
        let bytes = (entry.bytes)()?;
        if bytes.len() != length {
            return Err(io::Error::other(format!("{} has {} bytes, not {length}", entry.name, bytes.len())));
        }
        out.write_all(&bytes)?;
    }
    Ok(())
}

/// The type under which a tensor of `dtype` is stored, for those that weights are computed in.
#[must_use]
pub fn stored_as(dtype: DType) -> Option<Dtype> {
    Some(match dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::F64 => Dtype::F64,
        _ => return None,
    })
}

/// The inverse of [`stored_as`].
#[must_use]
pub fn computed_as(dtype: Dtype) -> Option<DType> {
    [DType::F32, DType::F16, DType::BF16, DType::F64].into_iter().find(|known| stored_as(*known) == Some(dtype))
}

/// A tensor's bytes as a file has them.
pub fn bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    fn raw<T: candle_core::WithDType, const N: usize>(x: &Tensor, f: impl Fn(T) -> [u8; N]) -> Result<Vec<u8>> {
        Ok(x.to_vec1::<T>()?.into_iter().flat_map(f).collect())
    }
    let flat = tensor.to_device(&Device::Cpu)?.flatten_all()?;
    match flat.dtype() {
        DType::F32 => raw::<f32, 4>(&flat, f32::to_le_bytes),
        DType::F64 => raw::<f64, 8>(&flat, f64::to_le_bytes),
        DType::F16 => raw::<half::f16, 2>(&flat, half::f16::to_le_bytes),
        DType::BF16 => raw::<half::bf16, 2>(&flat, half::bf16::to_le_bytes),
        other => candle_core::bail!("{other:?} is not written"),
    }
}
