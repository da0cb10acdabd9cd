//! Everything that is tested through the crates' public face, as one binary.

mod fixtures;
mod parity_flux;
