//! Serving: what an accepted job is, and the worker that runs them one after another.

mod order;
mod worker;

pub use order::{Order, OrderedLora, picture};
pub use worker::{Work, outputs, work};
