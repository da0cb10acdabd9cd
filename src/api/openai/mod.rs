//! OpenAI's Images API: generations and edits, with partial pictures as they come. LoRAs, seed and the like are further keys.

mod request;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::HeaderMap;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::stream::{self, StreamExt};
use serde_json::{Value, json};

pub(super) use self::request::Request;
use super::auth::Caller;
use super::bodies::in_time;
use super::outputs::names;
use super::problem::{Body, Form, OpenAi, Problem};
use super::submit::{Submission, base64, fingerprint};
use super::wait::COMMENT;
use super::{Server, replicate};
use crate::jobs::{Job, Status};
use crate::ops::serve::preview;

/// Longest that an answer is held; clients wait ten minutes.
const LONGEST: Duration = Duration::from_secs(600);

/// How often a streamed job is looked at.
const LOOK: Duration = Duration::from_millis(200);

type Answer = Result<Response, OpenAi>;

pub(super) fn router() -> Router<Arc<Server>> {
    Router::new()
        .route("/images/generations", post(generate))
        .route("/images/edits", post(edit))
        .route("/images/variations", post(|| async { OpenAi(Problem::Unsupported("Use /images/edits with a prompt.")) }))
        .route("/models/{name}", get(one_model))
}

/// A model as OpenAI lists it.
pub(super) fn model(name: &str, owner: &str) -> Value {
    json!({ "id": name, "object": "model", "created": 1_722_470_400, "owned_by": owner })
}

async fn one_model(Path(name): Path<String>) -> Answer {
    let served = request::served(Some(&name)).ok_or(Problem::NotFound)?;
    Ok(Json(model(served.name, served.owner)).into_response())
}

async fn generate(State(server): State<Arc<Server>>, caller: Caller, headers: HeaderMap, body: Result<Body, Problem>) -> Answer {
    let Body(sent, held) = body?;
    let body = replicate::object(&headers, &sent)?;
    drop(sent);
    answer(server, caller, headers, Request::new(body, held)?).await
}

async fn edit(State(server): State<Arc<Server>>, caller: Caller, headers: HeaderMap, form: Result<Form, Problem>) -> Answer {
    let request = in_time(Request::of_form(form?.0, &caller.tenant)).await?;
    answer(server, caller, headers, request).await
}

async fn answer(server: Arc<Server>, caller: Caller, headers: HeaderMap, mut request: Request) -> Answer {
    let submission = request.submission(&server, &caller, &headers).await?;
    let unit = server.unit(request.served.is_dev()).clone();
    let (mut job, _) = server.submit(&caller, &unit, &headers, submission).await?;
    request.accepted();
    if request.stream {
        return Ok(streamed(server, job, request).into_response());
    }
    if !server.wait(&mut job, LONGEST).await {
        return Err(Problem::NotFound.into());
    }
    let data = pictures(&server, &headers, &job, request.links).await?;
    Ok(Json(finished(&job, &request, &data)).into_response())
}

/// The pictures of a job that has ended well.
async fn pictures(server: &Server, headers: &HeaderMap, job: &Job, links: bool) -> Result<Vec<Value>, Problem> {
    match job.status {
        Status::Succeeded => {}
        Status::Failed => {
            let message = job.error.clone().unwrap_or_default();
            return Err(Problem::Failed(job.error_code.clone().unwrap_or_default(), message));
        }
        Status::Canceled | Status::Aborted => return Err(Problem::Failed("canceled".into(), "The job was canceled.".into())),
        Status::Queued | Status::Running => {
            // Asked again it would be a second job.
            let message = format!("The job {} has not ended in ten minutes; it goes on: GET /darkroom/jobs/{}", job.id, job.id);
            return Err(Problem::Failed("timeout".into(), message));
        }
    }
    let base = server.base(headers);
    let mut data = Vec::new();
    for name in names(job).unwrap_or_default() {
        if links {
            data.push(json!({ "url": server.link(&base, job, &name) }));
        } else {
            let bytes = server.picture(&job.id, &name).await?.ok_or(Problem::NotFound)?;
            data.push(json!({ "b64_json": base64(&bytes) }));
        }
    }
    Ok(data)
}

fn finished(job: &Job, request: &Request, data: &[Value]) -> Value {
    let result = job.result.clone().unwrap_or_default();
    json!({
        "created": job.created_at / 1000,
        "data": data,
        "output_format": request.format,
        "size": format!("{}x{}", result["width"], result["height"]),
        "quality": "auto",
        "background": "opaque",
        "usage": {
            "input_tokens": 0,
            "input_tokens_details": { "text_tokens": 0, "image_tokens": 0 },
            "output_tokens": 0,
            "total_tokens": 0,
        },
        // Ours: what made the picture.
        "darkroom": {
            "job": job.id.as_str(),
            "seed": result["seed"],
            "loras": result["loras"],
            "lora_used": result["lora_used"],
            "timings": result["timings"],
        },
    })
}

struct Streamed {
    job: Job,
    request: Request,
    /// Partial pictures that were sent.
    sent: u64,
    seen: u64,
    over: bool,
}

/// Partial pictures from latents, at most as many as were asked for, and the finished ones.
fn streamed(server: Arc<Server>, job: Job, request: Request) -> Sse<impl futures_util::Stream<Item = Result<Event, Infallible>>> {
    let state = Streamed { job, request, sent: 0, seen: 0, over: false };
    let events = stream::unfold((server, state), |(server, mut state)| async move {
        while !state.over {
            let events = state.next(&server).await;
            if !events.is_empty() {
                return Some((stream::iter(events.into_iter().map(Ok)), (server, state)));
            }
        }
        None
    });
    Sse::new(events.flatten()).keep_alive(KeepAlive::new().interval(COMMENT))
}

impl Streamed {
    async fn next(&mut self, server: &Server) -> Vec<Event> {
        if !server.wait(&mut self.job, LOOK).await {
            self.over = true;
            return vec![failed(Problem::NotFound)];
        }
        if self.job.status.is_final() {
            self.over = true;
            return self.end(server).await;
        }
        let shown = self.job.progress.as_ref().and_then(|progress| progress["previews"].as_u64()).unwrap_or(0);
        if shown <= self.seen || self.sent >= self.request.partial_images {
            return Vec::new();
        }
        self.seen = shown;
        let Ok(Some(picture)) = server.blobs.get(&preview(self.job.id.as_str())).await else { return Vec::new() };
        let mut event = self.describe("partial_image", &base64(&picture), "webp");
        event["partial_image_index"] = json!(self.sent);
        self.sent += 1;
        vec![named(&event)]
    }

    async fn end(&self, server: &Server) -> Vec<Event> {
        match pictures(server, &HeaderMap::new(), &self.job, false).await {
            Ok(pictures) => {
                let completed = |picture: &Value| {
                    let text = picture["b64_json"].as_str().unwrap_or_default();
                    let mut event = self.describe("completed", text, &self.request.format);
                    event["usage"] = finished(&self.job, &self.request, &[])["usage"].clone();
                    named(&event)
                };
                pictures.iter().map(completed).collect()
            }
            Err(problem) => vec![failed(problem)],
        }
    }

    fn describe(&self, what: &str, picture: &str, format: &str) -> Value {
        let family = if self.request.edit { "image_edit" } else { "image_generation" };
        let order = &self.job.request["order"]["size"];
        let size = order.as_array().map_or_else(|| "auto".to_owned(), |size| format!("{}x{}", size[0], size[1]));
        json!({
            "type": format!("{family}.{what}"),
            "b64_json": picture,
            "created_at": self.job.created_at / 1000,
            "size": size,
            "quality": "auto",
            "background": "opaque",
            "output_format": format,
        })
    }
}

fn named(event: &Value) -> Event {
    Event::default().event(event["type"].as_str().unwrap_or_default()).data(event.to_string())
}

/// Clients raise what they find under `error`.
fn failed(problem: Problem) -> Event {
    Event::default().event("error").data(OpenAi(problem).body().to_string())
}

/// What of a request tells it from others, for its idempotency key.
fn idempotency(headers: &HeaderMap, body: &serde_json::Map<String, Value>) -> Option<(String, String)> {
    let key = headers.get("idempotency-key")?.to_str().ok()?;
    // The body names the model.
    Some((format!("openai:{key}"), fingerprint("", body)))
}

#[cfg(test)]
mod tests {
    use serde_json::Map;
    use sqlx::Executor;

    use super::*;
    use crate::api::Keep;
    use crate::api::bodies::Held;
    use crate::blobs::Blobs;
    use crate::jobs::NewJob;

    #[tokio::test]
    async fn a_stream_ends_if_its_job_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(folder.path().join("files").to_str().unwrap(), &[]).unwrap();
        let server = Server::for_tests(folder.path(), blobs, Keep::default()).await;
        let (job, _) = server.store.submit(&NewJob::for_tests()).await.unwrap();
        let body = Map::from_iter([("prompt".to_owned(), json!("a cat"))]);
        let request = Request::new(body, Arc::new(Held::of("me"))).unwrap();
        let database = sqlx::AnyPool::connect(&format!("sqlite:{}", folder.path().join("jobs.db").display())).await.unwrap();
        database.execute("DELETE FROM jobs").await.unwrap();
        let sent = axum::body::to_bytes(streamed(server, job, request).into_response().into_body(), usize::MAX);
        let sent = tokio::time::timeout(LOOK * 20, sent).await.expect("it ends").unwrap();
        let sent = String::from_utf8_lossy(&sent);
        assert!(sent.starts_with("event: error\n") && sent.contains("not_found"), "{sent}");
    }
}
