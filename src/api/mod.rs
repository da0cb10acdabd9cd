//! The HTTP service: faces of [`ops`](crate::ops) in the words of others.
//!
//! A request meets, in this order: the accept loop's limits ([`accept`]), a name for the logs ([`trace`]), the key ([`auth`]), then its
//! dialect. All dialects accept work through [`submit`] and wait for it through [`wait`].

mod accept;
mod auth;
mod bodies;
mod cog;
mod deliver;
mod health;
mod keep;
mod openai;
mod openapi;
mod outputs;
mod own;
mod places;
mod problem;
mod replicate;
mod stream;
mod submit;
mod supervise;
mod tls;
mod trace;
mod wait;

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use axum::extract::DefaultBodyLimit;
use axum::http::HeaderMap;
use axum::http::header::HOST;
use axum::routing::get;
use axum::{Router, middleware};
use tokio::net::TcpListener;
use tokio::sync::{Notify, watch};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::timeout::RequestBodyTimeoutLayer;

use self::auth::Gate;
use self::health::Meters;
use self::wait::Waiters;
use crate::blobs::Blobs;
use crate::fetch::{CacheView, Web};
use crate::jobs::Store;
use crate::ops::serve::Secret;

pub use keep::Keep;
pub use outputs::Files;
pub use supervise::{Unit, Worker};
pub use tls::Tls;

/// A request's body with pictures in it, in bytes.
const MOST_BODY: usize = 32 << 20;

/// A form with a file in it, in bytes: Replicate's 100 MB, and the form's own parts.
const MOST_FORM: usize = 101 << 20;

/// Between two pieces of a body.
const BODY_IDLE: Duration = Duration::from_secs(30);

/// Where a connection comes from.
#[derive(Debug, Clone, Copy)]
struct Peer(SocketAddr);

/// How the service is set up.
#[derive(Debug, Clone)]
pub struct Options {
    pub data: PathBuf,
    /// As clients reach us, if that is not what their requests say.
    pub public_url: Option<String>,
    pub files: Files,
    /// Only this machine can connect.
    pub local: bool,
    pub https: bool,
    /// New jobs a minute for each tenant.
    pub creates: Option<NonZeroU32>,
    pub keep: Keep,
    /// Unless a request says otherwise: the base model's picture instead of a failure when a LoRA cannot be used.
    pub without_lora: bool,
    /// Heed `go_fast` of requests.
    pub go_fast: bool,
    /// Of the workers.
    pub loras: Option<CacheView>,
}

/// What every request needs.
#[derive(Debug)]
pub struct Server {
    store: Store,
    blobs: Blobs,
    secret: Secret,
    web: Web,
    /// One for each base model, the first for whatever fits none.
    units: Vec<Arc<Unit>>,
    data: PathBuf,
    public_url: Option<String>,
    files: Files,
    https: bool,
    keep: Keep,
    without_lora: bool,
    go_fast: bool,
    loras: Option<CacheView>,
    gate: Gate,
    waiters: Waiters,
    meters: Meters,
    /// Milliseconds that a job takes, and jobs that wait: lately.
    pace: AtomicU64,
    queued: AtomicU64,
    /// Something ended, or there is something to tell.
    ended: Notify,
    /// No new jobs: the service ends.
    draining: AtomicBool,
}

impl Server {
    #[must_use]
    pub fn new(store: Store, blobs: Blobs, secret: Secret, web: Web, units: Vec<Arc<Unit>>, options: Options) -> Self {
        let Options { data, public_url, files, local, https, creates, keep, without_lora, go_fast, loras } = options;
        Self {
            store,
            blobs,
            secret,
            web,
            units,
            data,
            public_url,
            files,
            https,
            keep,
            without_lora,
            go_fast,
            loras,
            gate: Gate::new(local, creates),
            waiters: Waiters::default(),
            meters: Meters::new(),
            pace: AtomicU64::new(1000),
            queued: AtomicU64::new(0),
            ended: Notify::new(),
            draining: AtomicBool::new(false),
        }
    }

    /// Where the client reached us, without a slash at the end.
    fn base(&self, headers: &HeaderMap) -> String {
        if let Some(url) = &self.public_url {
            return url.trim_end_matches('/').into();
        }
        let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let own = if self.https { "https" } else { "http" };
        let scheme = header("x-forwarded-proto").filter(|scheme| *scheme == "https").unwrap_or(own);
        let host = header("x-forwarded-host").or_else(|| header(HOST.as_str())).unwrap_or("127.0.0.1");
        format!("{scheme}://{host}")
    }

    /// The unit whose model suits: with distilled guidance (dev) or without (schnell).
    fn unit(&self, guidance: bool) -> &Arc<Unit> {
        self.units.iter().find(|unit| unit.model.shape.guidance == guidance).unwrap_or(&self.units[0])
    }

    /// Notes how long a job took.
    fn paced(&self, milliseconds: u64) {
        let old = self.pace.load(Ordering::Relaxed);
        self.pace.store((3 * old + milliseconds) / 4, Ordering::Relaxed);
    }
}

/// Everything under one address. Clients disagree on whether the base has `/v1`, so it works with none, one and two.
pub fn router(server: Arc<Server>) -> Router {
    let replicate = replicate::router();
    Router::new()
        .merge(health::router())
        .merge(own::router())
        .merge(cog::router())
        .merge(replicate.clone())
        .nest("/v1", replicate.clone().merge(replicate::by_version()).merge(openai::router()))
        .nest("/v1/v1", replicate.merge(replicate::by_version()).merge(openai::router()))
        .merge(openai::router())
        .route("/outputs/{job}/{name}", get(outputs::give))
        .fallback(problem::not_found)
        .method_not_allowed_fallback(problem::wrong_method)
        .layer(middleware::from_fn_with_state(server.clone(), auth::guard))
        .layer(DefaultBodyLimit::max(MOST_BODY))
        .layer(RequestBodyTimeoutLayer::new(BODY_IDLE))
        .layer(CatchPanicLayer::new())
        .layer(middleware::from_fn_with_state(server.clone(), trace::request))
        .with_state(server)
}

/// Serves until `stop` resolves; then lets open requests end.
pub async fn serve(
    server: Arc<Server>,
    listener: TcpListener,
    tls: Option<Tls>,
    stop: impl Future<Output = ()>,
) -> std::io::Result<()> {
    let (ending, ended) = watch::channel(false);
    server.sweep();
    let tasks = [
        tokio::spawn(server.clone().wake_waiting()),
        tokio::spawn(server.clone().deliver(ended.clone())),
        tokio::spawn(server.clone().clear(ended)),
    ];
    accept::serve(listener, tls, router(server.clone()), async {
        stop.await;
        server.draining.store(true, Ordering::SeqCst);
    })
    .await;
    ending.send_replace(true);
    tasks.iter().for_each(tokio::task::JoinHandle::abort);
    Ok(())
}

#[cfg(test)]
impl Server {
    /// A service without workers, whose data is in a folder.
    async fn for_tests(folder: &std::path::Path, blobs: Blobs, keep: Keep) -> Arc<Self> {
        let address = format!("sqlite:{}", folder.join("jobs.db").display());
        let store = Store::open(&address, crate::jobs::Limits::default()).await.expect("a new database");
        let web = Web::new(true, crate::fetch::Limits::default()).expect("a client");
        let options = Options {
            data: folder.into(),
            public_url: None,
            files: Files::Auto,
            local: true,
            https: false,
            creates: None,
            keep,
            without_lora: false,
            go_fast: false,
            loras: None,
        };
        let secret = Secret::of(folder).expect("a new secret");
        Arc::new(Self::new(store, blobs, secret, web, Vec::new(), options))
    }

    /// A job that has ended with one picture, `0.png`, which is not in storage.
    async fn ended_for_tests(&self) -> crate::jobs::Job {
        self.store.submit(&crate::jobs::NewJob::for_tests()).await.expect("a job");
        let claim = self.store.claim("w", "", &[], &[], Duration::from_secs(60)).await.expect("a claim").expect("the job");
        let result = serde_json::json!({ "files": ["0.png"], "width": 64, "height": 64 });
        self.store.finish(&claim, &crate::jobs::Outcome::Succeeded(result)).await.expect("its end")
    }

    /// A job as it was before it was forgotten.
    async fn gone_for_tests(&self) -> crate::jobs::Job {
        let (job, _) = self.store.submit(&crate::jobs::NewJob::for_tests()).await.expect("a job");
        self.store.cancel(&job.tenant, &job.id).await.expect("its end");
        self.store.strip(&job, &[], true).await.expect("no data");
        while self.store.forget(Duration::ZERO).await.expect("an answer") == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        job
    }
}
