//! Requests that are held until their job has ended. They cost a map's entry each; one task asks the store for all of them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use super::Server;
use crate::jobs::{Job, JobId};

/// How often the store is asked what ended. Jobs of our own workers are told of at once.
const LOOK: Duration = Duration::from_millis(100);

/// How often a stream looks for what is new of its job.
pub(super) const STREAM: Duration = Duration::from_millis(200);

/// After so long a held request looks for itself.
const DOUBT: Duration = Duration::from_secs(10);

/// For the store's last answer: clients give up soon after the time that they asked for.
pub(super) const ANSWER: Duration = Duration::from_secs(2);

/// Milliseconds by which commits may come later than the time they carry.
const LATE: i64 = 5_000;

#[derive(Debug, Default)]
pub(super) struct Waiters {
    held: Mutex<HashMap<JobId, (Arc<Notify>, usize)>>,
}

impl Waiters {
    fn held(&self) -> MutexGuard<'_, HashMap<JobId, (Arc<Notify>, usize)>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes those who wait for a job.
    pub(super) fn ended(&self, job: &JobId) {
        if let Some((notify, _)) = self.held().get(job) {
            notify.notify_waiters();
        }
    }

    pub(super) fn count(&self) -> usize {
        self.held().values().map(|(_, count)| count).sum()
    }
}

/// A place among the waiting, left when dropped.
struct Place<'a> {
    waiters: &'a Waiters,
    job: &'a JobId,
    notify: Arc<Notify>,
}

impl<'a> Place<'a> {
    fn take(waiters: &'a Waiters, job: &'a JobId) -> Self {
        let mut held = waiters.held();
        let (notify, count) = held.entry(job.clone()).or_default();
        *count += 1;
        Self { waiters, job, notify: notify.clone() }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut held = self.waiters.held();
        if let Some((_, count)) = held.get_mut(self.job) {
            *count -= 1;
            if *count == 0 {
                held.remove(self.job);
            }
        }
    }
}

impl Server {
    /// Waits until the job has ended, for `longest` at most; then it is as it was last seen. `false` if it is gone. A database that fails
    /// meanwhile is asked again: the job was accepted, and whoever is told to send it again gets a second one.
    pub(super) async fn wait(&self, job: &mut Job, longest: Duration) -> bool {
        let until = Instant::now() + longest;
        let id = job.id.clone();
        let place = Place::take(&self.waiters, &id);
        loop {
            let woken = place.notify.notified();
            tokio::pin!(woken);
            // From here on nothing is missed.
            woken.as_mut().enable();
            let answer = timeout_at(until.max(Instant::now() + ANSWER), self.store.get(&job.tenant, &id)).await;
            let pause = match answer {
                Ok(Ok(Some(now))) => {
                    *job = now;
                    DOUBT
                }
                Ok(Ok(None)) => return false,
                Ok(Err(error)) => {
                    tracing::warn!(job = %id, %error, "a job that is waited for cannot be looked at");
                    STREAM
                }
                Err(_) => STREAM,
            };
            if job.status.is_final() || Instant::now() >= until {
                return true;
            }
            let _ = timeout_at(until.min(Instant::now() + pause), woken).await;
        }
    }

    /// Wakes those whose jobs ended, also in other processes; for ever.
    pub(super) async fn wake_waiting(self: Arc<Self>) {
        let mut since = self.store.now().await.unwrap_or_default();
        loop {
            tokio::time::sleep(LOOK).await;
            if self.waiters.held().is_empty() {
                continue;
            }
            match self.store.ended(since - LATE).await {
                Ok(ended) => {
                    ended.jobs.iter().for_each(|job| self.waiters.ended(job));
                    since = ended.now;
                }
                Err(error) => tracing::warn!(%error, "the store was not asked what ended"),
            }
        }
    }
}
