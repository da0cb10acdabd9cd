//! Where a model is to run, and how it is made to fit.

use candle_core::Device;

use super::Error;
use super::generate::Precision;
use super::models::Model;
use crate::engine::{self, CONTEXT, DeviceChoice, Plan, Sizes};

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
    pub fn open(&self) -> Result<Device, Error> {
        Ok(engine::device(self.device)?)
    }

    /// What the model's parts are kept as on `device`, and where. A precision that was asked for is kept whatever it costs; without
    /// one the best that fits is taken. Errors if nothing fits.
    pub fn plan(&self, model: &Model, device: &Device, precision: Option<Precision>) -> Result<Plan, Error> {
        let dtype = precision.and_then(Precision::dtype).unwrap_or_else(|| engine::default_dtype(device));
        let asked = precision.map(Precision::keep);
        let have = match (kernels::free_memory(device), self.vram_limit) {
            (Some(free), limit) => free.min(limit.unwrap_or(u64::MAX)).saturating_sub(CONTEXT),
            (None, Some(limit)) => limit,
            // Main memory is not planned: the system swaps and caches as it likes.
            (None, None) => return Ok(Plan { transformer: asked.unwrap_or_default(), ..dtype.into() }),
        };
        Ok(Plan::fitting(dtype, &Sizes::of(&model.bundle, &model.shape)?, have, asked)?)
    }
}
