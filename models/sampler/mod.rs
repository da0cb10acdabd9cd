//! From noise to latents: the [`Generator`] draws PyTorch's noise, the [`Schedule`] says how much of it is left at each step,
//! [`pack`] and [`unpack`] turn latents into the transformer's tokens and back.
//!
//! Everything here computes in f32 and depends on nothing but its arguments.

mod error;
mod guidance;
mod latents;
mod noise;
mod schedule;

pub use error::Error;
pub use guidance::true_cfg;
pub use latents::{pack, unpack};
pub use noise::{Generator, NoiseKind};
pub use schedule::{Schedule, add_noise, euler_step, first_step};
