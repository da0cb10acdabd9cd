//! Serving: what an accepted job is, and the worker that runs them one after another.

mod ahead;
mod news;
mod order;
mod run;
mod secret;
mod sign;
mod worker;

pub use order::{LONGEST_PROMPT, LONGEST_REFERENCE, MOST_LORAS, Order, OrderedLora, Origin, Tokens, is_data};
pub use run::MOST_PICTURE;
pub use secret::Secret;
pub use sign::Sign;
pub use worker::{Work, outputs, preview, work};
