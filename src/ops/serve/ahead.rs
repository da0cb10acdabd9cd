//! Getting the adapters of the jobs that come next, while one runs: the device does not wait for a download.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use super::Order;
use super::run::credentials;
use crate::blobs::Blobs;
use crate::engine::Selected;
use crate::fetch;
use crate::jobs::{Job, JobId, Store};
use crate::ops::Error;
use crate::ops::lora::Sources;
use crate::ops::serve::Secret;

/// Jobs that are looked at, each by a thread of its own.
pub(super) const AHEAD: usize = 3;

const PAUSE: Duration = Duration::from_millis(200);

/// For the adapters of a job that comes next: slow links must not keep everybody else's from coming. What came of them is kept.
const LONGEST: Duration = Duration::from_secs(120);

/// And of one that the device does not wait for.
const LONGEST_SLOW: Duration = Duration::from_secs(600);

/// Jobs that the device does not wait for: more than a tenant may have waiting, unless it may have very many.
const MOST_SLOW: usize = 256;

/// Adapters of jobs that are to come, got with each job's own credentials just before.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// Jobs that somebody looks after or has looked after.
    seen: VecDeque<JobId>,
    slow: Vec<Slow>,
    /// Whether jobs were waiting, when it was looked last, that could run.
    others: bool,
    ready: VecDeque<(JobId, Result<Vec<Selected>, Error>)>,
}

/// A job that was given back because its adapters come slowly.
#[derive(Debug)]
struct Slow {
    job: Job,
    /// Whether they are being got.
    begun: bool,
}

impl Ahead {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing is got for these any more.
    fn leave(&self, jobs: &[JobId]) {
        self.known().slow.retain(|one| !jobs.contains(&one.job.id));
    }

    /// The first that nobody looks after yet.
    fn choose(&self, mut upcoming: Vec<JobId>) -> Option<JobId> {
        let mut known = self.known();
        upcoming.retain(|job| known.slow.iter().all(|one| one.job.id != *job));
        known.others = !upcoming.is_empty();
        let job = upcoming.into_iter().take(AHEAD).find(|job| !known.seen.contains(job))?;
        known.seen.push_back(job.clone());
        if known.seen.len() > 4 * AHEAD {
            known.seen.pop_front();
        }
        Some(job)
    }

    /// The first of those whose tenant's others are not being got: one tenant's slow links keep only its own from coming.
    fn choose_slow(&self) -> Option<Job> {
        let slow = &mut self.known().slow;
        let begun: Vec<String> = slow.iter().filter(|one| one.begun).map(|one| one.job.tenant.clone()).collect();
        // Somebody looks after what comes next.
        let one = slow.iter_mut().find(|one| begun.len() + 1 < AHEAD && !one.begun && !begun.contains(&one.job.tenant))?;
        one.begun = true;
        Some(one.job.clone())
    }

    fn put(&self, job: JobId, adapters: Result<Vec<Selected>, Error>) {
        let mut known = self.known();
        known.ready.push_back((job, adapters));
        // What can be read again from the cache goes first; that a link was too slow takes no room, and minutes to find out.
        for (is_large, most) in [(true, AHEAD), (false, MOST_SLOW)] {
            let of_kind = |(_, adapters): &(JobId, Result<_, _>)| adapters.is_ok() == is_large;
            if known.ready.iter().filter(|one| of_kind(one)).count() > most
                && let Some(i) = known.ready.iter().position(of_kind)
            {
                known.ready.remove(i);
            }
        }
    }

    fn is_slow(&self, job: &JobId) -> bool {
        self.known().slow.iter().any(|one| one.job.id == *job)
    }

    /// What came of a job's, once.
    pub(super) fn take(&self, job: &JobId) -> Option<Result<Vec<Selected>, Error>> {
        let mut known = self.known();
        let i = known.ready.iter().position(|(ready, _)| ready == job)?;
        known.ready.remove(i).map(|(_, adapters)| adapters)
    }

    /// Takes over a job whose adapters come slowly, if others could run meanwhile. `false` if not.
    pub(super) fn take_over(&self, job: &Job) -> bool {
        let mut known = self.known();
        let taken = known.others && known.slow.len() < MOST_SLOW;
        if taken {
            known.slow.push(Slow { job: job.clone(), begun: false });
        }
        taken
    }

    /// The jobs that are not to be run yet.
    pub(super) fn slow(&self) -> Vec<JobId> {
        self.known().slow.iter().map(|one| one.job.id.clone()).collect()
    }
}

/// Fetches and reads ahead until `stop`; as many threads as [`AHEAD`] may do it. What fails of a job that comes next fails again, and is
/// told, when it runs.
pub(super) fn look_ahead(
    ahead: &Ahead,
    (store, blobs): (&Store, &Blobs),
    base: &str,
    sources: &Sources,
    secret: &Secret,
    runtime: &Handle,
    stop: &AtomicBool,
) {
    let get = |job: &Job, longest: Duration, wanted: &dyn Fn() -> bool| {
        let order = Order::of(job)?;
        let begun = Instant::now();
        let late = || begun.elapsed() > longest;
        let go_on = |_| match stop.load(Ordering::SeqCst) || late() || !wanted() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        };
        let loras = runtime.block_on(order.loras_from(blobs))?;
        sources
            .open_as(&loras, &credentials(&order, secret)?, &mut { go_on })
            .map_err(|error| if late() { too_slow(error) } else { error })
    };
    while !stop.load(Ordering::SeqCst) {
        if let Some(job) = ahead.choose_slow() {
            let _leaving = Leaving(ahead, &job.id);
            let adapters = get(&job, LONGEST_SLOW, &|| ahead.is_slow(&job.id));
            if ahead.is_slow(&job.id) {
                ahead.put(job.id.clone(), adapters);
            }
            continue;
        }
        let mut over = ahead.slow();
        if let Ok(open) = runtime.block_on(store.open_of(&over)) {
            over.retain(|job| !open.contains(job));
            ahead.leave(&over);
        }
        let upcoming = runtime.block_on(store.upcoming(base, (AHEAD + ahead.slow().len()) as i64)).unwrap_or_default();
        let chosen = ahead.choose(upcoming).and_then(|job| runtime.block_on(store.find(&job)).ok().flatten());
        match chosen {
            None => std::thread::sleep(PAUSE),
            Some(job) if job.request["order"]["loras"].as_array().is_none_or(Vec::is_empty) => {}
            Some(job) => {
                if let Ok(adapters) = get(&job, LONGEST, &|| true) {
                    ahead.put(job.id, Ok(adapters));
                }
            }
        }
    }
}

/// Leaves a slow job when it goes: also after a panic nobody keeps it from running.
struct Leaving<'a>(&'a Ahead, &'a JobId);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.leave(std::slice::from_ref(self.1));
    }
}

/// Of a download that was broken off because it took too long.
pub(super) fn too_slow(error: Error) -> Error {
    match error {
        Error::Fetch { reference, .. } => Error::Fetch { source: Arc::new(fetch::Error::Slow(reference.clone())), reference },
        error => error,
    }
}
