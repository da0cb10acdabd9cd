//! Which device runs the model.

use candle_core::{DType, Device};

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
        DeviceChoice::Auto => Ok(cuda(0).or_else(|_| metal()).unwrap_or(Device::Cpu)),
    }
}

fn cuda(ordinal: usize) -> Result<Device, Error> {
    if !cfg!(feature = "cuda") {
        return Err(Error::NoDevice { name: "cuda", hint: "this build has no CUDA; build with --features cuda".into() });
    }
    Device::new_cuda(ordinal).map_err(|e| Error::NoDevice { name: "cuda", hint: e.to_string() })
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
