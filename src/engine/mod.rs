//! One device, one model, one job at a time. Knows no URL, user, SQL or HTTP.

mod device;
mod error;
mod job;
mod pipeline;
mod pixels;

pub use device::{DeviceChoice, default_dtype, device};
pub use error::Error;
pub use job::{Event, Finished, Job, NoiseKind, Start, Timings, Truncation};
pub use pipeline::{LoadEvent, Pipeline, Traits};
