//! A job as Replicate's prediction.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use chrono::{DateTime, SecondsFormat};
use serde_json::{Value, json};

use crate::api::Server;
use crate::jobs::{Job, Status};
use crate::ops::serve::outputs;

/// `base` is where the client reached us, such as `http://127.0.0.1:8000`.
pub(super) fn prediction(server: &Server, base: &str, job: &Job) -> Value {
    let id = job.id.as_str();
    let urls = json!({
        "get": format!("{base}/v1/predictions/{id}"),
        "cancel": format!("{base}/v1/predictions/{id}/cancel"),
        "web": format!("{base}/v1/predictions/{id}"),
    });
    let mut prediction = json!({
        "id": id,
        "model": job.request["model"],
        "version": job.request["version"],
        "input": job.request["input"],
        "output": files(server, base, job),
        "data_removed": false,
        "error": job.error,
        "status": status(job.status),
        "source": "api",
        "created_at": time(job.created_at),
        "started_at": job.started_at.map(time),
        "completed_at": job.completed_at.map(time),
        "logs": job.logs,
        "metrics": metrics(job),
        "urls": urls,
    });
    if let Some(deadline) = job.deadline {
        prediction["deadline"] = json!(time(deadline));
    }
    prediction
}

/// A job that ended before it began is canceled: Python's client stops at the newer word `aborted`, and others wait for ever on it.
fn status(status: Status) -> &'static str {
    match status {
        Status::Queued => "starting",
        Status::Running => "processing",
        Status::Succeeded => "succeeded",
        Status::Failed => "failed",
        Status::Canceled | Status::Aborted => "canceled",
    }
}

fn metrics(job: &Job) -> Value {
    let seconds = |from: i64, to: i64| (to - from) as f64 / 1000.0;
    match (job.completed_at, job.started_at) {
        (Some(end), Some(start)) => json!({ "predict_time": seconds(start, end), "total_time": seconds(job.created_at, end) }),
        (Some(end), None) => json!({ "total_time": seconds(job.created_at, end) }),
        _ => json!({}),
    }
}

/// Links, or the pictures themselves where clients would not take links: they wrap only `https:` and `data:` as files.
fn files(server: &Server, base: &str, job: &Job) -> Value {
    let Some(names) = job.result.as_ref().and_then(|result| result["files"].as_array()) else { return Value::Null };
    let id = job.id.as_str();
    let one = |name: &Value| -> Option<Value> {
        let name = name.as_str()?;
        if server.links(base) {
            return Some(json!(format!("{base}/outputs/{id}/{name}?signature={}", server.sign(id, name))));
        }
        // Other requests go on while the disk is waited for.
        let bytes = tokio::task::block_in_place(|| std::fs::read(outputs(&server.data, id).join(name))).ok()?;
        Some(json!(format!("data:{};base64,{}", crate::api::media_type(name), STANDARD.encode(bytes))))
    };
    names.iter().map(one).collect::<Option<Vec<_>>>().map_or(Value::Null, Value::Array)
}

pub(super) fn time(milliseconds: i64) -> String {
    DateTime::from_timestamp_millis(milliseconds).unwrap_or_default().to_rfc3339_opts(SecondsFormat::Millis, true)
}
