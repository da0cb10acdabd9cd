//! What a running job has to say, on its way to the store; and the store's wish that it stop.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::Notify;

use super::worker::{LEASE, preview};
use crate::blobs::Blobs;
use crate::jobs::{Claim, Error, Stop, Store};

/// How often news go to the store, and how soon a wish to stop is heard.
const BEAT: Duration = Duration::from_millis(200);

/// Longest that a preview's way into storage may keep the claim waiting.
pub(super) const PREVIEW: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(super) struct News {
    told: Mutex<Told>,
    ended: AtomicBool,
    /// Wakes who passes the news on.
    wake: Notify,
}

#[derive(Debug, Default)]
struct Told {
    progress: Option<Value>,
    /// The newest preview's file, and how many there were.
    preview: Option<Vec<u8>>,
    previews: usize,
    logs: String,
    stop: Option<Stop>,
}

impl News {
    fn with<R>(&self, f: impl FnOnce(&mut Told) -> R) -> R {
        f(&mut self.told.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How far the job is: an object.
    pub(super) fn at(&self, mut progress: Value) {
        self.with(|told| {
            if told.previews > 0 {
                progress["previews"] = json!(told.previews);
            }
            told.progress = Some(progress);
        });
    }

    /// A line for the job's logs, with its line break.
    pub(super) fn say(&self, line: &str) {
        self.with(|told| told.logs += line);
    }

    pub(super) fn show(&self, file: Vec<u8>) {
        self.with(|told| told.preview = Some(file));
    }

    pub(super) fn stopped(&self) -> Option<Stop> {
        self.with(|told| told.stop)
    }

    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        self.wake.notify_one();
    }
}

/// Passes news on and keeps the claim. Answers whether the claim was lost.
pub(super) async fn beat(store: Store, blobs: Blobs, claim: Claim, news: Arc<News>) -> bool {
    loop {
        let ended = news.ended.load(Ordering::SeqCst);
        if let Some(file) = news.with(|told| told.preview.take()) {
            // Storage that does not answer must not cost the claim.
            match tokio::time::timeout(PREVIEW, blobs.put(&preview(claim.job.id.as_str()), file)).await {
                Ok(Ok(())) => news.with(|told| {
                    told.previews += 1;
                    if let Some(progress) = &mut told.progress {
                        progress["previews"] = json!(told.previews);
                    }
                }),
                Ok(Err(error)) => tracing::warn!(%error, "no preview"),
                Err(_) => tracing::warn!("no preview: storage is slow"),
            }
        }
        let (progress, logs) = news.with(|told| (told.progress.take(), std::mem::take(&mut told.logs)));
        let logged = if logs.is_empty() { Ok(()) } else { store.log(&claim, &logs).await };
        if logged.is_err() {
            // With the next beat.
            news.with(|told| told.logs.insert_str(0, &logs));
        }
        let beaten = if ended { Ok(None) } else { store.heartbeat(&claim, LEASE, progress.as_ref()).await };
        match logged.and(beaten) {
            Ok(None) => {}
            Ok(Some(stop)) => news.with(|told| told.stop = Some(stop)),
            Err(Error::Lost) => {
                news.with(|told| told.stop = Some(Stop::Asked));
                return true;
            }
            // The database may come back before the lease ends.
            Err(error) => tracing::warn!(%error, "no heartbeat"),
        }
        if ended {
            return false;
        }
        // Ended in between: then at once.
        let _ = tokio::time::timeout(BEAT, news.wake.notified()).await;
    }
}
