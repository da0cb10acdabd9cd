//! A prompt to pictures: a [`Request`] as sent becomes a valid [`Job`], the engine runs it, the pictures are written.

mod job;
mod memory;
mod request;
mod run;
mod settings;
mod target;

pub use job::prepare;
pub(crate) use job::{PROMPT_STRENGTH, random_seed};
pub use request::{Output, Picture, Precision, Request};
pub use run::{Cut, LoraReport, ModelReport, Order, Report, Seconds, Stage, run};
pub(crate) use run::{Setting, device_name, encode, latents, seconds};
pub(crate) use settings::noise as noise_name;
