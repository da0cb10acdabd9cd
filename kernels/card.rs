//! What a card is: whether our kernels run on it, and how much memory it has left.

use candle_core::Device;
#[cfg(feature = "cuda")]
use candle_core::cuda_backend::cudarc::driver;

/// Lowest compute capability that the kernels, ours and candle's, are compiled for: matrix units for bf16 came with it.
const LOWEST: (i32, i32) = (8, 0);

/// Free bytes on a CUDA card, or of what macOS recommends to use of the memory on Metal; `None` on devices that do not say.
#[must_use]
pub fn free_memory(device: &Device) -> Option<u64> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(card) => free_on_card(card),
        #[cfg(feature = "metal")]
        Device::Metal(metal) => {
            let metal = metal.metal_device();
            Some(metal.recommended_max_working_set_size().saturating_sub(metal.current_allocated_size()) as u64)
        }
        _ => None,
    }
}

#[cfg(feature = "cuda")]
fn free_on_card(card: &candle_core::CudaDevice) -> Option<u64> {
    let stream = card.cuda_stream();
    // The query answers for the context that is current on this thread.
    stream.context().bind_to_thread().ok()?;
    let kept = kept_memory(stream.context()).unwrap_or(0);
    driver::result::mem_get_info().ok().map(|(free, _)| free as u64 + kept)
}

/// Operations (multiplications and additions) on 16-bit matrices that a card of this capability makes in a cycle on each multiprocessor, as
/// NVIDIA's documents have it; half of it on GeForce where sums are f32. `None` for cards that were not known when this was written.
#[cfg_attr(not(any(feature = "cuda", test)), expect(dead_code, reason = "only cards have a capability"))]
fn operations_a_cycle(capability: (i32, i32)) -> Option<u32> {
    match capability {
        (8, 0) => Some(2048),
        (8, _) | (12, _) => Some(1024),
        (9, 0) => Some(4096),
        (10, _) => Some(8192),
        _ => None,
    }
}

/// Operations a second on 16-bit matrices that a card reaches at best, at the clock it says; `None` if it does not say.
#[cfg(feature = "cuda")]
#[must_use]
pub fn arithmetic_rate(device: &Device) -> Option<f64> {
    use driver::sys::CUdevice_attribute as Attribute;

    let Device::Cuda(cuda) = device else { return None };
    let stream = cuda.cuda_stream();
    let context = stream.context();
    let cycle = operations_a_cycle(context.compute_capability().ok()?)?;
    let units = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT).ok()?;
    let kilohertz = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE).ok()?;
    Some(f64::from(cycle) * f64::from(units) * f64::from(kilohertz) * 1e3)
}

/// Operations a second on 16-bit matrices that a card reaches at best, at the clock it says; `None` if it does not say.
#[cfg(not(feature = "cuda"))]
#[must_use]
pub fn arithmetic_rate(_device: &Device) -> Option<f64> {
    None
}

/// Lowest compute capability with units for e4m3.
#[cfg(feature = "cuda")]
const FP8: (i32, i32) = (8, 9);

/// Whether products in e4m3 are worth their rounding there: on cards with units for them. The processor computes the same the long way, for
/// trying it out.
#[must_use]
pub fn has_fp8_products(device: &Device) -> bool {
    match device {
        Device::Cpu => true,
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => cuda.cuda_stream().context().compute_capability().is_ok_and(|capability| capability >= FP8),
        _ => false,
    }
}

/// What times hold for: the card by its name, and the driver. Errors where there is no CUDA card.
pub fn machine(device: &Device) -> candle_core::Result<String> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(cuda) = device {
        use candle_core::cuda_backend::WrapErr;

        let (name, version) = (cuda.cuda_stream().context().name().w()?, driver_version().w()?);
        return Ok(format!("{name}-driver-{version}"));
    }
    candle_core::bail!("{device:?} is no CUDA card")
}

/// The newest CUDA that the driver knows: 13000 is 13.0.
#[cfg(feature = "cuda")]
fn driver_version() -> Result<i32, driver::DriverError> {
    let mut version = 0;
    // SAFETY: it writes one number.
    #[expect(unsafe_code, reason = "a call of the driver")]
    unsafe { driver::sys::cuDriverGetVersion(&raw mut version) }.result()?;
    Ok(version)
}

/// The CUDA that this program is built with: libraries of the same, and kernels that older drivers do not read.
#[cfg(feature = "cuda")]
const BUILT_WITH: i32 = driver::sys::CUDA_VERSION as i32;

/// Opens the CUDA card of this number; the error says what is missing.
#[cfg(feature = "cuda")]
pub fn open_cuda(ordinal: usize) -> Result<Device, String> {
    let knows = driver_version().map_err(|e| e.to_string())?;
    // Also within one major version: candle's kernels come as PTX, of which a driver reads none that is newer than itself.
    if knows < BUILT_WITH {
        let [knows, needs] = [knows, BUILT_WITH].map(|version| format!("{}.{}", version / 1000, version % 1000 / 10));
        return Err(format!(
            "the NVIDIA driver is for CUDA {knows}, this program for {needs}; take a newer driver (580 for CUDA 13.0)"
        ));
    }
    let context = driver::CudaContext::new(ordinal).map_err(|e| e.to_string())?;
    let name = context.name().map_err(|e| e.to_string())?;
    capable(&name, context.compute_capability().map_err(|e| e.to_string())?)?;
    // A stream of its own: the default one would be another in each thread.
    let device = Device::new_cuda_with_stream(ordinal).map_err(|e| e.to_string())?;
    if let Device::Cuda(cuda) = &device {
        // Two events for every allocation say what other streams may do with it; there is one stream, and the one of transfer.rs, which
        // sees to its order itself.
        // SAFETY: every tensor of a device is made, used and freed on its one stream.
        #[expect(unsafe_code, reason = "see above")]
        unsafe {
            cuda.disable_event_tracking();
        }
        // Some virtual ones have no pools; then nothing is kept.
        if context.has_async_alloc() {
            keep_freed_memory(&context, u64::MAX).map_err(|e| e.to_string())?;
        }
    }
    Ok(device)
}

/// Lets freed memory stay with this process only up to so many bytes of all that it has: others on the card are to have the rest.
pub fn keep_at_most(device: &Device, bytes: u64) -> candle_core::Result<()> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(card) = device {
        use candle_core::cuda_backend::WrapErr;

        let stream = card.cuda_stream();
        if stream.context().has_async_alloc() {
            keep_freed_memory(stream.context(), bytes).w()?;
        }
    }
    let _ = (device, bytes);
    Ok(())
}

/// Lets freed memory stay with this process, which otherwise gives it back whenever it waits for the card, and asks for it anew: up to
/// `most` bytes in use and freed.
#[cfg(feature = "cuda")]
fn keep_freed_memory(context: &driver::CudaContext, mut most: u64) -> Result<(), driver::DriverError> {
    let pool = pool(context)?;
    let attribute = driver::sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the attribute is a number of 64 bits.
    #[expect(unsafe_code, reason = "a call of the driver")]
    unsafe { driver::sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut most).cast()) }.result()
}

/// Waits for the device and lets what was freed on it be given out anew in other pieces: on a card memory is freed in the order of its work,
/// so that it may seem full when it is not.
pub fn gather_memory(device: &Device) -> candle_core::Result<()> {
    device.synchronize()?;
    #[cfg(feature = "cuda")]
    if let Device::Cuda(card) = device {
        use candle_core::cuda_backend::WrapErr;

        let stream = card.cuda_stream();
        let context = stream.context();
        if context.has_async_alloc() {
            let pool = pool(context).w()?;
            // SAFETY: what is in use stays.
            #[expect(unsafe_code, reason = "a call of the driver")]
            unsafe { driver::sys::cuMemPoolTrimTo(pool, 0) }.result().w()?;
        }
    }
    Ok(())
}

#[cfg(feature = "cuda")]
fn pool(context: &driver::CudaContext) -> Result<driver::sys::CUmemoryPool, driver::DriverError> {
    let mut pool = std::ptr::null_mut();
    // SAFETY: it writes one handle.
    #[expect(unsafe_code, reason = "a call of the driver")]
    unsafe { driver::sys::cuDeviceGetDefaultMemPool(&raw mut pool, context.cu_device()) }.result()?;
    Ok(pool)
}

/// Bytes that were freed and kept.
#[cfg(feature = "cuda")]
fn kept_memory(context: &driver::CudaContext) -> Result<u64, driver::DriverError> {
    use driver::sys::CUmemPool_attribute as Attribute;
    let pool = pool(context)?;
    let ask = |attribute| {
        let mut bytes = 0u64;
        // SAFETY: the attribute is a number of 64 bits.
        #[expect(unsafe_code, reason = "a call of the driver")]
        unsafe { driver::sys::cuMemPoolGetAttribute(pool, attribute, (&raw mut bytes).cast()) }.result().map(|()| bytes)
    };
    let reserved = ask(Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
    Ok(reserved.saturating_sub(ask(Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?))
}

/// Opens the CUDA card of this number; the error says what is missing.
#[cfg(not(feature = "cuda"))]
pub fn open_cuda(_ordinal: usize) -> Result<Device, String> {
    Err("this build has no CUDA; build with --features cuda".into())
}

#[cfg_attr(not(any(feature = "cuda", test)), expect(dead_code, reason = "only cards have a capability"))]
fn capable(name: &str, (major, minor): (i32, i32)) -> Result<(), String> {
    if (major, minor) >= LOWEST {
        return Ok(());
    }
    Err(format!(
        "{name} has compute capability {major}.{minor}; darkroom needs {}.{} or higher (RTX 30, A100 and newer); --device cpu works without",
        LOWEST.0, LOWEST.1
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_cards_are_refused_by_name() {
        for fine in [(8, 0), (8, 9), (9, 0), (12, 0)] {
            assert_eq!(capable("a card", fine), Ok(()));
        }
        // An H100 at 1.83 GHz: 989 TFLOP/s, as its data sheet says.
        let h100 = f64::from(operations_a_cycle((9, 0)).unwrap()) * 132. * 1.83e9;
        assert!((h100 / 989e12 - 1.).abs() < 0.01 && operations_a_cycle((7, 5)).is_none(), "{h100:e}");
        let refused = capable("Tesla T4", (7, 5)).unwrap_err();
        assert!(refused.contains("Tesla T4 has compute capability 7.5") && refused.contains("8.0"), "{refused}");
    }
}
