//! Getting the adapters of the jobs that come next, while one runs: the device does not wait for a download.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::runtime::Handle;

use super::Order;
use super::run::{credentials, loras};
use crate::jobs::{JobId, Store};
use crate::ops::lora::Sources;
use crate::ops::serve::Secret;

/// Jobs that are looked at.
const AHEAD: i64 = 3;

const PAUSE: Duration = Duration::from_millis(200);

/// Fetches and reads ahead until `stop`. What fails here fails again, and is told, when its job runs.
pub(super) fn fetch(store: &Store, base: &str, sources: &Sources, secret: &Secret, runtime: &Handle, stop: &AtomicBool) {
    let mut seen: VecDeque<JobId> = VecDeque::new();
    while !stop.load(Ordering::SeqCst) {
        let upcoming = runtime.block_on(store.upcoming(base, AHEAD)).unwrap_or_default();
        let next = upcoming.into_iter().find(|job| !seen.contains(&job.id));
        let Some(job) = next else {
            std::thread::sleep(PAUSE);
            continue;
        };
        if let Ok(order) = serde_json::from_value::<Order>(job.request["order"].clone())
            && !order.loras.is_empty()
        {
            let go_on = |_| if stop.load(Ordering::SeqCst) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
            let _ = sources.open_as(&loras(&order), &credentials(&order, secret), &mut { go_on });
        }
        seen.push_back(job.id);
        if seen.len() > 4 * AHEAD as usize {
            seen.pop_front();
        }
    }
}
