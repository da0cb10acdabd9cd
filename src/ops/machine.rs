//! Where a model is to run, and how it is made to fit.

use ::models::weights::Keep;
use candle_core::{DType, Device};

use super::Error;
use super::generate::Precision;
use super::models::Model;
use super::proof;
use crate::engine::{self, CONTEXT, DeviceChoice, LIBRARIES, Plan, Room, Sizes};

/// What cards compute in.
const CARD: DType = DType::BF16;

/// The device, as asked for, and how much of its memory may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Machine {
    pub device: DeviceChoice,
    /// Bytes; all that are free if not given. On a CPU it stands for a card of that size, whose plan is then followed.
    pub vram_limit: Option<u64>,
}

impl From<DeviceChoice> for Machine {
    fn from(device: DeviceChoice) -> Self {
        Self { device, vram_limit: None }
    }
}

impl Machine {
    /// The device, with our kernels on if they are to be.
    pub fn open(&self) -> Result<Device, Error> {
        let device = engine::device(self.device)?;
        proof::settle(self, &device);
        Ok(device)
    }

    /// What the model's parts are kept as on `device`, and where. A precision that was asked for is kept whatever it costs; without
    /// one the best that fits is taken. Errors if nothing fits.
    pub fn plan(&self, model: &Model, device: &Device, precision: Option<Precision>) -> Result<Plan, Error> {
        let dtype = precision.and_then(Precision::dtype).unwrap_or_else(|| engine::default_dtype(device));
        let asked = precision.map(Precision::keep);
        let sizes = Sizes::of(&model.bundle, &model.shape)?;
        let changes = asked.is_some_and(|keep| keep != Keep::Stored && !(keep == Keep::Fp8Products && sizes.fp8));
        if let (Some(precision), true, true) = (precision, changes, sizes.quantised[0].is_some()) {
            let allowed = match sizes.fp8 {
                true => "f32, bf16, f16 or fp8-products, or nothing: the transformer's file is in fp8 already",
                false => "f32, bf16 or f16, or nothing: the transformer's file is quantised already",
            };
            return Err(Error::invalid("dtype", &precision.name(), allowed));
        }
        precision.map_or(Ok(()), |precision| precision.fits(device))?;
        // What the last model had is free only when the device is done with it.
        device.synchronize().map_err(engine::Error::from)?;
        let Some(room) = self.room(device) else {
            // Main memory is not planned: the system swaps and caches as it likes.
            return Ok(Plan { transformer: asked.unwrap_or_default(), ..dtype.into() });
        };
        if let Some(limit) = self.vram_limit {
            // A larger picture than was planned for takes more, which others on the card are to have again after it.
            kernels::keep_at_most(device, limit.saturating_sub(CONTEXT)).map_err(engine::Error::from)?;
        }
        // On a CPU the plan is that of the card which the limit stands for; what is computed in is the CPU's.
        let planned = if device.is_cpu() { precision.and_then(Precision::dtype).unwrap_or(CARD) } else { dtype };
        Ok(Plan { dtype, ..Plan::fitting(planned, &sizes, room, asked)? }.timed(device, &sizes.transformer))
    }

    /// What there is on the device; `None` if there is neither a card nor a limit.
    fn room(&self, device: &Device) -> Option<Room> {
        // Of what is free the driver has taken its part already.
        let free = kernels::free_memory(device).map(|free| free.saturating_sub(LIBRARIES));
        let have = free.into_iter().chain(self.vram_limit.map(|limit| limit.saturating_sub(CONTEXT))).min()?;
        Some(if device.is_metal() { Room::Shared(have) } else { Room::Card(have) })
    }

    /// What the plan is for a model of these sizes on this device; on a CPU, on the card that the limit stands for, in bf16. `None`
    /// where there is no plan.
    #[must_use]
    pub fn reckon(&self, device: &Device, sizes: &dyn Fn() -> Result<Sizes, Error>) -> Option<Result<Plan, Error>> {
        let room = self.room(device)?;
        let dtype = if device.is_cpu() { CARD } else { engine::default_dtype(device) };
        let plan = |sizes: Sizes| -> Result<Plan, Error> {
            Ok(Plan::fitting(dtype, &sizes, room, None)?.timed(device, &sizes.transformer))
        };
        Some(sizes().and_then(plan))
    }
}
