//! How much memory a device has left.

use candle_core::Device;

/// Free bytes on a CUDA card; `None` on devices that do not say.
#[cfg(feature = "cuda")]
#[must_use]
pub fn free_memory(device: &Device) -> Option<u64> {
    let Device::Cuda(cuda) = device else { return None };
    // The query answers for the context that is current on this thread.
    cuda.cuda_stream().context().bind_to_thread().ok()?;
    candle_core::cuda_backend::cudarc::driver::result::mem_get_info().ok().map(|(free, _)| free as u64)
}

/// Free bytes on a CUDA card; `None` on devices that do not say.
#[cfg(not(feature = "cuda"))]
#[must_use]
pub fn free_memory(_device: &Device) -> Option<u64> {
    None
}
