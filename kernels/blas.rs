//! The one product that candle has no operation for: 16-bit values in, f32 out.

use std::ffi::c_void;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::{DType, Device, Result, Tensor};

use crate::launch::{output, with_addresses};

/// q `(b, h, l, e)` and k `(b, h, l_kv, e)`, both f16 or bf16, -> `scale q kᵀ`, `(b, h, l, l_kv)` in f32. `None` for other values and
/// other devices.
pub(crate) fn scores(q: &Tensor, k: &Tensor, scale: f64) -> Result<Option<Tensor>> {
    let Device::Cuda(device) = q.device() else { return Ok(None) };
    let kind = match q.dtype() {
        DType::F16 => sys::cudaDataType::CUDA_R_16F,
        DType::BF16 => sys::cudaDataType::CUDA_R_16BF,
        _ => return Ok(None),
    };
    let ((b, h, l, e), (_, _, l_kv, _)) = (q.dims4()?, k.dims4()?);
    if k.dims() != [b, h, l_kv, e] || k.dtype() != q.dtype() || b * h * l * l_kv * e == 0 {
        return Ok(None);
    }
    let (q, k) = (q.contiguous()?, k.contiguous()?);
    let y = output((b, h, l, l_kv), DType::F32, q.device())?;
    let (alpha, beta) = (scale as f32, 0f32);
    // The library counts by columns, where rows of ours are columns: yᵀ = K qᵀ.
    // SAFETY: sizes are those of the tensors, which are in one piece and held until the product is in the stream.
    #[expect(unsafe_code, reason = "a call of the library")]
    let product = |at: &[u64]| unsafe {
        result::gemm_strided_batched_ex(
            *device.cublas_handle().handle(),
            sys::cublasOperation_t::CUBLAS_OP_T,
            sys::cublasOperation_t::CUBLAS_OP_N,
            l_kv as i32,
            l as i32,
            e as i32,
            (&raw const alpha).cast(),
            at[0] as *const c_void,
            kind,
            e as i32,
            (l_kv * e) as i64,
            at[1] as *const c_void,
            kind,
            e as i32,
            (l * e) as i64,
            (&raw const beta).cast(),
            at[2] as *mut c_void,
            sys::cudaDataType::CUDA_R_32F,
            l_kv as i32,
            (l * l_kv) as i64,
            (b * h) as i32,
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
        )
        .w()
    };
    with_addresses(device, &[Some(&k), Some(&q), Some(&y)], product)?;
    Ok(Some(y))
}
