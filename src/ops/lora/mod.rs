//! Adapters: what a user calls them, what is in them, and the proof that they come off again.

mod extract;
mod resolve;
mod verify;

pub use extract::{Extracted, extract};
pub use models::lora::Report;
pub use resolve::{Lora, inspect, open, parse};
pub use verify::{Timed, Verified, VerifyOrder, verify};
