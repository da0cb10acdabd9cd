//! Pictures for clients: links that are their own permission, or the pictures themselves.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::{Path, Query, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::Server;
use super::problem::{Problem, not_found};
use crate::jobs::{Job, JobId};
use crate::ops::serve::outputs;

/// How long a link works.
const LIVES: Duration = Duration::from_secs(3600);

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
