//! OpenAI's Images API: generations and edits, with partial pictures as they come. LoRAs, seed and the like are further keys.

mod request;

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::HeaderMap;
use axum::response::sse::Event;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};

pub(super) use self::request::Request;
use super::auth::Caller;
use super::bodies::in_time;
use super::outputs::{READING, names, patiently};
use super::problem::{Body, Form, OpenAi, Problem};
use super::stream::{self, Tell};
use super::submit::{Submission, base64, fingerprint};
use super::wait::ANSWER;
use super::{Server, replicate};
use crate::jobs::{Job, Status};
use crate::ops::serve::preview;

/// Longest that an answer is held; clients wait ten minutes.
const LONGEST: Duration = Duration::from_secs(600);

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
    let (job, _) = server.submit(&caller, &unit, &headers, submission).await?;
    request.accepted();
    if request.stream {
        return Ok(stream::events(server, job, Streamed { request, sent: 0, seen: 0 }));
    }
    held(&server, &headers, job, &request).await
}

/// The answer once the job has ended.
async fn held(server: &Server, headers: &HeaderMap, mut job: Job, request: &Request) -> Answer {
    let until = Instant::now() + LONGEST;
    if !server.wait(&mut job, LONGEST).await {
        return Err(Problem::NotFound.into());
    }
    let data = patiently(&job.id, until, || pictures(server, headers, &job, request.links)).await?;
    Ok(Json(finished(&job, request, &data)).into_response())
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
    for name in names(job).ok_or(Problem::NotFound)? {
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

/// Partial pictures from latents, at most as many as were asked for, and the finished ones.
struct Streamed {
    request: Request,
    /// Partial pictures that were sent.
    sent: u64,
    seen: u64,
}

impl Tell for Streamed {
    async fn news(&mut self, server: &Server, job: &Job) -> Vec<Event> {
        let shown = job.progress.as_ref().and_then(|progress| progress["previews"].as_u64()).unwrap_or(0);
        // A job may be done before anybody saw that there was one.
        let late = job.status == Status::Succeeded && self.sent == 0;
        let mut events = Vec::new();
        if (shown > self.seen || late) && self.sent < self.request.partial_images {
            self.seen = shown;
            events.extend(self.partial(server, job).await);
        }
        if job.status.is_final() {
            events.extend(self.end(server, job).await);
        }
        events
    }

    /// Clients raise what they find under `error`.
    fn problem(&self, problem: Problem) -> Vec<Event> {
        vec![Event::default().event("error").data(OpenAi(problem).body().to_string())]
    }
}

impl Streamed {
    /// The newest preview. Nobody waits for storage because of it.
    async fn partial(&mut self, server: &Server, job: &Job) -> Option<Event> {
        let picture = timeout(ANSWER, server.blobs.get(&preview(job.id.as_str()))).await.ok()?.ok()??;
        let mut event = self.describe(job, "partial_image", &base64(&picture), "webp");
        event["partial_image_index"] = json!(self.sent);
        self.sent += 1;
        Some(named(&event))
    }

    async fn end(&self, server: &Server, job: &Job) -> Vec<Event> {
        let headers = HeaderMap::new();
        match patiently(&job.id, Instant::now() + READING, || pictures(server, &headers, job, false)).await {
            Ok(pictures) => {
                let completed = |picture: &Value| {
                    let text = picture["b64_json"].as_str().unwrap_or_default();
                    let mut event = self.describe(job, "completed", text, &self.request.format);
                    event["usage"] = finished(job, &self.request, &[])["usage"].clone();
                    named(&event)
                };
                pictures.iter().map(completed).collect()
            }
            Err(problem) => self.problem(problem),
        }
    }

    fn describe(&self, job: &Job, what: &str, picture: &str, format: &str) -> Value {
        let family = if self.request.edit { "image_edit" } else { "image_generation" };
        let order = &job.request["order"]["size"];
        let size = order.as_array().map_or_else(|| "auto".to_owned(), |size| format!("{}x{}", size[0], size[1]));
        json!({
            "type": format!("{family}.{what}"),
            "b64_json": picture,
            "created_at": job.created_at / 1000,
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

/// What of a request tells it from others, for its idempotency key.
fn idempotency(headers: &HeaderMap, body: &serde_json::Map<String, Value>) -> Option<(String, String)> {
    let key = headers.get("idempotency-key")?.to_str().ok()?;
    // The body names the model.
    Some((format!("openai:{key}"), fingerprint("", body)))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::Map;

    use super::*;
    use crate::api::Keep;
    use crate::api::bodies::Held;
    use crate::api::stream::said;
    use crate::blobs::Blobs;
    use crate::ops::serve::outputs;

    async fn server(folder: &Path) -> Arc<Server> {
        let blobs = Blobs::open(folder.join("files").to_str().unwrap(), &[]).unwrap();
        Server::for_tests(folder, blobs, Keep::default()).await
    }

    fn request() -> Request {
        let body = Map::from_iter([("prompt".to_owned(), json!("a cat"))]);
        Request::new(body, Arc::new(Held::of("me"))).unwrap()
    }

    #[tokio::test]
    async fn a_stream_ends_if_its_job_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let server = server(folder.path()).await;
        let job = server.gone_for_tests().await;
        let said = said(stream::events(server, job, Streamed { request: request(), sent: 0, seen: 0 })).await;
        assert!(said.starts_with("event: error\n") && said.contains("not_found"), "{said}");
    }

    #[tokio::test]
    async fn who_sees_a_job_only_when_it_is_done_still_gets_a_partial_picture() {
        let folder = tempfile::tempdir().unwrap();
        let server = server(folder.path()).await;
        let job = server.ended_for_tests().await;
        server.blobs.put(&format!("{}/0.png", outputs(job.id.as_str())), vec![1]).await.unwrap();
        server.blobs.put(&preview(job.id.as_str()), vec![2]).await.unwrap();
        let said_of = |partial_images| {
            let mut request = request();
            request.partial_images = partial_images;
            said(stream::events(server.clone(), job.clone(), Streamed { request, sent: 0, seen: 0 }))
        };
        let names = |said: String| -> Vec<String> {
            said.lines().filter_map(|line| line.strip_prefix("event: image_generation.").map(str::to_owned)).collect()
        };
        assert_eq!(names(said_of(2).await), ["partial_image", "completed"]);
        assert_eq!(names(said_of(0).await), ["completed"]);
    }

    #[tokio::test]
    async fn storage_that_fails_when_a_job_is_done_is_asked_again() {
        let folder = tempfile::tempdir().unwrap();
        let server = server(folder.path()).await;
        let job = server.ended_for_tests().await;
        let key = format!("{}/0.png", outputs(job.id.as_str()));
        let path = folder.path().join("files").join(&key);
        // Nobody can follow a link to itself, and what is put in its place is there at once.
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(&path, &path).unwrap();
        let (headers, request) = (HeaderMap::new(), request());
        let back = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            server.blobs.put(&key, vec![1, 2, 3]).await.unwrap();
        };
        let (answer, ()) = tokio::join!(held(&server, &headers, job.clone(), &request), back);
        let body = axum::body::to_bytes(answer.unwrap().into_body(), usize::MAX).await.unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&body).unwrap()["data"][0]["b64_json"], "AQID");
    }
}
