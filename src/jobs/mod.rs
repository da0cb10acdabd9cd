//! The durable queue: accepted means committed.
//!
//! One schema and one set of statements for SQLite (embedded) and PostgreSQL. A job is claimed with a lease and an epoch; a worker
//! whose lease ended cannot write any more. Whose turn it is, is decided in the claim: the tenant that waited longest since its last
//! start, and among its first jobs one whose adapters the worker has. Webhook events are written with the change that they tell.

mod error;
mod id;
mod job;
mod keys;
mod names;
mod outbox;
mod rows;
mod schema;
mod store;
mod submit;
mod uploads;
mod watch;

pub use error::Error;
pub use id::JobId;
pub use job::{Claim, Event, Job, NewJob, Outcome, Status, Stop, Webhook};
pub use keys::Key;
pub use names::OwnModel;
pub use outbox::Delivery;
pub use store::{Limits, Store};
pub use uploads::{NewUpload, Upload};
pub use watch::{Ended, Waiting};
