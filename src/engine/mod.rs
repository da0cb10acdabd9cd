//! One device, one model, one job at a time. Knows no URL, user, SQL or HTTP.

mod device;
mod encoded;
mod error;
mod job;
mod kept;
mod load;
mod measured;
mod pipeline;
mod pixels;
mod plan;
mod preview;
mod resize;
mod sizes;

pub use device::{DeviceChoice, default_dtype, device, memory};
pub use error::Error;
pub use job::{Adapter, Event, Finished, Job, LoraMode, NoiseKind, Scales, Selected, Start, Switch, Timings, Truncation};
pub use kept::Kept;
pub use load::LoadEvent;
pub use pipeline::Pipeline;
pub use plan::{CONTEXT, LIBRARIES, Need, Plan, Room};
pub use sizes::Sizes;
