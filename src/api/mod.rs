//! The HTTP service: faces of [`ops`](crate::ops) in the words of others.

mod accept;
mod replicate;
mod supervise;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::{DefaultBodyLimit, Path, Query, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, HOST, X_CONTENT_TYPE_OPTIONS};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use hmac::{Hmac, KeyInit, Mac};
use serde::Deserialize;
use serde_json::json;
use sha2::Sha256;
use tokio::net::TcpListener;

use crate::hex::{hex, unhex};
use crate::jobs::{JobId, Store};
use crate::ops::models::Model;
use crate::ops::serve::outputs;

pub(crate) use supervise::READY;
pub use supervise::Worker;

/// A request's body with a picture in it.
const MOST_BODY: usize = 20 << 20;

/// How long a link to a picture works.
const LINK_LIVES: Duration = Duration::from_secs(3600);

/// How pictures are given to clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Files {
    /// Links over https, the pictures themselves over http: clients wrap only `https:` and `data:` as files.
    Auto,
    Links,
    Data,
}

/// What every request needs.
#[derive(Debug)]
pub struct Server {
    pub store: Store,
    /// The model that the worker runs.
    pub model: Model,
    pub data: PathBuf,
    /// As clients reach us, if that is not what their requests say.
    pub public_url: Option<String>,
    pub files: Files,
    /// Signs links; of this data folder.
    pub secret: [u8; 32],
    /// The worker has its model.
    pub ready: AtomicBool,
    /// No new jobs: the service ends.
    pub draining: AtomicBool,
}

impl Server {
    /// Where the client reached us, without a slash at the end.
    fn base(&self, headers: &HeaderMap) -> String {
        if let Some(url) = &self.public_url {
            return url.trim_end_matches('/').into();
        }
        let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let scheme = header("x-forwarded-proto").filter(|scheme| *scheme == "https").unwrap_or("http");
        let host = header("x-forwarded-host").or_else(|| header(HOST.as_str())).unwrap_or("127.0.0.1");
        format!("{scheme}://{host}")
    }

    fn links(&self, base: &str) -> bool {
        match self.files {
            Files::Auto => base.starts_with("https:"),
            Files::Links => true,
            Files::Data => false,
        }
    }

    /// Signature and expiry of a link to a picture.
    fn sign(&self, job: &str, name: &str) -> String {
        let expires = now() + LINK_LIVES.as_secs();
        format!("{}&expires={expires}", hex(&self.mac(job, name, expires).finalize().into_bytes()))
    }

    fn mac(&self, job: &str, name: &str, expires: u64) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.secret).expect("any length is a key");
        mac.update(format!("{job}\n{name}\n{expires}").as_bytes());
        mac
    }

    fn accepting(&self) -> Result<(), replicate::Problem> {
        if self.draining.load(Ordering::SeqCst) {
            Err(replicate::Problem::Unavailable("The server is stopping.", 30))
        } else {
            Ok(())
        }
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The MIME type of a picture's name.
fn media_type(name: &str) -> &'static str {
    match name.rsplit_once('.').map(|(_, end)| end) {
        Some("webp") => "image/webp",
        Some("jpg") => "image/jpeg",
        Some("png") => "image/png",
        _ => "application/octet-stream",
    }
}

/// Everything under one address. Clients disagree on whether the base has `/v1`, so it works with none, one and two.
pub fn router(server: Arc<Server>) -> Router {
    let replicate = replicate::router();
    Router::new()
        .route("/health/live", get(|| async { Json(json!({ "status": "alive" })) }))
        .route("/health/ready", get(ready))
        .route("/outputs/{job}/{name}", get(picture))
        .merge(replicate.clone())
        .nest("/v1", replicate.clone())
        .nest("/v1/v1", replicate)
        .fallback(replicate::not_found)
        .layer(DefaultBodyLimit::max(MOST_BODY))
        .with_state(server)
}

async fn ready(State(server): State<Arc<Server>>) -> Response {
    let (ready, draining) = (server.ready.load(Ordering::SeqCst), server.draining.load(Ordering::SeqCst));
    let code = if ready && !draining { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let why = if draining {
        "stopping"
    } else if ready {
        "ready"
    } else {
        "the worker has no model yet"
    };
    (code, Json(json!({ "status": why, "model": server.model.name }))).into_response()
}

#[derive(Debug, Deserialize)]
struct Signed {
    #[serde(default)]
    signature: String,
    #[serde(default)]
    expires: String,
}

/// A picture. The link's signature is the permission: clients send no token here.
async fn picture(
    State(server): State<Arc<Server>>,
    Path((job, name)): Path<(String, String)>,
    Query(signed): Query<Signed>,
) -> Response {
    let expires: u64 = signed.expires.parse().unwrap_or(0);
    let signature = unhex(&signed.signature).unwrap_or_default();
    // In constant time.
    let permitted = expires >= now() && server.mac(&job, &name, expires).verify_slice(&signature).is_ok();
    // Signed names are ours; both are checked all the same before they become a path.
    let plain = job.parse::<JobId>().is_ok() && !name.contains(['/', '\\']) && !name.contains("..");
    if !permitted || !plain {
        return replicate::not_found().await;
    }
    match tokio::task::spawn_blocking(move || std::fs::read(outputs(&server.data, &job).join(&name)).map(|bytes| (bytes, name)))
        .await
    {
        Ok(Ok((bytes, name))) => {
            let headers = [
                (CONTENT_TYPE, media_type(&name)),
                (X_CONTENT_TYPE_OPTIONS, "nosniff"),
                (CACHE_CONTROL, "private, max-age=3600"),
            ];
            (headers, bytes).into_response()
        }
        _ => replicate::not_found().await,
    }
}

/// Serves until `stop` resolves; then lets open requests end.
pub async fn serve(server: Arc<Server>, listener: TcpListener, stop: impl Future<Output = ()>) -> std::io::Result<SocketAddr> {
    let address = listener.local_addr()?;
    accept::serve(listener, router(server.clone()), async {
        stop.await;
        server.draining.store(true, Ordering::SeqCst);
    })
    .await;
    Ok(address)
}
