//! Which device runs the model.

use candle_core::{DType, Device};
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
            let found = cuda(0).or_else(|e| {
                if cfg!(feature = "cuda") {
                    tracing::warn!("no CUDA card is used: {e}");
                }
                metal()
            });
            Ok(found.unwrap_or(Device::Cpu))
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
    Device::new_metal(0).map_err(|e| Error::NoDevice { name: "metal", hint: e.to_string() })
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
    let memory = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    // Some sandboxes tell nothing; then there is no reason to be sparing.
    let host = System::new_with_specifics(memory).map_or(u64::MAX / 2, |system| system.available_memory());
    let fits = |free: u64| free >= bytes.saturating_add(SPARE_BYTES.min(bytes));
    match kernels::free_memory(device) {
        Some(free) if fits(free) => Home::Device,
        // A device that does not tell: on the CPU it is main memory itself, on Metal they are one.
        None if fits(host) => Home::Device,
        Some(_) if fits(host) => Home::Host,
        _ => Home::File,
    }
}

/// Where pristine weights of so many bytes are that have no place on the device.
pub(super) fn host_or_file(bytes: u64) -> Home {
    if host_holds(bytes) { Home::Host } else { Home::File }
}

/// Whether main memory holds `bytes` more of pristine weights.
fn host_holds(bytes: u64) -> bool {
    let memory = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    let enough = bytes.saturating_add(SPARE_BYTES.min(bytes));
    System::new_with_specifics(memory).map_or(true, |system| system.available_memory() >= enough)
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
