//! The layers that every model here is made of. The choice of kernel, dtype and storage lives in this folder and in
//! `kernels`, never in a model.

mod activations;
mod embedding;
mod linear;
mod norm;
mod parameter;

pub use activations::{Activations, add_gated_then_norm, attention_beside, linear_beside, modulated_norm};
pub use embedding::Embedding;
pub use kernels::attention;
pub use linear::{Linear, Mapped, Weight};
pub use norm::{LayerNorm, RmsNorm};
pub(crate) use parameter::Reread;
pub use parameter::{Home, Parameter};
