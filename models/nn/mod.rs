//! The layers that every model here is made of. The choice of kernel, dtype and storage lives in this folder and in
//! `kernels`, never in a model.

mod linear;
mod norm;

pub use kernels::{Budget, attention};
pub use linear::{Linear, Weight};
pub use norm::{LayerNorm, RmsNorm};
