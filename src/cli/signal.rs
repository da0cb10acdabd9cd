//! Ctrl-C. A job is stopped between two steps, a file between two tensors; anything else is left at once, since nothing is half written
//! then.

use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// Leave at once.
const IMPATIENT: u8 = 0;
/// Ask the job to stop; leave at once when asked again.
const JOB: u8 = 1;
/// The job was asked to stop.
const STOPPING: u8 = 2;
/// Files are being written: let it end.
const WRITING: u8 = 3;

/// What Ctrl-C does at the moment.
#[derive(Debug, Clone, Default)]
pub(super) struct Interrupt(Arc<AtomicU8>);

impl Interrupt {
    /// Takes over SIGINT and SIGTERM for the rest of the process.
    pub(super) fn install() -> anyhow::Result<Self> {
        let interrupt = Self::default();
        let state = interrupt.0.clone();
        ctrlc::set_handler(move || {
            let stop = state.compare_exchange(JOB, STOPPING, Ordering::SeqCst, Ordering::SeqCst);
            if matches!(stop, Err(IMPATIENT | STOPPING)) {
                process::exit(i32::from(super::INTERRUPTED));
            }
        })?;
        Ok(interrupt)
    }

    pub(super) fn job_begins(&self) {
        // A request to stop is not forgotten.
        let _ = self.0.compare_exchange(IMPATIENT, JOB, Ordering::SeqCst, Ordering::SeqCst);
    }

    pub(super) fn writing_begins(&self) {
        let _ = self.0.compare_exchange(JOB, WRITING, Ordering::SeqCst, Ordering::SeqCst);
    }

    pub(super) fn stopping(&self) -> bool {
        self.0.load(Ordering::SeqCst) == STOPPING
    }
}
