//! Our own addresses, for what the other dialects lack: a job's place in the queue, its progress as it comes, previews.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::sse::Event;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::time::timeout;

use super::auth::Caller;
use super::openai::Request;
use super::outputs::{file, names};
use super::problem::{Body, Problem};
use super::stream::{self, Tell};
use super::wait::ANSWER;
use super::{Server, replicate};
use crate::fetch::CacheView;
use crate::jobs::{Job, Status};
use crate::ops::serve::preview;

type Answer = Result<Response, Problem>;

pub(super) fn router() -> Router<Arc<Server>> {
    Router::new()
        .route("/darkroom/openapi.json", get(|| async { Json(super::openapi::document()) }))
        .route("/darkroom/queue", get(queue))
        .route("/darkroom/loras", get(loras))
        .route("/darkroom/loras/{digest}", axum::routing::delete(forget))
        .route("/darkroom/jobs", post(create))
        .route("/darkroom/jobs/{id}", get(show))
        .route("/darkroom/jobs/{id}/events", get(events))
        .route("/darkroom/jobs/{id}/preview", get(picture))
}

/// Of all tenants together: numbers only.
async fn queue(State(server): State<Arc<Server>>, _: Caller) -> Answer {
    let waiting = server.store.waiting().await?;
    let pace = server.pace.load(Ordering::Relaxed) as f64 / 1000.0;
    let queue = json!({
        "queued": waiting.queued,
        "running": waiting.running,
        "seconds_per_job": pace,
        "seconds_of_work": waiting.queued as f64 * pace / server.units.len() as f64,
    });
    Ok(Json(queue).into_response())
}

fn cache<'a>(server: &'a Server, caller: &Caller) -> Result<&'a CacheView, Problem> {
    if !caller.admin {
        return Err(Problem::Forbidden("The cache is for admin keys."));
    }
    server.loras.as_ref().ok_or(Problem::NotFound)
}

/// Fetched LoRAs that are kept, the most recently used first: of all tenants, and so without where they came from.
async fn loras(State(server): State<Arc<Server>>, caller: Caller) -> Answer {
    let cached = cache(&server, &caller)?.list();
    let time = |time: std::time::SystemTime| chrono::DateTime::<chrono::Utc>::from(time).to_rfc3339();
    let total: u64 = cached.iter().map(|file| file.bytes).sum();
    let files: Vec<Value> = cached
        .iter()
        .rev()
        .map(|file| json!({ "sha256": file.digest, "bytes": file.bytes, "used_at": time(file.used) }))
        .collect();
    Ok(Json(json!({ "bytes": total, "loras": files })).into_response())
}

/// Whoever asks for it again fetches it again.
async fn forget(State(server): State<Arc<Server>>, caller: Caller, Path(digest): Path<String>) -> Answer {
    match cache(&server, &caller)?.remove(&digest) {
        None => Err(Problem::NotFound),
        Some(true) => Ok(StatusCode::NO_CONTENT.into_response()),
        Some(false) => Err(Problem::invalid("invalid", "", "a job uses it now; try again later")),
    }
}

/// The keys of OpenAI's generations, with `loras`, `seed` and the like. Answers at once.
async fn create(State(server): State<Arc<Server>>, caller: Caller, headers: HeaderMap, Body(body, held): Body) -> Answer {
    let request = Request::new(replicate::object(&headers, &body)?, held)?;
    let submission = request.submission(&server, &caller, &headers).await?;
    let unit = server.unit(request.served.is_dev()).clone();
    let (job, _) = server.submit(&caller, &unit, &headers, submission).await?;
    Ok((StatusCode::ACCEPTED, Json(describe(&server, &server.base(&headers), &job).await)).into_response())
}

async fn show(State(server): State<Arc<Server>>, caller: Caller, headers: HeaderMap, Path(id): Path<String>) -> Answer {
    let job = replicate::find(&server, &caller, &id).await?;
    Ok(Json(describe(&server, &server.base(&headers), &job).await).into_response())
}

async fn describe(server: &Server, base: &str, job: &Job) -> Value {
    let id = &job.id;
    let links = |names: Vec<String>| names.iter().map(|name| server.link(base, job, name)).collect::<Vec<_>>();
    let mut job_now = json!({
        "id": id.as_str(),
        "status": job.status.as_str(),
        "progress": job.progress,
        "created_at": replicate::time(job.created_at),
        "started_at": job.started_at.map(replicate::time),
        "completed_at": job.completed_at.map(replicate::time),
        "pictures": names(job).map(links),
        "result": job.result,
        "error": job.error.as_ref().map(|message| json!({ "code": job.error_code, "message": message })),
        "urls": {
            "get": format!("{base}/darkroom/jobs/{id}"),
            "events": format!("{base}/darkroom/jobs/{id}/events"),
            "preview": format!("{base}/darkroom/jobs/{id}/preview"),
            "cancel": format!("{base}/v1/predictions/{id}/cancel"),
        },
    });
    if job.status == Status::Queued {
        // Known or not: the job was accepted, and whoever is told to send it again, or nothing for long, gets a second one.
        match timeout(ANSWER, server.store.ahead(id)).await {
            Ok(Ok(ahead)) => job_now["ahead"] = json!(ahead),
            Ok(Err(error)) => tracing::warn!(job = %id, %error, "how many are before a job is not known"),
            Err(_) => tracing::warn!(job = %id, "how many are before a job is not known in time"),
        }
    }
    job_now
}

/// The newest preview, if the job was created with `"stream": true` and has begun.
async fn picture(State(server): State<Arc<Server>>, caller: Caller, Path(id): Path<String>) -> Answer {
    let job = replicate::find(&server, &caller, &id).await?;
    let bytes = server.blobs.get(&preview(job.id.as_str())).await?.ok_or(Problem::NotFound)?;
    Ok(file("image/webp", bytes))
}

struct Watched {
    base: String,
    last: Option<String>,
}

/// `progress` whenever it changes (with `previews`, counting), `done` at the end: each the whole job. `error` if there is no end.
async fn events(State(server): State<Arc<Server>>, caller: Caller, headers: HeaderMap, Path(id): Path<String>) -> Answer {
    let job = replicate::find(&server, &caller, &id).await?;
    let watched = Watched { base: server.base(&headers), last: None };
    Ok(stream::events(server, job, watched))
}

impl Tell for Watched {
    async fn news(&mut self, server: &Server, job: &Job) -> Vec<Event> {
        let now = describe(server, &self.base, job).await;
        // Links are signed anew each time and are no news.
        let state = format!("{}{}{}", now["status"], now["progress"], now["ahead"]);
        if !job.status.is_final() && self.last.as_ref() == Some(&state) {
            return Vec::new();
        }
        self.last = Some(state);
        let name = if job.status.is_final() { "done" } else { "progress" };
        vec![Event::default().event(name).data(now.to_string())]
    }

    fn problem(&self, problem: Problem) -> Vec<Event> {
        vec![Event::default().event("error").data(problem.replicate().to_string())]
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use sqlx::Executor;

    use super::*;
    use crate::api::Keep;
    use crate::api::stream::said;
    use crate::blobs::Blobs;
    use crate::jobs::NewJob;

    #[tokio::test]
    async fn a_job_is_described_while_the_database_fails() {
        let folder = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(folder.path().join("files").to_str().unwrap(), &[]).unwrap();
        let server = Server::for_tests(folder.path(), blobs, Keep::default()).await;
        let (job, _) = server.store.submit(&NewJob::for_tests()).await.unwrap();
        assert_eq!(describe(&server, "", &job).await["ahead"], 0);
        let database = sqlx::AnyPool::connect(&format!("sqlite:{}", folder.path().join("jobs.db").display())).await.unwrap();
        database.execute("ALTER TABLE jobs RENAME TO jobs_away").await.unwrap();
        let now = describe(&server, "", &job).await;
        assert_eq!((now["id"].as_str(), &now["ahead"]), (Some(job.id.as_str()), &Value::Null));
    }

    #[tokio::test]
    async fn a_job_is_described_while_the_database_hangs() {
        let folder = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(folder.path().join("files").to_str().unwrap(), &[]).unwrap();
        let server = Server::for_tests(folder.path(), blobs, Keep::default()).await;
        let (job, _) = server.store.submit(&NewJob::for_tests()).await.unwrap();
        let database = sqlx::AnyPool::connect(&format!("sqlite:{}", folder.path().join("jobs.db").display())).await.unwrap();
        let writing = database.begin_with("BEGIN IMMEDIATE").await.unwrap();
        // They wait for it with all connections that there are.
        for _ in 0..16 {
            let store = server.store.clone();
            tokio::spawn(async move { store.abandon("nobody").await });
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
        let begun = Instant::now();
        let now = describe(&server, "", &job).await;
        assert_eq!((now["id"].as_str(), &now["ahead"]), (Some(job.id.as_str()), &Value::Null));
        assert!(begun.elapsed() < 2 * ANSWER, "{:?}", begun.elapsed());
        writing.rollback().await.unwrap();
    }

    #[tokio::test]
    async fn a_stream_ends_if_its_job_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(folder.path().join("files").to_str().unwrap(), &[]).unwrap();
        let server = Server::for_tests(folder.path(), blobs, Keep::default()).await;
        let job = server.gone_for_tests().await;
        let said = said(stream::events(server, job, Watched { base: String::new(), last: None })).await;
        let error = said.find("event: error\n").expect(&said);
        assert!(said.starts_with("event: progress\n") && said[error..].contains("404"), "{said}");
    }
}
