//! Everything that is tested through the crates' public face, as one binary.

mod cli;
mod cli_models;
mod e2e;
mod fixtures;
mod hub;
mod layouts;
mod parity_encoders;
mod parity_flux;
mod tidy;
