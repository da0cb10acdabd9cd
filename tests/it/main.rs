//! Everything that is tested through the crates' public face, as one binary.

mod e2e;
mod fixtures;
mod layouts;
mod parity_encoders;
mod parity_flux;
mod tidy;
