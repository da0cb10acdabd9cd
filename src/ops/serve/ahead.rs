//! Getting the adapters of the jobs that come next, while one runs: the device does not wait for a download.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use super::Order;
use super::run::credentials;
use crate::blobs::Blobs;
use crate::engine::Selected;
use crate::jobs::{Job, JobId, Store};
use crate::ops::lora::Sources;
use crate::ops::serve::Secret;

/// Jobs that are looked at, each by a thread of its own.
pub(super) const AHEAD: usize = 3;

const PAUSE: Duration = Duration::from_millis(200);

/// For one job's adapters: slow links must not keep everybody else's from coming. What came of them is kept.
const LONGEST: Duration = Duration::from_secs(120);

/// Adapters of jobs that are to come, got with each job's own credentials just before.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// Jobs that somebody looks after or has looked after.
    seen: VecDeque<JobId>,
    ready: VecDeque<(JobId, Vec<Selected>)>,
}

impl Ahead {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first that nobody looks after yet.
    fn choose(&self, upcoming: Vec<Job>) -> Option<Job> {
        let mut known = self.known();
        let job = upcoming.into_iter().find(|job| !known.seen.contains(&job.id))?;
        known.seen.push_back(job.id.clone());
        if known.seen.len() > 4 * AHEAD {
            known.seen.pop_front();
        }
        Some(job)
    }

    fn put(&self, job: JobId, adapters: Vec<Selected>) {
        let mut known = self.known();
        known.ready.push_back((job, adapters));
        if known.ready.len() > AHEAD {
            known.ready.pop_front();
        }
    }

    /// Those of a job, once.
    pub(super) fn take(&self, job: &JobId) -> Option<Vec<Selected>> {
        let mut known = self.known();
        let i = known.ready.iter().position(|(ready, _)| ready == job)?;
        known.ready.remove(i).map(|(_, adapters)| adapters)
    }
}

/// Fetches and reads ahead until `stop`; as many threads as [`AHEAD`] may do it. What fails here fails again, and is told, when its
/// job runs.
pub(super) fn fetch(
    ahead: &Ahead,
    (store, blobs): (&Store, &Blobs),
    base: &str,
    sources: &Sources,
    secret: &Secret,
    runtime: &Handle,
    stop: &AtomicBool,
) {
    while !stop.load(Ordering::SeqCst) {
        let upcoming = runtime.block_on(store.upcoming(base, AHEAD as i64)).unwrap_or_default();
        let Some(job) = ahead.choose(upcoming) else {
            std::thread::sleep(PAUSE);
            continue;
        };
        if let Ok(order) = serde_json::from_value::<Order>(job.request["order"].clone())
            && !order.loras.is_empty()
        {
            let begun = Instant::now();
            let go_on = |_| match stop.load(Ordering::SeqCst) || begun.elapsed() > LONGEST {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            };
            let loras = runtime.block_on(order.loras_from(blobs));
            if let Ok(adapters) = loras.and_then(|loras| sources.open_as(&loras, &credentials(&order, secret), &mut { go_on })) {
                ahead.put(job.id, adapters);
            }
        }
    }
}
