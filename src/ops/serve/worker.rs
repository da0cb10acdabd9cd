//! The worker: owns the device, takes jobs from the store, and says how far it is. The store is all that it shares with the service,
//! so it may die at any moment.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::time::timeout;

use super::news::{News, PREVIEW, beat};
use super::run::Runner;
use super::{Secret, Sign, ahead};
use crate::blobs::Blobs;
use crate::config::Config;
use crate::engine::{self, LoraMode, Pipeline};
use crate::failpoint::failpoint;
use crate::fetch::{Limits, Web};
use crate::jobs::{Claim, Outcome, Store};
use crate::ops::Machine;
use crate::ops::generate::{self, Precision, Request};
use crate::ops::lora::Sources;
use crate::ops::{Error, models};

/// Without a sign of life for so long a worker counts as dead.
pub(super) const LEASE: Duration = Duration::from_secs(60);

/// How soon an idle worker sees a job that nobody woke it for: another service's, with a shared database.
const IDLE: Duration = Duration::from_millis(100);

/// Before a database that fails is asked again: without it there is nothing to do, and the model stays loaded.
const AGAIN: Duration = Duration::from_secs(1);

/// An idle worker tries a tiny picture this often, or as seldom as makes that a hundredth of its time.
const TRY: Duration = Duration::from_secs(15);

#[derive(Debug)]
pub struct Work {
    pub store: Store,
    pub blobs: Blobs,
    pub secret: Secret,
    /// Of this run of the worker.
    pub name: String,
    pub model: String,
    pub machine: Machine,
    pub precision: Option<Precision>,
}

/// The folder of a job's pictures in the storage.
#[must_use]
pub fn outputs(job: &str) -> String {
    format!("outputs/{job}")
}

/// The key of a job's newest preview, a WebP file.
#[must_use]
pub fn preview(job: &str) -> String {
    format!("previews/{job}.webp")
}

/// Loads the model and runs jobs until `stop` is set, or whoever `wake`s it has gone. `tell` hears signs of life.
pub fn work(
    work: &Work,
    config: &Config,
    runtime: &Handle,
    stop: &AtomicBool,
    wake: &Receiver<()>,
    tell: &(dyn Fn(Sign) + Sync),
) -> Result<(), Error> {
    let model = models::resolve(&work.model, config)?;
    let device = work.machine.open()?;
    let plan = work.machine.plan(&model, &device, work.precision)?;
    let pipeline = Pipeline::load(&model.bundle, &device, plan, &mut |_| {})?;
    let digest = models::digest(&model.bundle, config.cache.as_deref());
    let digest = digest.inspect_err(|error| tracing::warn!(%error, "the model has no digest")).ok();
    let sources = Sources::for_strangers(config);
    let web = Web::new(config.private_urls, Limits::default()).map_err(|source| Error::Image { field: "image", source })?;
    let ready = ahead::Ahead::default();
    let runner = Runner {
        work,
        ahead: &ready,
        model: &model,
        digest: digest.as_deref(),
        pipeline: &pipeline,
        device: &device,
        sources: &sources,
        web: &web,
        runtime,
        stop,
        tell,
    };
    runner.try_out()?;
    tell(Sign::Ready(generate::device_name(&device)));
    std::thread::scope(|scope| {
        for _ in 0..ahead::AHEAD {
            scope.spawn(|| {
                ahead::look_ahead(&ready, (&work.store, &work.blobs), &model.name, &sources, &work.secret, runtime, stop)
            });
        }
        // Also if a job panics: nobody is waited for who would go on.
        let _stopped = Stopping(stop);
        serve(&runner, wake)
    })
}

/// Says stop when it goes.
struct Stopping<'a>(&'a AtomicBool);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn serve(runner: &Runner<'_>, wake: &Receiver<()>) -> Result<(), Error> {
    let mut warm = vec![String::new()];
    let (mut tried, mut pause) = (Instant::now(), TRY);
    while !runner.stop.load(Ordering::SeqCst) {
        let slow = runner.ahead.slow();
        let claimed = runner.ask(|store| store.claim(&runner.work.name, &runner.model.name, &warm, &slow, LEASE))?;
        if let Some(claim) = claimed {
            (runner.tell)(Sign::Begun(claim.job.id.clone()));
            failpoint("claimed");
            let failed;
            (warm, failed) = runner.job(&claim)?;
            (runner.tell)(Sign::Ended(claim.job.id));
            if !failed {
                tried = Instant::now();
                continue;
            }
            // After a failure the device is proven before the next job, without what the job had on the weights: that may be what failed.
            pause = Duration::ZERO;
            runner.pipeline.patches().apply(&[], runner.pipeline.lora_mode(LoraMode::Auto)).map_err(engine::Error::from)?;
        } else {
            match wake.recv_timeout(IDLE) {
                Ok(()) => continue,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
        }
        if tried.elapsed() >= pause {
            let begun = Instant::now();
            runner.try_out()?;
            tried = Instant::now();
            pause = TRY.max(begun.elapsed() * 100);
        }
        (runner.tell)(Sign::Alive);
    }
    Ok(())
}

impl Runner<'_> {
    /// The smallest picture in one step: the device computes, and what it gives are numbers. The adapters of the last job stay.
    fn try_out(&self) -> Result<(), Error> {
        let request = Request {
            prompt: "x".into(),
            width: Some(64),
            height: Some(64),
            steps: Some(1),
            seed: Some(0),
            ..Request::default()
        };
        let (job, _) = generate::prepare(&request, self.model)?;
        self.pipeline.try_out(&job)?;
        Ok(())
    }

    /// Runs a claimed job to an end that the store knows. The adapters that are on the weights then, and whether it failed.
    fn job(&self, claim: &Claim) -> Result<(Vec<String>, bool), Error> {
        let store = &self.work.store;
        let news = Arc::new(News::default());
        let beating = self.runtime.spawn(beat(store.clone(), self.work.blobs.clone(), claim.clone(), news.clone()));
        let outcome = self.run(claim, &news);
        news.end();
        let mut lost = self.runtime.block_on(beating).unwrap_or(false);
        // What was said last is in the logs before the job is over.
        let left = news.left();
        if !lost && !left.is_empty() {
            lost = matches!(self.ask(|store| store.log(claim, &left)), Err(crate::jobs::Error::Lost));
        }
        let warm = outcome.as_ref().map_or_else(|_| vec![String::new()], |done| vec![done.affinity.clone()]);
        let failed = matches!(&outcome, Err(error) if !error.is_cancelled());
        failpoint("finishing");
        let ended = match outcome {
            _ if lost => Ok(()),
            Ok(done) => self.finish(claim, &Outcome::Succeeded(done.result)),
            Err(error) if error.is_cancelled() && news.stopped().is_none() => self.ask(|store| store.release(claim)),
            Err(error) if error.is_cancelled() => self.finish(claim, &Outcome::Canceled),
            Err(error) => {
                // The hints are for the command line; a request has inputs for its tokens.
                let message = error.told().replace("HF_TOKEN", "hf_api_token").replace("CIVITAI_API_TOKEN", "civitai_api_token");
                tracing::warn!(job = %claim.job.id, code = error.code(), error = message, "the job failed");
                self.finish(claim, &Outcome::Failed { code: error.code(), message })
            }
        };
        match ended {
            // Another worker has it: this one was taken for dead.
            Err(crate::jobs::Error::Lost) => tracing::warn!(job = %claim.job.id, "the claim was lost"),
            ended => ended?,
        }
        failpoint("finished");
        if claim.job.request["order"]["previews"] == true {
            // What is left of it goes with the job's other files.
            let key = preview(claim.job.id.as_str());
            let _ = self.runtime.block_on(async { timeout(PREVIEW, self.work.blobs.delete(&key)).await });
        }
        Ok((warm, failed))
    }

    fn finish(&self, claim: &Claim, outcome: &Outcome) -> Result<(), crate::jobs::Error> {
        self.ask(|store| store.finish(claim, outcome)).map(drop)
    }

    /// Asks the store until its database answers, or the worker is to stop.
    fn ask<'a, T, F>(&'a self, question: impl Fn(&'a Store) -> F) -> Result<T, crate::jobs::Error>
    where
        F: Future<Output = Result<T, crate::jobs::Error>>,
    {
        loop {
            match self.runtime.block_on(question(&self.work.store)) {
                Err(error) if error.is_outage() && !self.stop.load(Ordering::SeqCst) => {
                    tracing::warn!(%error, "the database is asked again");
                    (self.tell)(Sign::Alive);
                    std::thread::sleep(AGAIN);
                }
                answer => return answer,
            }
        }
    }
}
