//! Cog's HTTP API: one model at the root, predictions that the client names. Told from Replicate's by the missing `version`.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::auth::Caller;
use super::outputs::patiently;
use super::problem::{Body, Cog, Problem};
use super::{Server, replicate};
use crate::jobs::{Job, Status};

/// Cog's version whose API this is. Clients take older ones' lists for streams.
pub(super) const VERSION: &str = "0.16.0";

/// Longest that an answer is held; Cog holds it as long as it takes.
const LONGEST: Duration = Duration::from_secs(3600);

/// Longest name of a prediction, in bytes.
const LONGEST_NAME: usize = 128;

/// Names live among the idempotency keys, apart from those of other dialects.
const NAMES: &str = "cog:";

type Answer = Result<Response, Cog>;

pub(super) fn router() -> Router<Arc<Server>> {
    Router::new()
        .route("/", get(discover))
        .route("/openapi.json", get(|| async { Json(model().openapi()) }))
        .route("/predictions", get(replicate::list).post(create))
        .route("/predictions/{id}", get(show).put(put))
}

/// The model that this front has.
fn model() -> &'static replicate::Served {
    replicate::Served::named("black-forest-labs", "flux-dev-lora").expect("it is in the table")
}

async fn discover() -> Response {
    let discovery = json!({
        "cog_version": VERSION,
        "darkroom_version": env!("CARGO_PKG_VERSION"),
        "openapi_url": "/openapi.json",
        "docs_url": "/darkroom/openapi.json",
        "healthcheck_url": "/health-check",
        "predictions_url": "/predictions",
        "predictions_idempotent_url": "/predictions/{prediction_id}",
        "predictions_cancel_url": "/predictions/{prediction_id}/cancel",
    });
    Json(discovery).into_response()
}

async fn create(State(server): State<Arc<Server>>, caller: Caller, headers: HeaderMap, sent: Body) -> Response {
    let is_replicates = replicate::object(&headers, &sent.0).is_ok_and(|body| body.contains_key("version"));
    if is_replicates {
        return replicate::create_by_version(State(server), caller, headers, sent).await.into_response();
    }
    predict(&server, &caller, headers, sent, None).await.into_response()
}

async fn put(
    State(server): State<Arc<Server>>,
    caller: Caller,
    Path(id): Path<String>,
    headers: HeaderMap,
    sent: Body,
) -> Response {
    predict(&server, &caller, headers, sent, Some(id)).await.into_response()
}

async fn show(State(server): State<Arc<Server>>, caller: Caller, headers: HeaderMap, Path(id): Path<String>) -> Response {
    let id = match named(&server, &caller, &id).await {
        Ok(job) => job.id.to_string(),
        Err(_) => id,
    };
    replicate::show(State(server), caller, headers, Path(id)).await.into_response()
}

/// The prediction that a client named so.
pub(super) async fn named(server: &Server, caller: &Caller, id: &str) -> Result<Job, Problem> {
    server.store.keyed(&caller.tenant, &key(id)).await?.ok_or(Problem::NotFound)
}

/// What a client named this prediction, if it did.
pub(super) async fn name(server: &Server, job: &Job) -> Result<Option<String>, Problem> {
    let key = server.store.key_of(job, NAMES).await?;
    Ok(key.and_then(|key| key.strip_prefix(NAMES).map(str::to_owned)))
}

fn key(id: &str) -> String {
    format!("{NAMES}{id}")
}

async fn predict(server: &Server, caller: &Caller, mut headers: HeaderMap, sent: Body, path: Option<String>) -> Answer {
    let Body(sent, held) = sent;
    let mut body = replicate::object(&headers, &sent)?;
    let id = match (body.remove("id").and_then(|id| id.as_str().map(str::to_owned)), path) {
        (Some(body), Some(path)) if body != path => {
            return Err(Problem::invalid(
                "value_error",
                "",
                format!("prediction ID in the URL {path:?} is not the body's {body:?}"),
            )
            .into());
        }
        (body, path) => path.or(body),
    };
    body.retain(|name, _| ["input", "webhook", "webhook_events_filter"].contains(&name.as_str()));
    headers.remove("idempotency-key");
    if let Some(id) = &id {
        let plain = !id.is_empty() && id.len() <= LONGEST_NAME && id.bytes().all(|byte| byte.is_ascii_graphic());
        if !plain {
            return Err(Problem::invalid("value_error", "", "id must be 1 to 128 visible ASCII characters").into());
        }
        headers.insert("idempotency-key", key(id).parse().map_err(|_| Problem::Internal)?);
    }
    let detached = headers.get("prefer").is_some_and(|prefer| prefer.to_str().is_ok_and(|text| text.contains("respond-async")));
    let mut job = replicate::accept(server, caller, &headers, model(), &body, held).await?;
    // Megabytes, which nobody needs while the answer is held.
    drop((sent, body));
    let hold = if detached { Duration::ZERO } else { LONGEST };
    let until = Instant::now() + hold;
    if !detached {
        server.wait(&mut job, hold).await;
    }
    let status = if job.status.is_final() { StatusCode::OK } else { StatusCode::ACCEPTED };
    let id = id.unwrap_or_else(|| job.id.to_string());
    let told = patiently(&job.id, until, || prediction(server, &headers, &job, &id)).await?;
    Ok((status, Json(told)).into_response())
}

async fn prediction(server: &Server, headers: &HeaderMap, job: &Job, id: &str) -> Result<Value, Problem> {
    let base = server.base(headers);
    let mut prediction = json!({
        "id": id,
        "status": replicate::status(job.status),
        "input": job.request["input"],
        // Cog gives files inside its answers.
        "output": server.pictures(job, &base, false).await?,
        "logs": job.logs,
        "error": job.error,
        "created_at": replicate::time(job.created_at),
        "started_at": job.started_at.map(replicate::time),
        "completed_at": job.completed_at.map(replicate::time),
        "version": job.request["version"],
    });
    if let (Status::Succeeded, Some(start), Some(end)) = (job.status, job.started_at, job.completed_at) {
        prediction["metrics"] = json!({ "predict_time": (end - start) as f64 / 1000.0 });
    }
    Ok(prediction)
}
