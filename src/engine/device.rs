//! Which device runs the model.

use candle_core::{DType, Device, Tensor};
use models::nn::Home;
use sysinfo::{MemoryRefreshKind, RefreshKind, System};

use super::Error;

/// Where to run, as asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// CUDA if there is a usable card, else Metal, else the CPU.
    #[default]
    Auto,
    Cpu,
    /// The card of this number, from 0.
    Cuda(usize),
    Metal,
}

/// Opens the device.
pub fn device(choice: DeviceChoice) -> Result<Device, Error> {
    match choice {
        DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Cuda(ordinal) => cuda(ordinal),
        DeviceChoice::Metal => metal(),
        DeviceChoice::Auto => {
            let built = [cfg!(feature = "cuda").then(|| cuda(0)), cfg!(feature = "metal").then(metal)];
            let mut found = built
                .into_iter()
                .flatten()
                .filter_map(|opened| opened.inspect_err(|error| tracing::warn!("the processor is used: {error}")).ok());
            Ok(found.next().unwrap_or(Device::Cpu))
        }
    }
}

fn cuda(ordinal: usize) -> Result<Device, Error> {
    kernels::open_cuda(ordinal).map_err(|hint| Error::NoDevice { name: "cuda", hint })
}

fn metal() -> Result<Device, Error> {
    if !cfg!(feature = "metal") {
        return Err(Error::NoDevice { name: "metal", hint: "this build has no Metal; build with --features metal".into() });
    }
    let refused = |hint: String| Error::NoDevice { name: "metal", hint };
    // candle panics where macOS lacks what it asks for or shows no GPU.
    let opened = std::panic::catch_unwind(|| Device::new_metal(0));
    let device = opened.map_err(|_| refused("candle needs macOS 15 or newer, and a GPU that the system shows".into()))?;
    let device = device.map_err(|e| refused(e.to_string()))?;
    let narrow = |shape: (usize, usize)| Tensor::ones(shape, DType::F32, &device)?.to_dtype(DType::BF16);
    let tried = narrow((1, 32)).and_then(|x| x.matmul(&narrow((32, 8))?)?.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>());
    match tried {
        Ok(256.) => Ok(device),
        Ok(other) => Err(refused(format!("a product in bf16 that is 256 came out as {other}"))),
        Err(e) => {
            Err(refused(format!("its kernels for bf16 are missing ({e}); build with MACOSX_DEPLOYMENT_TARGET=15.0 or newer")))
        }
    }
}

/// What FLUX.1 was trained in on GPUs; f32 on the CPU, which has no fast 16-bit arithmetic.
#[must_use]
pub fn default_dtype(device: &Device) -> DType {
    if device.is_cpu() { DType::F32 } else { DType::BF16 }
}

/// Memory that must stay free for pictures, in bytes, when weights are kept twice.
const SPARE_BYTES: u64 = 4 << 30;

/// Where the pristine weights stay while LoRAs are on them, for a model of `bytes` on this device: beside them if they fit there
/// twice (so that taking a LoRA off costs nothing), else in main memory, else in their file.
#[must_use]
pub(super) fn home(device: &Device, bytes: u64) -> Home {
    match kernels::free_memory(device) {
        Some(free) if holds(free, bytes) => Home::Device,
        // On the CPU it is main memory itself.
        None if host_holds(bytes) => Home::Device,
        Some(_) => host_or_file(bytes),
        None => Home::File,
    }
}

/// Where pristine weights of so many bytes are that have no place on the device.
pub(super) fn host_or_file(bytes: u64) -> Home {
    if host_holds(bytes) { Home::Host } else { Home::File }
}

/// Whether main memory holds `bytes` more of pristine weights. Where the system does not tell there is no reason to be sparing.
fn host_holds(bytes: u64) -> bool {
    memory().map_or(bytes < u64::MAX / 2, |(free, _)| holds(free, bytes))
}

fn holds(free: u64, bytes: u64) -> bool {
    free >= bytes.saturating_add(SPARE_BYTES.min(bytes))
}

/// Free and all main memory in bytes; some sandboxes tell nothing.
#[must_use]
pub fn memory() -> Option<(u64, u64)> {
    let kinds = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    let told = System::new_with_specifics(kinds).ok().map(|system| (system.available_memory(), system.total_memory()));
    told.filter(|(_, all)| *all > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_models_are_kept_twice_and_absurd_ones_in_their_file() {
        assert_eq!(home(&Device::Cpu, 12 << 20), Home::Device);
        assert_eq!(home(&Device::Cpu, u64::MAX), Home::File);
    }
}
