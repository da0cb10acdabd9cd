//! Getting the adapters of the jobs that come next, while one runs: the device does not wait for a download.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;

use super::Order;
use super::run::{credentials, loras};
use crate::engine::Selected;
use crate::jobs::{JobId, Store};
use crate::ops::lora::Sources;
use crate::ops::serve::Secret;

/// Jobs that are looked at.
const AHEAD: usize = 3;

/// Adapters of jobs that are to come, got with each job's own credentials just before.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    ready: Mutex<VecDeque<(JobId, Vec<Selected>)>>,
}

impl Ahead {
    fn put(&self, job: JobId, adapters: Vec<Selected>) {
        let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        ready.push_back((job, adapters));
        if ready.len() > AHEAD {
            ready.pop_front();
        }
    }

    /// Those of a job, once.
    pub(super) fn take(&self, job: &JobId) -> Option<Vec<Selected>> {
        let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        let i = ready.iter().position(|(known, _)| known == job)?;
        ready.remove(i).map(|(_, adapters)| adapters)
    }
}

const PAUSE: Duration = Duration::from_millis(200);

/// Fetches and reads ahead until `stop`. What fails here fails again, and is told, when its job runs.
pub(super) fn fetch(
    ahead: &Ahead,
    store: &Store,
    base: &str,
    sources: &Sources,
    secret: &Secret,
    runtime: &Handle,
    stop: &AtomicBool,
) {
    let mut seen: VecDeque<JobId> = VecDeque::new();
    while !stop.load(Ordering::SeqCst) {
        let upcoming = runtime.block_on(store.upcoming(base, AHEAD as i64)).unwrap_or_default();
        let next = upcoming.into_iter().find(|job| !seen.contains(&job.id));
        let Some(job) = next else {
            std::thread::sleep(PAUSE);
            continue;
        };
        if let Ok(order) = serde_json::from_value::<Order>(job.request["order"].clone())
            && !order.loras.is_empty()
        {
            let go_on = |_| if stop.load(Ordering::SeqCst) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
            if let Ok(adapters) = sources.open_as(&loras(&order), &credentials(&order, secret), &mut { go_on }) {
                ahead.put(job.id.clone(), adapters);
            }
        }
        seen.push_back(job.id);
        if seen.len() > 4 * AHEAD {
            seen.pop_front();
        }
    }
}
