//! A job as Replicate's prediction.

use chrono::{DateTime, SecondsFormat};
use serde_json::{Value, json};

use crate::api::Server;
use crate::api::problem::Problem;
use crate::jobs::{Job, Status};

/// `base` is where the client reached us, such as `http://127.0.0.1:8000`; pictures are `links`, or in the answer itself.
pub(in crate::api) async fn prediction(server: &Server, base: &str, job: &Job, links: bool) -> Result<Value, Problem> {
    let id = job.id.as_str();
    let stream = format!("{id}/stream");
    let urls = json!({
        "get": format!("{base}/v1/predictions/{id}"),
        "cancel": format!("{base}/v1/predictions/{id}/cancel"),
        "web": format!("{base}/v1/predictions/{id}"),
        "stream": format!("{base}/v1/files/{stream}?{}", server.permit(&stream)),
    });
    let text = |value: &Value| if value.is_string() { value.clone() } else { json!("") };
    let mut prediction = json!({
        "id": id,
        "model": text(&job.request["model"]),
        "version": text(&job.request["version"]),
        "input": if job.request["input"].is_object() { job.request["input"].clone() } else { json!({}) },
        "output": server.pictures(job, base, links).await?,
        "data_removed": job.data_removed,
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
    if let Some(code) = &job.error_code {
        prediction["error_code"] = json!(code);
    }
    if let Some(deadline) = job.deadline {
        prediction["deadline"] = json!(time(deadline));
    }
    if let Some(webhook) = &job.webhook {
        prediction["webhook"] = json!(webhook.url);
        prediction["webhook_events_filter"] = json!(webhook.events.iter().map(|event| event.as_str()).collect::<Vec<_>>());
    }
    Ok(prediction)
}

/// A job that ended before it began is canceled: Python's client stops at the newer word `aborted`, and others wait for ever on it.
pub(in crate::api) fn status(status: Status) -> &'static str {
    match status {
        Status::Queued => "starting",
        Status::Running => "processing",
        Status::Succeeded => "succeeded",
        Status::Failed => "failed",
        Status::Canceled | Status::Aborted => "canceled",
    }
}

/// Times in seconds; and what only we know: the LoRAs that were used, by digest.
fn metrics(job: &Job) -> Value {
    let seconds = |from: i64, to: i64| (to - from) as f64 / 1000.0;
    let mut metrics = match (job.completed_at, job.started_at) {
        (Some(end), Some(start)) => json!({ "predict_time": seconds(start, end), "total_time": seconds(job.created_at, end) }),
        (Some(end), None) => json!({ "total_time": seconds(job.created_at, end) }),
        _ => json!({}),
    };
    if let Some(result) = &job.result {
        metrics["image_count"] = json!(result["files"].as_array().map_or(0, Vec::len));
        for name in ["timings", "base", "loras", "lora_used", "lora_error", "seed", "prompt", "dtype"] {
            if !result[name].is_null() {
                metrics[name] = result[name].clone();
            }
        }
    }
    metrics
}

pub(in crate::api) fn time(milliseconds: i64) -> String {
    DateTime::from_timestamp_millis(milliseconds).unwrap_or_default().to_rfc3339_opts(SecondsFormat::Millis, true)
}
