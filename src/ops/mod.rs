//! What a user can ask for, whoever asks: the command line, or the server for its clients.
//!
//! [`generate`] turns a [`generate::Request`] (as sent) into a valid [`Job`](crate::engine::Job), runs it and writes pictures;
//! [`lora`] finds and reads adapters; [`models`] knows the named base models, fetches and checks them; [`serve`] runs accepted jobs;
//! [`sweep`] makes grids of pictures and compares them; [`doctor`] looks at a machine before it is needed, and `proof` at what our kernels do
//! on its card.

pub mod doctor;
mod error;
mod files;
pub mod generate;
pub mod lora;
mod machine;
pub mod models;
pub(crate) mod proof;
pub mod serve;
mod shown;
mod sizes;
pub mod sweep;

pub use error::Error;
pub use machine::Machine;
pub(crate) use sizes::near;
pub use sizes::{AspectRatio, Megapixels};
