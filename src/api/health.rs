//! Whether the service lives and can work, and Prometheus' numbers.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use metrics::{Key, Label, Level, Metadata, Recorder};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use serde_json::{Value, json};

use super::Server;
use super::auth::Caller;
use super::problem::Problem;
use crate::jobs::{Job, JobId, Status};

/// Bounds of the histograms, in seconds.
const SECONDS: [f64; 14] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

const METHODS: [Method; 6] = [Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::DELETE, Method::OPTIONS];

const STAGES: [&str; 6] = ["fetch", "switch", "encode", "denoise", "decode", "write"];

pub(super) fn router() -> Router<Arc<Server>> {
    Router::new()
        .route("/health/live", get(|| async { Json(json!({ "status": "alive" })) }))
        .route("/health/ready", get(ready))
        .route("/health-check", get(cog))
        .route("/metrics", get(metrics))
}

/// Counters and histograms of this process; gauges are read when they are asked for. Labels have few values: no job, prompt or link.
pub(super) struct Meters {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
}

impl std::fmt::Debug for Meters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Meters(..)")
    }
}

const META: Metadata<'_> = Metadata::new("darkroom", Level::INFO, None);

impl Meters {
    pub(super) fn new() -> Self {
        let builder = PrometheusBuilder::new().set_buckets_for_metric(Matcher::Suffix("seconds".into()), &SECONDS);
        let recorder = builder.expect("there are buckets").build_recorder();
        let handle = recorder.handle();
        Self { recorder, handle }
    }

    /// Times are kept one by one until they are added up: now, or when somebody asks for them, which perhaps nobody does.
    pub(super) fn add_up(&self) {
        self.handle.run_upkeep();
    }

    fn count(&self, name: &'static str, labels: Vec<Label>) {
        self.recorder.register_counter(&Key::from_parts(name, labels), &META).increment(1);
    }

    fn time(&self, name: &'static str, labels: Vec<Label>, seconds: f64) {
        self.recorder.register_histogram(&Key::from_parts(name, labels), &META).record(seconds);
    }

    fn gauge(&self, name: &'static str, labels: Vec<Label>, value: f64) {
        self.recorder.register_gauge(&Key::from_parts(name, labels), &META).set(value);
    }

    pub(super) fn answered(&self, method: &Method, route: &str, status: u16, seconds: f64) {
        let labels = vec![
            // Clients may invent methods.
            Label::new("method", if METHODS.contains(method) { method.as_str().to_owned() } else { "other".into() }),
            Label::new("route", route.to_owned()),
            Label::new("status", status.to_string()),
        ];
        self.count("darkroom_http_requests_total", labels);
        self.time("darkroom_http_request_seconds", vec![Label::new("route", route.to_owned())], seconds);
    }

    /// A job that ended.
    pub(super) fn ended(&self, job: &Job) {
        let code = job.error_code.clone().unwrap_or_default();
        let labels = vec![Label::new("status", job.status.as_str()), Label::new("code", code)];
        self.count("darkroom_jobs_total", labels);
        if let Some(started) = job.started_at {
            self.time("darkroom_job_waited_seconds", Vec::new(), (started - job.created_at) as f64 / 1000.0);
        }
        let Some(result) = job.result.as_ref().filter(|_| job.status == Status::Succeeded) else { return };
        if let Some(free) = result["device_free_bytes"].as_f64() {
            let model = result["base"]["name"].as_str().unwrap_or_default().to_owned();
            self.gauge("darkroom_device_free_bytes", vec![Label::new("model", model)], free);
        }
        for stage in STAGES {
            if let Some(seconds) = result["timings"][stage].as_f64() {
                self.time("darkroom_stage_seconds", vec![Label::new("stage", stage)], seconds);
            }
        }
        let lora = match (result["lora_used"].as_bool(), result["switched"].as_bool()) {
            (None, _) => "none",
            (Some(false), _) => "failed",
            (Some(true), Some(true)) => "switched",
            (Some(true), _) => "kept",
        };
        self.count("darkroom_lora_total", vec![Label::new("lora", lora)]);
    }
}

impl Server {
    /// Notes a job that ended in the numbers.
    pub(super) async fn account(self: Arc<Self>, id: JobId) {
        if let Ok(Some(job)) = self.store.find(&id).await {
            self.meters.ended(&job);
            if let (Some(start), Some(end)) = (job.started_at, job.completed_at) {
                self.paced((end - start).unsigned_abs());
            }
        }
    }

    /// Seconds until what waits now is done, at the pace of late; 1 to 600.
    pub(super) fn seconds_of_work(&self) -> u64 {
        let waiting = self.queued.load(Ordering::Relaxed).max(1);
        (waiting * self.pace.load(Ordering::Relaxed) / 1000 / self.units.len() as u64).clamp(1, 600)
    }
}

async fn ready(State(server): State<Arc<Server>>) -> Response {
    let all = server.units.iter().all(|unit| unit.is_ready());
    let ready = all && !server.is_draining();
    let code = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let why = if server.is_draining() {
        "stopping"
    } else if ready {
        "ready"
    } else {
        "a worker has no model yet, or hangs"
    };
    let workers: Vec<Value> = server
        .units
        .iter()
        .map(|unit| {
            let life = unit.life();
            json!({ "model": unit.model.name, "ready": unit.is_ready(), "busy": life.job.is_some(), "device": life.device })
        })
        .collect();
    (code, Json(json!({ "status": why, "workers": workers }))).into_response()
}

/// As Cog tells it: always 200.
async fn cog(State(server): State<Arc<Server>>) -> Response {
    let status = match () {
        () if server.is_draining() => "DEFUNCT",
        () if !server.units.iter().all(|unit| unit.is_ready()) => "STARTING",
        () if server.units.iter().all(|unit| unit.life().job.is_some()) => "BUSY",
        () => "READY",
    };
    let version = json!({ "cog": super::cog::VERSION, "darkroom": env!("CARGO_PKG_VERSION") });
    Json(json!({ "status": status, "setup": { "status": "succeeded", "logs": "" }, "version": version })).into_response()
}

async fn metrics(State(server): State<Arc<Server>>, caller: Caller) -> Result<Response, Problem> {
    if !caller.admin {
        return Err(Problem::Forbidden("Metrics are for admin keys."));
    }
    let waiting = server.store.waiting().await?;
    let meters = &server.meters;
    meters.gauge("darkroom_queue_jobs", Vec::new(), waiting.queued as f64);
    meters.gauge("darkroom_running_jobs", Vec::new(), waiting.running as f64);
    meters.gauge("darkroom_queue_oldest_seconds", Vec::new(), waiting.longest as f64 / 1000.0);
    let seconds = waiting.queued as f64 * server.pace.load(Ordering::Relaxed) as f64 / 1000.0 / server.units.len() as f64;
    meters.gauge("darkroom_queue_work_seconds", Vec::new(), seconds);
    meters.gauge("darkroom_webhooks_waiting", Vec::new(), waiting.untold as f64);
    meters.gauge("darkroom_requests_held", Vec::new(), server.waiters.count() as f64);
    for unit in &server.units {
        let (life, label) = (unit.life(), || vec![Label::new("model", unit.model.name.clone())]);
        meters.gauge("darkroom_worker_ready", label(), f64::from(u8::from(unit.is_ready())));
        meters.gauge("darkroom_worker_busy", label(), f64::from(u8::from(life.job.is_some())));
        meters.gauge("darkroom_worker_deaths", label(), life.deaths as f64);
    }
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    Ok(([(CONTENT_TYPE, kind)], meters.handle.render()).into_response())
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use tokio::sync::watch;

    use super::*;
    use crate::api::Keep;
    use crate::blobs::Blobs;

    /// Without this each request takes memory until somebody asks for the numbers.
    #[tokio::test]
    async fn times_are_added_up_while_nobody_asks_for_them() {
        let folder = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(&folder.path().join("files").display().to_string(), &[]).unwrap();
        let server = Server::for_tests(folder.path(), blobs, Keep::default()).await;
        let measure = || (0..200_000).for_each(|_| server.meters.time("seconds", Vec::new(), 0.01));
        let asked = || {
            let begun = Instant::now();
            assert!(server.meters.handle.render().contains("seconds_count"));
            begun.elapsed()
        };
        // One of two short times may be long because something else ran.
        for _ in 0..5 {
            measure();
            let piled_up = asked();
            measure();
            let (ending, ended) = watch::channel(false);
            tokio::join!(server.clone().clear(ended), async {
                tokio::time::sleep(Duration::from_millis(100)).await;
                ending.send_replace(true);
            });
            if asked() * 2 < piled_up {
                return;
            }
        }
        panic!("what was measured piles up");
    }
}
