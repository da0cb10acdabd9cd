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

    /// What was said and is not in the store.
    pub(super) fn left(&self) -> String {
        self.with(|told| std::mem::take(&mut told.logs))
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
        let beaten = if ended { Ok(None) } else { store.heartbeat(&claim, LEASE, progress.as_ref()).await };
        let beaten = match logged {
            Err(Error::Lost) => Err(Error::Lost),
            Err(error) => {
                tracing::warn!(%error, "no logs");
                // With the next beat, before what was said since.
                news.with(|told| told.logs.insert_str(0, &logs));
                beaten
            }
            Ok(()) => beaten,
        };
        match beaten {
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

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Instant;

    use sqlx::Executor;

    use super::*;
    use crate::jobs::{Limits, NewJob};

    async fn claimed(folder: &Path) -> (Store, Claim, String) {
        let address = format!("sqlite:{}", folder.join("jobs.db").display());
        let store = Store::open(&address, Limits::default()).await.unwrap();
        store.submit(&NewJob::for_tests()).await.unwrap();
        let claim = store.claim("w", "", &[], &[], LEASE).await.unwrap().unwrap();
        (store, claim, address)
    }

    /// Waits until the store has heard how far the job is.
    async fn heard(store: &Store, claim: &Claim) {
        let begun = Instant::now();
        while store.find(&claim.job.id).await.unwrap().unwrap().progress.is_none() {
            assert!(begun.elapsed() < Duration::from_secs(10), "no heartbeat");
            tokio::time::sleep(BEAT).await;
        }
    }

    #[tokio::test]
    async fn storage_that_never_answers_holds_up_no_heartbeat() {
        let folder = tempfile::tempdir().unwrap();
        let (store, claim, _) = claimed(folder.path()).await;
        let (blobs, _listener) = Blobs::silent();
        let news = Arc::new(News::default());
        news.show(vec![0]);
        news.at(json!({ "step": 1 }));
        let beating = tokio::spawn(beat(store.clone(), blobs, claim.clone(), news.clone()));
        heard(&store, &claim).await;
        news.end();
        assert!(!beating.await.unwrap(), "the claim is kept");
    }

    #[tokio::test]
    async fn what_could_not_be_logged_is_logged_later() {
        let folder = tempfile::tempdir().unwrap();
        let (store, claim, address) = claimed(folder.path()).await;
        let blobs = Blobs::open(folder.path().join("files").to_str().unwrap(), &[]).unwrap();
        let database = sqlx::AnyPool::connect(&address).await.unwrap();
        let fail = "CREATE TRIGGER full BEFORE UPDATE OF logs ON jobs BEGIN SELECT RAISE(ABORT, 'no room'); END";
        database.execute(fail).await.unwrap();
        let last = Arc::new(News::default());
        last.say("last\n");
        last.end();
        assert!(!beat(store.clone(), blobs.clone(), claim.clone(), last.clone()).await);
        assert_eq!(last.left(), "last\n", "whoever ends the job can say it");
        let news = Arc::new(News::default());
        news.say("one\n");
        news.at(json!({ "step": 1 }));
        let beating = tokio::spawn(beat(store.clone(), blobs, claim.clone(), news.clone()));
        // Sent after the logs: those have failed by now.
        heard(&store, &claim).await;
        news.say("two\n");
        database.execute("DROP TRIGGER full").await.unwrap();
        news.end();
        assert!(!beating.await.unwrap());
        assert_eq!(store.find(&claim.job.id).await.unwrap().unwrap().logs, "one\ntwo\n");
    }
}
