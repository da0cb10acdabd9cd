//! darkroom: a self-hosted engine that turns a prompt into pictures with FLUX.1.
//!
//! A picture travels one way: a [`ops::generate::Request`] (as sent) becomes an [`engine::Job`] (valid, every default filled
//! in), a job becomes latents, latents become pictures, pictures become files. [`cli`] and [`api`] are faces of [`ops`]; [`engine`] has
//! the device and the model; [`image`] knows picture files; [`fetch`] gets
//! adapters from where they are; [`jobs`] is the durable queue; [`prompt`] puts trigger words in their place; [`config`] reads the environment. The model itself is in the
//! crate `models`, fused operations in the crate `kernels`.

pub mod api;
pub mod blobs;
mod bytes;
pub mod cli;
pub mod config;
pub mod engine;
mod failpoint;
pub mod fetch;
mod hex;
pub mod image;
pub mod jobs;
pub mod ops;
pub mod prompt;
mod replace;
