//! Adapters: what a user calls them, what is in them, and the proof that they come off again.

mod extract;
mod parse;
mod sources;
mod verify;

pub use extract::{Extracted, extract};
pub use models::lora::Report;

pub use crate::fetch::shown;
pub use parse::{Lora, parse};
pub use sources::Sources;
pub use verify::{Timed, Verified, VerifyOrder, verify};
