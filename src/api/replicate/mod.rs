//! Replicate's HTTP API: predictions, and the models that they are of. Its own clients run against it unmodified.
//!
//! Facts about clients that shaped it: an answer to a blocking create whose time is up must still say `starting`; unknown inputs are
//! dropped and unknown keys beside `input` refused; cancel comes with a JSON content type and no body.

mod error;
mod input;
mod prediction;
mod schema;

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::http::header::{CONTENT_TYPE, LOCATION};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use self::error::Invalid;
pub(super) use self::error::Problem;
use self::schema::{MODELS, Served};
use super::Server;
use crate::hex::hex;
use crate::jobs::{Event, Job, JobId, NewJob, Webhook};

/// Longest that an answer is held back, and what `Prefer: wait` without a number means.
const LONGEST_WAIT: u64 = 60;

/// How often a held request looks after its job.
const LOOK: Duration = Duration::from_millis(10);

const PAGE: i64 = 100;

/// Until keys exist there is one tenant.
const LOCAL: &str = "local";

type Answer = Result<Response, Problem>;

pub(super) fn router() -> Router<Arc<Server>> {
    Router::new()
        .route("/predictions", get(list).post(create_by_version))
        .route("/predictions/{id}", get(show))
        .route("/predictions/{id}/cancel", post(cancel))
        .route("/models", get(models))
        .route("/models/{owner}/{name}", get(model))
        .route("/models/{owner}/{name}/predictions", post(create_by_model))
        .route("/models/{owner}/{name}/versions", get(versions))
        .route("/models/{owner}/{name}/versions/{id}", get(version))
        .route("/account", get(account))
}

pub(super) async fn not_found() -> Response {
    Problem::NotFound.into_response()
}

async fn account() -> Response {
    Json(json!({ "type": "organization", "username": LOCAL, "name": "darkroom", "github_url": null })).into_response()
}

async fn create_by_version(State(server): State<Arc<Server>>, headers: HeaderMap, body: Bytes) -> Answer {
    let body = object(&headers, &body)?;
    let Some(version) = body.get("version").and_then(Value::as_str) else {
        return Err(Problem::invalid(vec![Invalid::new("required", "", "version is required".into())]));
    };
    let served = Served::of_version(version).ok_or(Problem::UnknownVersion)?;
    create(&server, &headers, served, &body, &["version"]).await
}

async fn create_by_model(
    State(server): State<Arc<Server>>,
    Path((owner, name)): Path<(String, String)>,
    headers: HeaderMap,
    body: Bytes,
) -> Answer {
    let served = Served::named(&owner, &name).ok_or(Problem::NotFound)?;
    create(&server, &headers, served, &object(&headers, &body)?, &[]).await
}

async fn create(server: &Arc<Server>, headers: &HeaderMap, served: &Served, body: &Map<String, Value>, more: &[&str]) -> Answer {
    const KEYS: [&str; 5] = ["input", "webhook", "webhook_events_filter", "stream", "webhook_completed"];
    let unknown = |key: &&String| !KEYS.contains(&key.as_str()) && !more.contains(&key.as_str());
    let refuse =
        |key: &String| Invalid::new("additional_property_not_allowed", "", format!("Additional property {key} is not allowed"));
    let unknown: Vec<_> = body.keys().filter(unknown).map(refuse).collect();
    if !unknown.is_empty() {
        return Err(Problem::invalid(unknown));
    }
    let none = Map::new();
    let input = match body.get("input") {
        Some(Value::Object(input)) => input,
        None | Some(Value::Null) => &none,
        Some(_) => {
            return Err(Problem::invalid(vec![Invalid::new("invalid_type", "input", "Invalid type. Expected: object".into())]));
        }
    };
    let wait = wait(headers)?;
    let within = within(headers)?;
    let checked = input::check(served, input)?;
    let base = server.model.clone();
    let values = checked.values;
    // Pictures are decoded to be checked.
    let order = tokio::task::spawn_blocking(move || input::order(&values, &base)).await.map_err(|_| Problem::Internal)??;
    let mut notes = checked.notes;
    if server.model.name == "pocket" {
        notes.push(
            "this server runs pocket, the tiny model for trying it out, at its own sizes; give it FLUX.1 with --model".into(),
        );
    }
    let request = json!({
        "order": order,
        "input": input::shown(served, input),
        "model": format!("{}/{}", served.owner, served.name),
        "version": served.version(),
        "notes": notes,
    });
    let new = NewJob {
        tenant: LOCAL.into(),
        affinity: order.affinity(),
        request,
        within,
        webhook: webhook(body)?,
        idempotency: headers
            .get("idempotency-key")
            .and_then(|key| key.to_str().ok())
            .map(|key| (key.to_owned(), fingerprint(body))),
    };
    server.accepting()?;
    let (mut job, _) = server.store.submit(&new).await?;
    if let Some(wait) = wait {
        let begun = Instant::now();
        while !job.status.is_final() && begun.elapsed() < wait {
            tokio::time::sleep(LOOK).await;
            job = server.store.get(LOCAL, &job.id).await?.ok_or(Problem::NotFound)?;
        }
    }
    let base = server.base(headers);
    let mut prediction = prediction::prediction(server, &base, &job);
    let ended = job.status.is_final();
    if !ended {
        // Clients take any other word for the end.
        prediction["status"] = json!("starting");
    }
    let status = if wait.is_some() && !ended { StatusCode::ACCEPTED } else { StatusCode::CREATED };
    let location = format!("{base}/v1/predictions/{}", job.id);
    Ok((status, [(LOCATION, location)], Json(prediction)).into_response())
}

async fn show(State(server): State<Arc<Server>>, headers: HeaderMap, Path(id): Path<String>) -> Answer {
    let job = find(&server, &id).await?;
    Ok(Json(prediction::prediction(&server, &server.base(&headers), &job)).into_response())
}

async fn cancel(State(server): State<Arc<Server>>, headers: HeaderMap, Path(id): Path<String>) -> Answer {
    let id: JobId = id.parse().map_err(|()| Problem::NotFound)?;
    let job = server.store.cancel(LOCAL, &id).await?.ok_or(Problem::NotFound)?;
    Ok(Json(prediction::prediction(&server, &server.base(&headers), &job)).into_response())
}

#[derive(Debug, Deserialize)]
struct Page {
    cursor: Option<String>,
}

async fn list(State(server): State<Arc<Server>>, headers: HeaderMap, Query(page): Query<Page>) -> Answer {
    let before = page.cursor.map(|cursor| cursor.parse::<JobId>().map_err(|()| Problem::NotFound)).transpose()?;
    let mut jobs = server.store.list(LOCAL, before.as_ref(), PAGE + 1).await?;
    let more = jobs.len() > PAGE as usize;
    jobs.truncate(PAGE as usize);
    let base = server.base(&headers);
    let next = jobs.last().filter(|_| more).map(|last| format!("{base}/v1/predictions?cursor={}", last.id));
    let results: Vec<Value> = jobs.iter().map(|job| prediction::prediction(&server, &base, job)).collect();
    Ok(Json(json!({ "next": next, "previous": null, "results": results })).into_response())
}

async fn find(server: &Server, id: &str) -> Result<Job, Problem> {
    let id: JobId = id.parse().map_err(|()| Problem::NotFound)?;
    server.store.get(LOCAL, &id).await?.ok_or(Problem::NotFound)
}

async fn models(State(server): State<Arc<Server>>, headers: HeaderMap) -> Response {
    let results: Vec<Value> = MODELS.iter().map(|served| describe(served, &server.base(&headers))).collect();
    Json(json!({ "next": null, "previous": null, "results": results })).into_response()
}

async fn model(State(server): State<Arc<Server>>, headers: HeaderMap, Path((owner, name)): Path<(String, String)>) -> Answer {
    let served = Served::named(&owner, &name).ok_or(Problem::NotFound)?;
    Ok(Json(describe(served, &server.base(&headers))).into_response())
}

async fn versions(Path((owner, name)): Path<(String, String)>) -> Answer {
    let served = Served::named(&owner, &name).ok_or(Problem::NotFound)?;
    let results: Vec<Value> = served.versions.iter().map(|id| describe_version(served, id)).collect();
    Ok(Json(json!({ "next": null, "previous": null, "results": results })).into_response())
}

async fn version(Path((owner, name, id)): Path<(String, String, String)>) -> Answer {
    let served = Served::named(&owner, &name).ok_or(Problem::NotFound)?;
    // Public code holds many hashes; all of them mean the model as it is.
    Ok(Json(describe_version(served, &id)).into_response())
}

fn describe(served: &Served, base: &str) -> Value {
    json!({
        "url": format!("{base}/v1/models/{}/{}", served.owner, served.name),
        "owner": served.owner,
        "name": served.name,
        "description": served.about,
        "visibility": "public",
        "is_official": true,
        "github_url": null,
        "paper_url": null,
        "license_url": null,
        "run_count": 0,
        "cover_image_url": null,
        "default_example": null,
        "latest_version": describe_version(served, served.version()),
    })
}

fn describe_version(served: &Served, id: &str) -> Value {
    json!({ "id": id, "created_at": "2025-07-31T00:00:00.000Z", "cog_version": "0.16.0", "openapi_schema": served.openapi() })
}

/// A JSON object; other media types are refused, since a form of another site could send them.
fn object(headers: &HeaderMap, body: &[u8]) -> Result<Map<String, Value>, Problem> {
    let json = headers
        .get(CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok())
        .is_some_and(|kind| kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json")));
    if !json {
        return Err(Problem::Media);
    }
    match serde_json::from_slice(body) {
        Ok(Value::Object(body)) => Ok(body),
        Ok(_) => Err(Problem::invalid(vec![Invalid::new("invalid_type", "", "Invalid type. Expected: object".into())])),
        Err(error) => Err(Problem::invalid(vec![Invalid::new("invalid_json", "", format!("the body is not JSON: {error}"))])),
    }
}

/// `Prefer: wait` or `wait=n`.
fn wait(headers: &HeaderMap) -> Result<Option<Duration>, Problem> {
    let Some(prefer) = headers.get("prefer").and_then(|prefer| prefer.to_str().ok()) else { return Ok(None) };
    for part in prefer.split([',', ';']).map(str::trim) {
        match part.split_once('=') {
            None if part.eq_ignore_ascii_case("wait") => return Ok(Some(Duration::from_secs(LONGEST_WAIT))),
            Some((name, seconds)) if name.trim().eq_ignore_ascii_case("wait") => {
                let seconds: u64 = seconds.trim().parse().ok().filter(|seconds| (1..=99).contains(seconds)).ok_or_else(|| {
                    Problem::invalid(vec![Invalid::new(
                        "invalid",
                        "",
                        "Prefer must be wait, or wait=n with n from 1 to 60".into(),
                    )])
                })?;
                return Ok(Some(Duration::from_secs(seconds.min(LONGEST_WAIT))));
            }
            _ => {}
        }
    }
    Ok(None)
}

/// `Cancel-After: 90`, `1m30s`, `2h`: in milliseconds, from 5 s to 24 h.
fn within(headers: &HeaderMap) -> Result<Option<i64>, Problem> {
    let Some(text) = headers.get("cancel-after").map(|after| after.to_str().unwrap_or_default().trim().to_owned()) else {
        return Ok(None);
    };
    let mut seconds: i64 = 0;
    let mut number = String::new();
    let mut good = !text.is_empty();
    for c in text.chars() {
        let factor = match c {
            '0'..='9' => {
                number.push(c);
                continue;
            }
            's' => 1,
            'm' => 60,
            'h' => 3600,
            _ => 0,
        };
        good &= factor > 0 && !number.is_empty();
        seconds = seconds.saturating_add(number.parse::<i64>().unwrap_or(0).saturating_mul(factor));
        number.clear();
    }
    seconds = seconds.saturating_add(number.parse().unwrap_or(0));
    if good && (5..=86_400).contains(&seconds) {
        return Ok(Some(seconds * 1000));
    }
    let description = "Cancel-After must be a time from 5s to 24h, such as 90, 30s or 1m30s".into();
    Err(Problem::invalid(vec![Invalid::new("invalid", "", description)]))
}

fn webhook(body: &Map<String, Value>) -> Result<Option<Webhook>, Problem> {
    let Some(url) = body.get("webhook").or(body.get("webhook_completed")).and_then(Value::as_str) else { return Ok(None) };
    let bad = |field: &str, text: &str| Problem::invalid(vec![Invalid::new("invalid", field, text.into())]);
    if !url.starts_with("https://") && !url.starts_with("http://") {
        return Err(bad("webhook", "Does not match format 'uri'"));
    }
    let events = match body.get("webhook_events_filter").filter(|filter| !filter.is_null()) {
        None => Event::ALL.to_vec(),
        Some(filter) => {
            let known = |event: &Value| event.as_str().and_then(|event| event.parse().ok());
            let events: Option<Vec<Event>> = filter.as_array().and_then(|events| events.iter().map(known).collect());
            events.ok_or_else(|| bad("webhook_events_filter", "must be a list of start, output, logs and completed"))?
        }
    };
    Ok(Some(Webhook { url: url.into(), events }))
}

/// Of a request's body, whatever the order of its keys.
fn fingerprint(body: &Map<String, Value>) -> String {
    hex(&Sha256::digest(Value::Object(body.clone()).to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(axum::http::HeaderName::from_static(name), value.parse().unwrap())])
    }

    #[test]
    fn waiting_and_deadlines() {
        let seconds = |value: &str| wait(&headers("prefer", value)).map(|wait| wait.map(|wait| wait.as_secs())).map_err(drop);
        assert_eq!(seconds("wait"), Ok(Some(60)));
        assert_eq!(seconds("wait=5"), Ok(Some(5)));
        assert_eq!(seconds("respond-async, wait=99"), Ok(Some(60)));
        assert_eq!(seconds("respond-async"), Ok(None));
        assert!(seconds("wait=0").is_err() && seconds("wait=x").is_err());
        let after = |value: &str| within(&headers("cancel-after", value)).map_err(drop);
        assert_eq!(after("90"), Ok(Some(90_000)));
        assert_eq!(after("1m30s"), Ok(Some(90_000)));
        assert_eq!(after("24h"), Ok(Some(86_400_000)));
        for bad in ["", "4", "25h", "m", "1d", "-5", "5 s"] {
            assert!(after(bad).is_err(), "{bad}");
        }
    }
}
