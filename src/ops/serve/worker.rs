//! The worker: owns the device, takes jobs from the store, and says how far it is. The store is all that it shares with the service,
//! so it may die at any moment.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::runtime::Handle;
use tokio::sync::Notify;

use super::Order;
use crate::config::Config;
use crate::engine::{self, DeviceChoice, Event, Pipeline};
use crate::jobs::{Claim, Outcome, Stop, Store};
use crate::ops::generate::{self, Precision, Setting};
use crate::ops::lora::Sources;
use crate::ops::{Error, models};

/// Without a sign of life for so long a worker counts as dead.
const LEASE: Duration = Duration::from_secs(60);

/// How often news go to the store, and how soon a wish to stop is heard.
const BEAT: Duration = Duration::from_millis(200);

/// How soon a new job is seen by an idle worker.
const IDLE: Duration = Duration::from_millis(20);

#[derive(Debug)]
pub struct Work {
    pub store: Store,
    /// Pictures go to `outputs/<job>/` in it.
    pub data: PathBuf,
    /// Of this run of the worker.
    pub name: String,
    pub model: String,
    pub device: DeviceChoice,
    pub precision: Option<Precision>,
}

/// Where a job's pictures are.
#[must_use]
pub fn outputs(data: &Path, job: &str) -> PathBuf {
    data.join("outputs").join(job)
}

/// Loads the model, calls `ready`, and runs jobs until `stop` is set.
pub fn work(work: &Work, config: &Config, runtime: &Handle, stop: &AtomicBool, ready: impl FnOnce()) -> Result<(), Error> {
    let model = models::resolve(&work.model, config)?;
    let device = engine::device(work.device)?;
    let dtype = work.precision.map_or_else(|| engine::default_dtype(&device), Precision::dtype);
    let pipeline = Pipeline::load(&model.bundle, &device, dtype, &mut |_| {})?;
    let digest = models::digest(&model.bundle, config.cache.as_deref()).ok();
    let sources = Sources::new(config);
    ready();
    let mut warm = vec![String::new()];
    while !stop.load(Ordering::SeqCst) {
        let Some(claim) = runtime.block_on(work.store.claim(&work.name, &warm, LEASE))? else {
            std::thread::sleep(IDLE);
            continue;
        };
        let news = Arc::new(News::default());
        let beating = runtime.spawn(beat(work.store.clone(), claim.clone(), news.clone()));
        let begun = Instant::now();
        let run =
            Run { work, model: &model, pipeline: &pipeline, sources: &sources, digest: digest.as_deref(), news: &news, stop };
        let outcome = run.job(&claim, &device);
        news.end();
        // What was said last is in the logs before the job is over.
        let lost = runtime.block_on(beating).unwrap_or(false);
        warm = outcome.as_ref().map_or_else(|_| vec![String::new()], |(_, affinity)| vec![affinity.clone()]);
        let ended = match outcome {
            _ if lost => Ok(()),
            Ok((files, _)) => {
                let result = json!({ "files": files, "predict_time": begun.elapsed().as_secs_f64() });
                runtime.block_on(work.store.finish(&claim, &Outcome::Succeeded(result))).map(drop)
            }
            Err(error) if error.is_cancelled() && news.stopped().is_none() => runtime.block_on(work.store.release(&claim)),
            Err(error) if error.is_cancelled() => runtime.block_on(work.store.finish(&claim, &Outcome::Canceled)).map(drop),
            Err(error) => {
                let outcome = Outcome::Failed { code: error.code(), message: chain(&error) };
                runtime.block_on(work.store.finish(&claim, &outcome)).map(drop)
            }
        };
        match ended {
            // Another worker has it: this one was taken for dead.
            Err(crate::jobs::Error::Lost) => tracing::warn!(job = %claim.job.id, "the claim was lost"),
            ended => ended?,
        }
    }
    Ok(())
}

/// An error with its causes in one line.
fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

struct Run<'a> {
    work: &'a Work,
    model: &'a models::Model,
    pipeline: &'a Pipeline,
    sources: &'a Sources,
    digest: Option<&'a str>,
    news: &'a News,
    stop: &'a AtomicBool,
}

impl Run<'_> {
    /// The names of the written pictures, and the job's adapters.
    fn job(&self, claim: &Claim, device: &candle_core::Device) -> Result<(Vec<String>, String), Error> {
        let order: Order = serde_json::from_value(claim.job.request["order"].clone())
            .map_err(|error| Error::invalid("request", &error.to_string(), "what this version stores"))?;
        let format = order.format()?;
        let request = order.request()?;
        let (mut job, remarks) = generate::prepare(&request, self.model)?;
        self.news.say(&format!("Using seed: {}\n", order.seed));
        let notes = claim.job.request["notes"].as_array().into_iter().flatten().filter_map(Value::as_str);
        notes.for_each(|note| self.news.say(&format!("Note: {note}\n")));
        remarks.iter().for_each(|remark| self.news.say(&format!("Note: {remark}\n")));
        let go_on = || {
            let stop = self.news.stopped().is_some() || self.stop.load(Ordering::SeqCst);
            if stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        job.loras = self.sources.open(&request.loras, &mut |progress| {
            self.news.at(json!({ "stage": "fetching", "done": progress.done, "total": progress.total }));
            go_on()
        })?;
        for selected in &job.loras {
            let report = &selected.adapter.report;
            self.news.say(&format!(
                "LoRA {:.12}: {} modules at scale {}\n",
                report.digest, report.modules_matched, selected.scales.model
            ));
            report.warnings().iter().for_each(|warning| self.news.say(&format!("Warning: {warning}\n")));
        }
        let finished = self.pipeline.run(&job, &mut |event| {
            self.tell(event);
            go_on()
        })?;
        self.news.at(json!({ "stage": "writing" }));
        let name = generate::device_name(device);
        let dtype = self.pipeline.dtype().as_str();
        let setting = Setting { model: &self.model.name, digest: self.digest, device: &name, dtype };
        let quality = u8::try_from(order.quality.min(100)).unwrap_or(100);
        let encoded = generate::encode(&job, &finished, (format, quality), Some(setting))?;
        let names: Vec<String> = (0..encoded.len()).map(|i| format!("out-{i}.{}", order.format)).collect();
        let folder = outputs(&self.work.data, claim.job.id.as_str());
        let write = |source| Error::Write { path: folder.clone(), source };
        std::fs::create_dir_all(&folder).map_err(write)?;
        for (name, bytes) in names.iter().zip(&encoded) {
            let mut file = tempfile::NamedTempFile::new_in(&folder).map_err(write)?;
            std::io::Write::write_all(&mut file, bytes).map_err(write)?;
            file.as_file().sync_all().map_err(write)?;
            file.persist(folder.join(name)).map_err(|error| write(error.error))?;
        }
        Ok((names, order.affinity()))
    }

    fn tell(&self, event: Event) {
        match event {
            Event::Encoding => self.news.at(json!({ "stage": "encoding" })),
            Event::Step { output, outputs, step, steps } => {
                let (done, all) = ((output - 1) * steps + step, outputs * steps);
                self.news.at(json!({ "stage": "denoising", "step": done, "steps": all }));
                // As tqdm writes it: clients read their progress from this.
                let bar = "#".repeat(10 * done / all);
                self.news.say(&format!("{:3}%|{bar:<10}| {done}/{all}\n", 100 * done / all));
            }
            Event::Decoding { output, .. } => self.news.at(json!({ "stage": "decoding", "output": output })),
        }
    }
}

/// What a running job has to say, until it is passed on; and whether it should stop.
#[derive(Debug, Default)]
struct News {
    told: Mutex<Told>,
    ended: AtomicBool,
    /// Wakes who passes the news on.
    wake: Notify,
}

#[derive(Debug, Default)]
struct Told {
    progress: Option<Value>,
    logs: String,
    stop: Option<Stop>,
}

impl News {
    fn with<R>(&self, f: impl FnOnce(&mut Told) -> R) -> R {
        f(&mut self.told.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn at(&self, progress: Value) {
        self.with(|told| told.progress = Some(progress));
    }

    fn say(&self, line: &str) {
        self.with(|told| told.logs += line);
    }

    fn stopped(&self) -> Option<Stop> {
        self.with(|told| told.stop)
    }

    fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        self.wake.notify_one();
    }
}

/// Passes news on and keeps the claim. Answers whether the claim was lost.
async fn beat(store: Store, claim: Claim, news: Arc<News>) -> bool {
    loop {
        let ended = news.ended.load(Ordering::SeqCst);
        let (progress, logs) = news.with(|told| (told.progress.take(), std::mem::take(&mut told.logs)));
        let logged = if logs.is_empty() { Ok(()) } else { store.log(&claim, &logs).await };
        let beaten = if ended { Ok(None) } else { store.heartbeat(&claim, LEASE, progress.as_ref()).await };
        match logged.and(beaten) {
            Ok(None) => {}
            Ok(Some(stop)) => news.with(|told| told.stop = Some(stop)),
            Err(crate::jobs::Error::Lost) => {
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
