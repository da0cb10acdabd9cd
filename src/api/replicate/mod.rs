//! Replicate's HTTP API: predictions, files, and the models that they are of. Its own clients run against it unmodified.
//!
//! Facts about clients that shaped it: an answer to a blocking create whose time is up must still say `starting`; unknown inputs are
//! dropped and unknown keys beside `input` refused; cancel comes with a JSON content type and no body.

mod create;
mod deployments;
mod files;
mod headers;
mod input;
mod models;
mod prediction;
mod schema;
mod stream;

use std::ops::Range;
use std::sync::Arc;

use axum::extract::{FromRequestParts, Path, Query, State};
use axum::http::HeaderMap;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::json;

use super::Server;
use super::auth::Caller;
use super::problem::Problem;
use crate::jobs::{Job, JobId};

pub(super) use self::create::{accept, by_version as create_by_version};
pub(super) use self::headers::{object, value, webhook};
pub(super) use self::input::shown;
pub(super) use self::prediction::{prediction, status, time};
pub(super) use self::schema::Served;

const PAGE: i64 = 100;

type Answer = Result<Response, Problem>;

/// All but the creation by version, whose address others share.
pub(super) fn router() -> Router<Arc<Server>> {
    Router::new()
        .route("/predictions/{id}/cancel", post(cancel))
        .route("/models/{owner}/{name}/predictions", post(create::by_model))
        .route("/models/{owner}/{name}/versions/{id}/trainings", post(unsupported))
        .route("/trainings", get(none).post(unsupported))
        .merge(deployments::router())
        .route("/collections", get(none))
        .route("/hardware", get(|| async { Json(json!([{ "name": "this machine", "sku": "local" }])) }))
        .route("/account", get(account))
        .route("/webhooks/default/secret", get(webhook_secret))
        .merge(files::router())
        .merge(models::router())
        .route("/files/{id}/stream", get(stream::stream))
}

pub(super) fn by_version() -> Router<Arc<Server>> {
    Router::new().route("/predictions", get(list).post(create::by_version)).route("/predictions/{id}", get(show))
}

async fn unsupported() -> Problem {
    Problem::Unsupported("This server does not train; it generates.")
}

async fn none() -> Response {
    Json(json!({ "next": null, "previous": null, "results": [] })).into_response()
}

async fn account(caller: Caller) -> Response {
    let name = &caller.tenant;
    Json(json!({ "type": "organization", "username": name, "name": name, "github_url": null, "avatar_url": null }))
        .into_response()
}

async fn webhook_secret(State(server): State<Arc<Server>>, caller: Caller) -> Response {
    Json(json!({ "key": server.webhook_secret(&caller.tenant) })).into_response()
}

pub(super) async fn show(
    State(server): State<Arc<Server>>,
    caller: Caller,
    headers: HeaderMap,
    Path(id): Path<String>,
) -> Answer {
    let job = find(&server, &caller, &id).await?;
    answer(&server, &headers, &job).await
}

async fn cancel(State(server): State<Arc<Server>>, caller: Caller, headers: HeaderMap, Path(id): Path<String>) -> Answer {
    // Cog's clients name their predictions themselves, and their names may look like ours.
    let id = match super::cog::named(&server, &caller, &id).await {
        Ok(job) => job.id,
        Err(Problem::NotFound) => id.parse::<JobId>().map_err(|()| Problem::NotFound)?,
        Err(problem) => return Err(problem),
    };
    let job = server.store.cancel(&caller.tenant, &id).await?.ok_or(Problem::NotFound)?;
    if job.status.is_final() {
        server.waiters.ended(&job.id);
        server.ended.notify_one();
        if job.started_at.is_none() {
            // No worker tells of it.
            server.meters.ended(&job);
        }
    }
    answer(&server, &headers, &job).await
}

async fn answer(server: &Server, headers: &HeaderMap, job: &Job) -> Answer {
    let base = server.base(headers);
    Ok(Json(prediction(server, &base, job, server.gives_links(&base)).await?).into_response())
}

#[derive(Debug, Deserialize)]
pub(super) struct Page {
    cursor: Option<String>,
    created_after: Option<String>,
    created_before: Option<String>,
}

impl<S: Send + Sync> FromRequestParts<S> for Page {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let query = Query::<Self>::from_request_parts(parts, state).await;
        query.map(|Query(page)| page).map_err(|_| Problem::invalid("invalid", "", "the query cannot be read"))
    }
}

impl Page {
    fn cursor(&self) -> Result<Option<JobId>, Problem> {
        let wrong = |()| Problem::invalid("invalid", "cursor", "is none that this server gave");
        self.cursor.as_ref().map(|cursor| cursor.parse().map_err(wrong)).transpose()
    }

    /// From the first time on, up to the second.
    fn made(&self) -> Result<Range<i64>, Problem> {
        let from = moment("created_after", self.created_after.as_deref())?;
        let to = moment("created_before", self.created_before.as_deref())?;
        Ok(from.unwrap_or(i64::MIN)..to.unwrap_or(i64::MAX))
    }

    /// The query of the next page, which goes on from `last`.
    fn next(&self, last: &JobId) -> String {
        let mut query = url::form_urlencoded::Serializer::new(String::new());
        query.append_pair("cursor", last.as_str());
        for (name, value) in [("created_after", &self.created_after), ("created_before", &self.created_before)] {
            query.extend_pairs(value.iter().map(|value| (name, value)));
        }
        query.finish()
    }
}

/// A time of a query in milliseconds since 1970.
fn moment(field: &str, text: Option<&str>) -> Result<Option<i64>, Problem> {
    let Some(text) = text else { return Ok(None) };
    let time = chrono::DateTime::parse_from_rfc3339(text);
    let time = time.map_err(|_| Problem::invalid("invalid", field, "must be a time such as 2026-01-31T12:00:00Z"))?;
    Ok(Some(time.timestamp_millis()))
}

pub(super) async fn list(State(server): State<Arc<Server>>, caller: Caller, headers: HeaderMap, page: Page) -> Answer {
    let mut jobs = server.store.list(&caller.tenant, page.made()?, page.cursor()?.as_ref(), PAGE + 1).await?;
    let more = jobs.len() > PAGE as usize;
    jobs.truncate(PAGE as usize);
    let base = server.base(&headers);
    let next = jobs.last().filter(|_| more).map(|last| format!("{base}/v1/predictions?{}", page.next(&last.id)));
    let mut results = Vec::new();
    for job in &jobs {
        // A hundred pictures would be too much: links here, whatever is set.
        results.push(prediction(&server, &base, job, true).await?);
    }
    Ok(Json(json!({ "next": next, "previous": null, "results": results })).into_response())
}

pub(super) async fn find(server: &Server, caller: &Caller, id: &str) -> Result<Job, Problem> {
    let id: JobId = id.parse().map_err(|()| Problem::NotFound)?;
    server.store.get(&caller.tenant, &id).await?.ok_or(Problem::NotFound)
}
