//! How long things are kept, and clearing away what is over.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};

use super::Server;
use super::submit::upload_key;
use crate::blobs;
use crate::jobs::Error;
use crate::ops::serve::{outputs, preview};

/// How often the queue's clock is looked at: leases, deadlines.
const REAP: Duration = Duration::from_millis(500);

/// How often old things are looked for.
const CLEAR: Duration = Duration::from_secs(5);

/// Longest that storage is asked to remove files before other things are done.
const STORAGE: Duration = Duration::from_secs(10);

/// How often what killed writers left is looked for.
const SWEEP: Duration = Duration::from_secs(24 * 3600);

/// What of an old job's request is kept with it.
const REST: [&str; 3] = ["model", "version", "address"];

/// How long things are kept once their job has ended; for ever if not set.
#[derive(Debug, Clone, Copy, Default)]
pub struct Keep {
    /// Pictures, inputs and logs.
    pub pictures: Option<Duration>,
    /// The jobs themselves, without those.
    pub jobs: Option<Duration>,
}

impl Server {
    /// Keeps the queue in order and clears away what is old, until `ended`.
    pub(super) async fn clear(self: Arc<Self>, ended: watch::Receiver<bool>) {
        let (mut next, mut clearing) = (Instant::now(), None::<JoinHandle<()>>);
        while !*ended.borrow() {
            self.reap().await;
            if let Ok(waiting) = self.store.waiting().await {
                self.queued.store(waiting.queued.unsigned_abs(), Ordering::Relaxed);
            }
            if Instant::now() >= next {
                self.meters.add_up();
                if clearing.as_ref().is_none_or(JoinHandle::is_finished) {
                    // In a task of its own: storage may be slow, and the queue must not wait for it.
                    let server = self.clone();
                    clearing = Some(tokio::spawn(async move {
                        if let Err(error) = server.clear_old().await {
                            tracing::error!(%error, "old jobs are not cleared away");
                        }
                    }));
                }
                next = Instant::now() + CLEAR;
            }
            tokio::time::sleep(REAP).await;
        }
    }

    /// Removes what killed writers left. In a thread, which ends with the process: nobody need wait for slow storage.
    pub(super) fn sweep(&self) {
        let blobs = self.blobs.clone();
        std::thread::spawn(move || {
            loop {
                blobs.sweep();
                std::thread::sleep(SWEEP);
            }
        });
    }

    async fn clear_old(&self) -> Result<(), Error> {
        if let Some(age) = self.keep.pictures.or(self.keep.jobs) {
            let until = Instant::now() + STORAGE;
            for job in self.store.old(age).await? {
                let id = job.id.as_str();
                let gone = removed(until, async {
                    self.blobs.remove(&outputs(id)).await?;
                    self.blobs.delete(&preview(id)).await
                })
                .await;
                // What was asked for goes in any case; the files later if need be.
                if gone || !job.data_removed {
                    self.store.strip(&job, &REST, gone).await?;
                }
            }
        }
        let until = Instant::now() + STORAGE;
        for id in self.store.expired_uploads().await? {
            // First the file: what is not named any more is never removed.
            if removed(until, self.blobs.delete(&upload_key(&id))).await {
                self.store.forget_upload(&id).await?;
            }
        }
        if let Some(age) = self.keep.jobs {
            self.store.forget(age).await?;
        }
        Ok(())
    }
}

/// Whether storage did it by `until`; after that it is not asked.
async fn removed(until: Instant, removing: impl Future<Output = Result<(), blobs::Error>>) -> bool {
    if Instant::now() >= until {
        return false;
    }
    match timeout_at(until, removing).await {
        Ok(done) => done.inspect_err(|error| tracing::warn!(%error, "a file is not removed")).is_ok(),
        Err(_) => {
            tracing::warn!("files are not removed: storage does not answer");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blobs::Blobs;
    use crate::jobs::{NewJob, Status};

    #[tokio::test]
    async fn storage_that_never_answers_does_not_stop_the_queues_clock() {
        let folder = tempfile::tempdir().unwrap();
        let (blobs, _listener) = Blobs::silent();
        let keep = Keep { pictures: Some(Duration::ZERO), jobs: None };
        let server = Server::for_tests(folder.path(), blobs, keep).await;
        let (old, _) = server.store.submit(&NewJob::for_tests()).await.unwrap();
        server.store.cancel("me", &old.id).await.unwrap();
        tokio::time::sleep(Duration::from_millis(10)).await;
        let (_ending, ended) = watch::channel(false);
        let _clearing = tokio::spawn(server.clone().clear(ended));
        // By then the old job's pictures are to be removed.
        tokio::time::sleep(REAP).await;
        let (late, _) = server.store.submit(&NewJob { within: Some(1), ..NewJob::for_tests() }).await.unwrap();
        let begun = Instant::now();
        while server.store.find(&late.id).await.unwrap().unwrap().status != Status::Aborted {
            assert!(begun.elapsed() < Duration::from_secs(10), "its deadline passes unseen");
            tokio::time::sleep(REAP).await;
        }
        while !server.store.find(&old.id).await.unwrap().unwrap().data_removed {
            assert!(begun.elapsed() < 3 * STORAGE, "what was asked for stays");
            tokio::time::sleep(REAP).await;
        }
        let left = server.store.old(Duration::ZERO).await.unwrap();
        assert!(left.iter().any(|job| job.id == old.id), "its files are still to be removed");
    }

    #[tokio::test]
    async fn storage_that_fails_keeps_no_text_and_its_files_go_later() {
        let folder = tempfile::tempdir().unwrap();
        let files = folder.path().join("files");
        let blobs = Blobs::open(files.to_str().unwrap(), &[]).unwrap();
        let keep = Keep { pictures: Some(Duration::ZERO), jobs: Some(Duration::ZERO) };
        let server = Server::for_tests(folder.path(), blobs, keep).await;
        let old = server.ended_for_tests().await.id;
        server.blobs.put(&format!("{}/0.png", outputs(old.as_str())), vec![1]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(10)).await;
        // A file in the place of the folder: root may remove everything.
        std::fs::rename(files.join("outputs"), files.join("away")).unwrap();
        std::fs::write(files.join("outputs"), b"").unwrap();
        for _ in 0..2 {
            server.clear_old().await.unwrap();
            let now = server.store.find(&old).await.unwrap().expect("what is not named is never removed");
            assert!(now.data_removed && now.request["prompt"].is_null() && now.result.is_none(), "{now:?}");
        }
        std::fs::remove_file(files.join("outputs")).unwrap();
        std::fs::rename(files.join("away"), files.join("outputs")).unwrap();
        server.clear_old().await.unwrap();
        assert!(server.store.find(&old).await.unwrap().is_none() && !files.join(outputs(old.as_str())).exists());
    }
}
