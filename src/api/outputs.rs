//! Pictures for clients: links that are their own permission, or the pictures themselves.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::{Path, Query, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use tokio::time::{Instant, sleep, timeout_at};

use super::Server;
use super::problem::{Problem, not_found};
use super::wait::ANSWER;
use crate::jobs::{Job, JobId};
use crate::ops::serve::outputs;

/// How long a link works.
const LIVES: Duration = Duration::from_secs(3600);

/// Longest that storage is asked for the pictures of a job that was waited for,
pub(super) const READING: Duration = Duration::from_secs(10);

/// and the pause before it is asked again.
const AGAIN: Duration = Duration::from_millis(500);

/// How pictures are given to clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Files {
    /// Links over https, the pictures themselves over http: clients wrap only `https:` and `data:` as files.
    Auto,
    Links,
    Data,
}

/// A link's query.
#[derive(Debug, Deserialize)]
pub(super) struct Signed {
    #[serde(default)]
    signature: String,
    #[serde(default)]
    expires: String,
}

impl Server {
    pub(super) fn gives_links(&self, base: &str) -> bool {
        match self.files {
            Files::Auto => base.starts_with("https:"),
            Files::Links => true,
            Files::Data => false,
        }
    }

    /// The query that permits `path` for an hour.
    pub(super) fn permit(&self, path: &str) -> String {
        let expires = now() + LIVES.as_secs();
        format!("signature={}&expires={expires}", self.secret.sign("links", &format!("{path}\n{expires}")))
    }

    /// Whether that is a link of ours whose time is not over.
    pub(super) fn permits(&self, path: &str, signed: &Signed) -> bool {
        let expires: u64 = signed.expires.parse().unwrap_or(0);
        expires >= now() && self.secret.signed("links", &format!("{path}\n{}", signed.expires), &signed.signature)
    }

    pub(super) fn link(&self, base: &str, job: &Job, name: &str) -> String {
        let path = format!("{}/{name}", job.id);
        format!("{base}/outputs/{path}?{}", self.permit(&path))
    }

    /// The picture's bytes, if it is still there.
    pub(super) async fn picture(&self, job: &JobId, name: &str) -> Result<Option<bytes::Bytes>, Problem> {
        Ok(self.blobs.get(&format!("{}/{name}", outputs(job.as_str()))).await?)
    }

    /// A job's pictures as links, or as data URIs; `None` if there are none (any more).
    pub(super) async fn pictures(&self, job: &Job, base: &str, links: bool) -> Result<Option<Vec<String>>, Problem> {
        let Some(names) = names(job) else { return Ok(None) };
        let mut pictures = Vec::new();
        for name in names {
            if links {
                pictures.push(self.link(base, job, &name));
                continue;
            }
            let Some(bytes) = self.picture(&job.id, &name).await? else { return Ok(None) };
            pictures.push(data_uri(media_type(&name), &bytes));
        }
        Ok(Some(pictures))
    }
}

/// What needs the pictures of a job that its client waits for until `until`. Storage that fails is asked again for a while. The problem
/// then is none that clients answer by sending the job again: it is done.
pub(super) async fn patiently<T, F>(job: &JobId, until: Instant, reading: impl Fn() -> F) -> Result<T, Problem>
where
    F: Future<Output = Result<T, Problem>>,
{
    let until = (until + ANSWER).min(Instant::now() + READING);
    loop {
        match timeout_at(until, reading()).await {
            Ok(Err(Problem::Unavailable(..))) if Instant::now() + AGAIN < until => {}
            Ok(Err(Problem::Unavailable(..))) | Err(_) => {
                let message = format!("The job {job} is done, but its pictures cannot be read now: GET /darkroom/jobs/{job}");
                return Err(Problem::Failed("storage".into(), message));
            }
            Ok(read) => return read,
        }
        sleep(AGAIN).await;
    }
}

/// Names of a job's pictures.
pub(super) fn names(job: &Job) -> Option<Vec<String>> {
    let names = job.result.as_ref()?["files"].as_array()?;
    names.iter().map(|name| name.as_str().map(str::to_owned)).collect()
}

pub(super) fn data_uri(kind: &str, bytes: &[u8]) -> String {
    format!("data:{kind};base64,{}", STANDARD.encode(bytes))
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The MIME type of a picture's name.
pub(super) fn media_type(name: &str) -> &'static str {
    match name.rsplit_once('.').map(|(_, end)| end) {
        Some("webp") => "image/webp",
        Some("jpg") => "image/jpeg",
        Some("png") => "image/png",
        _ => "application/octet-stream",
    }
}

/// The link's signature is the permission: clients send no token here.
pub(super) async fn give(
    State(server): State<Arc<Server>>,
    Path((job, name)): Path<(String, String)>,
    Query(signed): Query<Signed>,
) -> Response {
    // Signed names are ours; both are checked all the same before they become a key.
    let plain = !name.contains(['/', '\\']) && !name.contains("..");
    let Ok(id) = job.parse::<JobId>() else { return not_found().await };
    if !plain || !server.permits(&format!("{job}/{name}"), &signed) {
        return not_found().await;
    }
    match server.picture(&id, &name).await {
        Ok(Some(bytes)) => file(media_type(&name), bytes),
        Ok(None) => not_found().await,
        Err(problem) => problem.into_response(),
    }
}

/// A file's answer; browsers must not guess what it is.
pub(super) fn file(kind: &str, bytes: bytes::Bytes) -> Response {
    let headers = [
        (CONTENT_TYPE, kind.to_owned()),
        (X_CONTENT_TYPE_OPTIONS, "nosniff".into()),
        (CACHE_CONTROL, "private, max-age=3600".into()),
    ];
    (headers, bytes).into_response()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::api::problem::OpenAi;

    #[tokio::test]
    async fn a_job_that_is_done_is_not_asked_for_again() {
        let (id, begun) = (JobId::new(), Instant::now());
        let away = || async { Err::<(), _>(Problem::Unavailable("It is away.", 30)) };
        let problem = patiently(&id, begun, away).await.unwrap_err();
        let silent = patiently(&id, begun, std::future::pending::<Result<(), Problem>>).await.unwrap_err();
        assert!(begun.elapsed() < READING, "no longer than the client waits");
        for problem in [problem, silent] {
            assert!(problem.detail().contains(id.as_str()), "{problem:?}");
            let answer = OpenAi(problem).into_response();
            assert_eq!((answer.status().as_u16(), answer.headers()["x-should-retry"].to_str().unwrap()), (500, "false"));
        }
    }

    #[tokio::test]
    async fn storage_that_comes_back_is_asked_again() {
        let asked = AtomicUsize::new(0);
        let reading = || async {
            match asked.fetch_add(1, Ordering::SeqCst) {
                0 | 1 => Err(Problem::Unavailable("It is away.", 30)),
                _ => Ok("a picture"),
            }
        };
        assert_eq!(patiently(&JobId::new(), Instant::now() + READING, reading).await.unwrap(), "a picture");
        let begun = Instant::now();
        let gone = patiently(&JobId::new(), begun + READING, || async { Err::<(), _>(Problem::NotFound) }).await;
        assert!(matches!(gone, Err(Problem::NotFound)) && begun.elapsed() < AGAIN, "it is not there, and will not be");
    }
}
