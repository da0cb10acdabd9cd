//! Adapters: what a user calls them, what is in them, and the proof that they come off again.

mod convert;
mod extract;
mod merge;
mod parse;
mod sources;
mod target;
mod verify;
mod watch;

pub use convert::{ConvertOrder, Converted, convert};
pub use extract::{Extracted, extract};
pub use merge::{MergeOrder, MergedModel, merge};
pub use models::lora::{Format, Report};

pub use crate::fetch::shown;
pub use parse::{Lora, parse};
pub use sources::{Sources, check_foreign};
pub use verify::{Timed, Verified, VerifyOrder, verify};
pub use watch::Stage;
