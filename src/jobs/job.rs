//! A job as the store has it.

use std::str::FromStr;

use serde_json::Value;

use super::JobId;

/// Where a job is. The last four are for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Queued,
    Running,
    Succeeded,
    Failed,
    /// Stopped while it ran, or taken back before.
    Canceled,
    /// Its deadline passed before it began.
    Aborted,
}

impl Status {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Canceled => "canceled",
            Self::Aborted => "aborted",
        }
    }

    #[must_use]
    pub fn is_final(self) -> bool {
        !matches!(self, Self::Queued | Self::Running)
    }
}

impl FromStr for Status {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let all = [Self::Queued, Self::Running, Self::Succeeded, Self::Failed, Self::Canceled, Self::Aborted];
        all.into_iter().find(|status| status.as_str() == text).ok_or(())
    }
}

/// What happens to a job that a webhook may want to hear of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    Start,
    Output,
    Logs,
    Completed,
}

impl Event {
    pub const ALL: [Self; 4] = [Self::Start, Self::Output, Self::Logs, Self::Completed];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Output => "output",
            Self::Logs => "logs",
            Self::Completed => "completed",
        }
    }
}

impl FromStr for Event {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|event| event.as_str() == text).ok_or(())
    }
}

/// Where a job's events are told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Webhook {
    pub url: String,
    pub events: Vec<Event>,
}

/// What is asked for.
#[derive(Debug, Clone)]
pub struct NewJob {
    pub tenant: String,
    /// The base model's name: only workers that have it take the job.
    pub base: String,
    /// Everything that the job needs, seed and defaults included.
    pub request: Value,
    /// Names the set of adapters: a worker that has them on its weights is the quickest. Empty for none.
    pub affinity: String,
    /// Milliseconds from now within which it must have ended.
    pub within: Option<i64>,
    pub webhook: Option<Webhook>,
    /// A client's key, with the SHA-256 of what it sent.
    pub idempotency: Option<(String, String)>,
}

#[cfg(test)]
impl NewJob {
    /// One of the tenant `me`, without all that can be left out.
    pub(crate) fn for_tests() -> Self {
        Self {
            tenant: "me".into(),
            base: String::new(),
            request: serde_json::json!({ "prompt": "a cat" }),
            affinity: String::new(),
            within: None,
            webhook: None,
            idempotency: None,
        }
    }
}

/// A job as it is now. Times are in milliseconds since 1970.
#[derive(Debug, Clone)]
pub struct Job {
    pub id: JobId,
    pub tenant: String,
    pub status: Status,
    /// `null` if what is stored cannot be read (any more).
    pub request: Value,
    pub affinity: String,
    pub created_at: i64,
    pub started_at: Option<i64>,
    pub completed_at: Option<i64>,
    pub deadline: Option<i64>,
    /// How often it was begun.
    pub epoch: i64,
    pub progress: Option<Value>,
    pub logs: String,
    pub result: Option<Value>,
    pub error_code: Option<String>,
    pub error: Option<String>,
    pub webhook: Option<Webhook>,
    /// Pictures, input and logs were removed because they were old. Pictures may be left in storage that fails, until it does not.
    pub data_removed: bool,
}

/// The right to run a job, until the lease ends or another gets it.
#[derive(Debug, Clone)]
pub struct Claim {
    pub job: Job,
    pub worker: String,
}

/// How a run ended.
#[derive(Debug, Clone)]
pub enum Outcome {
    Succeeded(Value),
    Failed { code: String, message: String },
    Canceled,
}

/// Why a running job should stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    Asked,
    Deadline,
}
