//! The FLUX.1 transformer. Reference: diffusers 0.42.1 `transformer_flux.py`; names and fused weights are BFL's `model.py`.

mod blocks;
mod config;
mod embed;
mod position;
mod transformer;

pub use config::Config;
pub use position::Rope;
pub use transformer::{Conditioning, Flux, Prepared};

#[doc(hidden)]
pub use blocks::{DoubleBlock, SingleBlock};
#[doc(hidden)]
pub use embed::{Embedding, sinusoid};
