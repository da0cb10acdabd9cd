//! One accepted job, from its order to its stored pictures.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::runtime::Handle;

use super::ahead::{Ahead, too_slow};
use super::news::News;
use super::worker::{Work, outputs};
use super::{Order, Origin, Secret, Sign, Tokens};
use crate::engine::{self, Event, Finished, Pipeline, Selected};
use crate::failpoint::failpoint;
use crate::fetch::{self, Credentials, Web};
use crate::image::Format;
use crate::jobs::{Claim, Job};
use crate::ops::generate::{self, Picture, Setting};
use crate::ops::lora::Sources;
use crate::ops::{Error, models};

/// Largest file of a picture to start from, by link or in a form, in bytes.
pub const MOST_PICTURE: usize = 20 << 20;

/// So long may storage take; a bucket's client gives up before.
const LONGEST_STORAGE: Duration = Duration::from_secs(600);

/// For a picture to start from, and for a job's LoRAs, to arrive: the device waits meanwhile. What came of a LoRA is kept, so that a
/// second attempt goes on from there.
const LONGEST_PICTURE: Duration = Duration::from_secs(60);
const LONGEST_FETCH: Duration = Duration::from_secs(600);

/// The same where other jobs could run.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often others are looked for.
const LOOK: Duration = Duration::from_secs(1);

/// What every job of a worker needs.
pub(super) struct Runner<'a> {
    pub(super) work: &'a Work,
    pub(super) ahead: &'a Ahead,
    pub(super) model: &'a models::Model,
    pub(super) digest: Option<&'a str>,
    pub(super) pipeline: &'a Pipeline,
    pub(super) device: &'a candle_core::Device,
    pub(super) sources: &'a Sources,
    pub(super) web: &'a Web,
    pub(super) runtime: &'a Handle,
    pub(super) stop: &'a AtomicBool,
    pub(super) tell: &'a (dyn Fn(Sign) + Sync),
}

/// What is kept of a job that succeeded.
pub(super) struct Done {
    pub(super) result: Value,
    pub(super) affinity: String,
}

/// Of the request itself; this machine's are not for it.
pub(super) fn credentials(order: &Order, secret: &Secret) -> Result<Credentials, Error> {
    let (Some(sealed), Some(lora)) = (&order.tokens, order.loras.first()) else { return Ok(Credentials::default()) };
    let tokens = secret.open(sealed).and_then(|text| serde_json::from_str::<Tokens>(&text).ok());
    // Without them it would be told that it has none.
    let unreadable = || Error::Fetch { reference: fetch::shown(&lora.reference), source: Arc::new(fetch::Error::Tokens) };
    Ok(tokens.ok_or_else(unreadable)?.credentials())
}

impl Runner<'_> {
    pub(super) fn run(&self, claim: &Claim, news: &News) -> Result<Done, Error> {
        let begun = Instant::now();
        let order = Order::of(&claim.job)?;
        let mut job = self.prepare(claim, &order, news)?;
        let adapters = self.adapters(claim, &order, news);
        let fetched = begun.elapsed();
        failpoint("fetched");
        let (finished, lora_error) = self.paint(&order, &mut job, adapters, news)?;
        failpoint("painted");
        news.at(json!({ "stage": "writing" }));
        let writing = Instant::now();
        let files = self.write(claim, &order, &job, &finished)?;
        let used_loras = job.loras.iter().zip(&order.loras).map(|(selected, ordered)| {
            let report = &selected.adapter.report;
            json!({
                "source": fetch::shown(&ordered.reference),
                "sha256": report.digest,
                "scale": ordered.scale,
                "modules": report.modules_matched,
                "trigger_words": report.trigger_words,
            })
        });
        let seconds = |time: Duration| (time.as_secs_f64() * 1e6).round() / 1e6;
        let timings = finished.timings;
        let result = json!({
            "files": files,
            "seed": order.seed,
            "prompt": job.prompt,
            "width": job.width,
            "height": job.height,
            "base": { "name": self.model.name, "sha256": self.digest },
            "device": generate::device_name(self.device),
            "device_free_bytes": kernels::free_memory(self.device),
            "dtype": finished.dtype,
            "loras": used_loras.collect::<Vec<_>>(),
            "lora_used": if order.loras.is_empty() { Value::Null } else { json!(!job.loras.is_empty()) },
            "lora_error": lora_error.as_ref().map(|error| json!({ "code": error.code(), "message": error.told() })),
            "switched": finished.switch.changed + finished.switch.restored > 0,
            "timings": {
                "fetch": seconds(fetched),
                "switch": seconds(timings.switch),
                "encode": seconds(timings.encode),
                "denoise": seconds(timings.denoise),
                "decode": seconds(timings.decode),
                "write": seconds(writing.elapsed()),
                "total": seconds(begun.elapsed()),
            },
        });
        Ok(Done { result, affinity: order.affinity() })
    }

    /// What the order says, as the engine takes it, without its LoRAs.
    fn prepare(&self, claim: &Claim, order: &Order, news: &News) -> Result<engine::Job, Error> {
        news.say(&format!("Using seed: {}\n", order.seed));
        let notes = claim.job.request["notes"].as_array().into_iter().flatten().filter_map(Value::as_str);
        notes.for_each(|note| news.say(&format!("Note: {note}\n")));
        let image = self.picture("image", order.image.as_ref(), news)?;
        let request = order.request(image, self.picture("mask", order.mask.as_ref(), news)?)?;
        let (job, remarks) = generate::prepare(&request, self.model)?;
        remarks.iter().for_each(|remark| news.say(&format!("Note: {remark}\n")));
        Ok(job)
    }

    /// The pictures; the base model's where the LoRA is at fault and the order would rather have those, and then also that fault.
    fn paint(
        &self,
        order: &Order,
        job: &mut engine::Job,
        adapters: Result<Vec<Selected>, Error>,
        news: &News,
    ) -> Result<(Finished, Option<Error>), Error> {
        let draw = |job: &_| self.pipeline.run(job, &mut |event| self.heard(event, news)).map_err(Error::from);
        let drawn = adapters.and_then(|adapters| {
            job.loras = adapters;
            draw(job)
        });
        let (finished, lora_error) = match drawn {
            Err(error) if order.without_lora && error.is_lora() => {
                let why = error.told();
                news.say(&format!("Warning: {why}; this is the base model's picture, without the LoRA\n"));
                job.loras.clear();
                (draw(job)?, Some(error))
            }
            drawn => (drawn?, None),
        };
        finished.switch.notes.iter().for_each(|note| news.say(&format!("Note: {note}\n")));
        Ok((finished, lora_error))
    }

    /// Stores the pictures; answers their names.
    fn write(&self, claim: &Claim, order: &Order, job: &engine::Job, finished: &Finished) -> Result<Vec<String>, Error> {
        let name = generate::device_name(self.device);
        let setting = Setting { model: &self.model.name, digest: self.digest, device: &name, dtype: &finished.dtype };
        let quality = u8::try_from(order.quality.min(100)).unwrap_or(100);
        let encoded = generate::encode(job, finished, (order.format()?, quality), Some(setting))?;
        let names: Vec<String> = (0..encoded.len()).map(|i| format!("out-{i}.{}", order.format)).collect();
        let folder = outputs(claim.job.id.as_str());
        for (name, bytes) in names.iter().zip(encoded) {
            self.stored(self.work.blobs.put(&format!("{folder}/{name}"), bytes))?;
            failpoint("written");
        }
        Ok(names)
    }

    /// The file of a picture to start from.
    fn picture(&self, field: &'static str, origin: Option<&Origin>, news: &News) -> Result<Option<Picture>, Error> {
        let Some(origin) = origin else { return Ok(None) };
        let (name, bytes) = match origin {
            Origin::Stored(key) => {
                let stored = self.stored(self.work.blobs.get(key))?;
                let gone = || Error::invalid(field, &"a file that was removed", "sent again");
                ("the upload".to_owned(), stored.ok_or_else(gone)?.to_vec())
            }
            Origin::Link(link) => {
                let name = fetch::shown_link(link);
                news.at(json!({ "stage": "fetching" }));
                let got = self.runtime.block_on(self.patiently(self.web.get(link, MOST_PICTURE), &name, news));
                (name, got.map_err(|source| Error::Image { field, source })?)
            }
        };
        Ok(Some(Picture { name, bytes }))
    }

    fn adapters(&self, claim: &Claim, order: &Order, news: &News) -> Result<Vec<Selected>, Error> {
        let adapters = self.ahead.take(&claim.job.id).unwrap_or_else(|| self.fetch(&claim.job, order, news))?;
        for selected in &adapters {
            let report = &selected.adapter.report;
            let (digest, modules, scale) = (&report.digest, report.modules_matched, selected.scales.model);
            news.say(&format!("LoRA {digest:.12}: {modules} modules at scale {scale}\n"));
            report.warnings.iter().for_each(|warning| news.say(&format!("Warning: {warning}\n")));
        }
        Ok(adapters)
    }

    /// Cancelled where others wait and the job's adapters come slowly: they are got while others run, and the job is given back.
    fn fetch(&self, job: &Job, order: &Order, news: &News) -> Result<Vec<Selected>, Error> {
        let begun = Instant::now();
        let (mut look, mut late) = (PATIENCE, false);
        let loras = self.stored(order.loras_from(&self.work.blobs))?;
        let fetched = self.sources.open_as(&loras, &credentials(order, &self.work.secret)?, &mut |progress| {
            news.at(json!({ "stage": "fetching", "done": progress.done, "total": progress.total }));
            (self.tell)(Sign::Alive);
            let elapsed = begun.elapsed();
            late = elapsed > LONGEST_FETCH;
            let mut leave = false;
            if elapsed > look {
                look = elapsed + LOOK;
                leave = self.ahead.take_over(job);
            }
            if late || leave { ControlFlow::Break(()) } else { self.go_on(news) }
        });
        fetched.map_err(|error| if late { too_slow(error) } else { error })
    }

    /// Waits for storage, with signs of life: one that is away is not the job's fault. A folder that hangs for longer is the worker's end.
    fn stored<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(watched(work, Duration::from_secs(1), |waited| {
            if waited < LONGEST_STORAGE {
                (self.tell)(Sign::Alive);
            }
            ControlFlow::Continue(())
        }))
    }

    /// Waits for a download, with signs of life, and not for ever; it may be stopped.
    async fn patiently<T>(
        &self,
        download: impl Future<Output = Result<T, fetch::Error>>,
        name: &str,
        news: &News,
    ) -> Result<T, fetch::Error> {
        let look = |waited| {
            (self.tell)(Sign::Alive);
            if self.go_on(news).is_break() {
                return ControlFlow::Break(Err(fetch::Error::Cancelled));
            }
            if waited > LONGEST_PICTURE {
                return ControlFlow::Break(Err(fetch::Error::Slow(name.to_owned())));
            }
            ControlFlow::Continue(())
        };
        watched(download, Duration::from_millis(100), look).await
    }

    fn go_on(&self, news: &News) -> ControlFlow<()> {
        let stop = news.stopped().is_some() || self.stop.load(Ordering::SeqCst);
        if stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn heard(&self, event: Event<'_>, news: &News) -> ControlFlow<()> {
        (self.tell)(Sign::Alive);
        match event {
            Event::Encoding => news.at(json!({ "stage": "encoding" })),
            Event::Step { output, outputs, step, steps } => {
                failpoint("step");
                let (done, all) = ((output - 1) * steps + step, outputs * steps);
                news.at(json!({ "stage": "denoising", "step": done, "steps": all }));
                // As tqdm writes it: clients read their progress from this.
                let bar = "#".repeat(10 * done / all);
                news.say(&format!("{:3}%|{bar:<10}| {done}/{all}\n", 100 * done / all));
            }
            Event::Preview { picture, .. } => {
                let encoded = crate::image::encode(picture, Format::Webp, 80, None);
                encoded.map_or_else(|error| tracing::warn!(%error, "no preview"), |file| news.show(file));
            }
            Event::Decoding { output, .. } => news.at(json!({ "stage": "decoding", "output": output })),
        }
        self.go_on(news)
    }
}

/// What comes of `work`; as long as nothing has, `look` hears every so often how long it has been, and may end it.
async fn watched<T>(work: impl Future<Output = T>, every: Duration, mut look: impl FnMut(Duration) -> ControlFlow<T>) -> T {
    let begun = tokio::time::Instant::now();
    tokio::pin!(work);
    loop {
        if let Ok(done) = tokio::time::timeout(every, &mut work).await {
            return done;
        }
        if let ControlFlow::Break(instead) = look(begun.elapsed()) {
            return instead;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_waited_for_is_watched() {
        let second = Duration::from_secs(1);
        let slow = async {
            tokio::time::sleep(Duration::from_millis(3500)).await;
            "stored"
        };
        let mut heard = Vec::new();
        let done = watched(slow, second, |waited| {
            heard.push(waited.as_secs());
            ControlFlow::Continue(())
        });
        assert_eq!((done.await, heard), ("stored", vec![1, 2, 3]));
        // What never comes goes on for as long as it may.
        let end =
            |waited| if waited > Duration::from_secs(600) { ControlFlow::Break("given up") } else { ControlFlow::Continue(()) };
        assert_eq!(watched(std::future::pending(), second, end).await, "given up");
        // What is there is not looked at.
        assert_eq!(watched(async { 7 }, second, |_| unreachable!()).await, 7);
    }
}
