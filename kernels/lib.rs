//! Operations that FLUX.1 spends its time in, behind one plain function each.
//!
//! | op | what it does | reference |
//! |---|---|---|
//! | [`attention`] | softmax(q kᵀ / √e) v in chunks of queries | the same in one piece, in tests |
//! | [`layer_norm`] | layer norm without weights, f32 statistics | composed candle ops, in tests |
//! | [`rms_norm`] | root-mean-square norm with scale, f32 statistics | composed candle ops, in tests |
//! | [`rotate`] | rotary embedding of interleaved pairs | composed candle ops, in tests |
//!
//! The model never asks which device it runs on: a faster kernel for one device replaces the inside of its function here.

mod memory;
mod ops;

pub use memory::free_memory;
pub use ops::attention::{Budget, attention};
pub use ops::norm::{layer_norm, rms_norm};
pub use ops::rotary::rotate;
