//! Tests across modules, all on the CPU and without a network, against numbers in `tests/fixtures`.

mod fixtures;
mod parity_encoders;
