//! One GPU, one model, one job at a time. Knows no URL, user, SQL or HTTP.

mod job;

pub use job::{Event, Finished, Job, NoiseKind, Start, Timings, Truncation};
