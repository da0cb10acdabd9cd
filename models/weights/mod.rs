//! Weights as people have them: safetensors or GGUF files in any of the published layouts, read under one set of names.
//!
//! [`Checkpoint`] is the open files (memory-mapped); [`names`] turns stored keys into canonical names; [`Source`] is what a
//! layer's `load` walks. Canonical names are BFL's for the transformer and the autoencoder, transformers' for T5 and CLIP
//! (without CLIP's `text_model.`). Nothing here downloads.

mod checkpoint;
mod config;
mod error;
mod keep;
pub mod names;
mod read;
mod sniff;
mod source;
pub mod write;

pub use checkpoint::{Checkpoint, Kind, Stored};
pub use config::Config;
pub use error::Error;
pub(crate) use keep::is_large;
pub use keep::{Keep, OnHost};
pub use names::Component;
pub use sniff::describe;
pub use source::{LoadReport, Source};
