//! Who a request comes from, and whether it may come at all.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::extract::{FromRequestParts, Request, State};
use axum::http::header::{AUTHORIZATION, CONTENT_LENGTH, HOST, ORIGIN};
use axum::http::request::Parts;
use axum::http::{HeaderMap, Method};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use governor::clock::{Clock, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use std::num::NonZeroU32;
use url::Url;

use super::problem::{OpenAi, Problem};
use super::{MOST_BODY, MOST_FORM, Peer, Server};

/// The tenant while there are no keys.
pub(super) const LOCAL: &str = "local";

/// Wrong keys a minute from one address.
const WRONG_KEYS: NonZeroU32 = NonZeroU32::new(60).unwrap();

/// Entries from which a limiter forgets those who have been quiet.
const MANY: usize = 10_000;

/// Whose request it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Caller {
    pub(super) tenant: String,
    /// May see metrics and the caches.
    pub(super) admin: bool,
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        parts.extensions.get::<Self>().cloned().ok_or(Problem::Unauthenticated)
    }
}

/// Who may ask, and how often.
#[derive(Debug)]
pub(super) struct Gate {
    /// A key was made once: from then on keys are asked for.
    keys: AtomicBool,
    /// Only this machine can reach us.
    local: bool,
    creates: Option<DefaultKeyedRateLimiter<String>>,
    wrong: DefaultKeyedRateLimiter<IpAddr>,
}

impl Gate {
    /// At most `creates` new jobs a minute for each tenant.
    pub(super) fn new(local: bool, creates: Option<NonZeroU32>) -> Self {
        Self {
            keys: AtomicBool::new(false),
            local,
            creates: creates.map(|creates| RateLimiter::keyed(Quota::per_minute(creates))),
            wrong: RateLimiter::keyed(Quota::per_minute(WRONG_KEYS)),
        }
    }

    /// Counts a new job of a tenant.
    pub(super) fn create(&self, tenant: &str) -> Result<(), Problem> {
        let Some(creates) = &self.creates else { return Ok(()) };
        creates.check_key(&tenant.to_owned()).map_err(|until| Problem::Throttled(seconds(&until)))
    }
}

fn seconds(until: &governor::NotUntil<governor::clock::QuantaInstant>) -> u64 {
    until.wait_time_from(DefaultClock::default().now()).as_secs() + 1
}

/// Addresses that need no key: what load balancers ask, and links that carry their own permission.
pub(super) fn open(path: &str) -> bool {
    let path = path.trim_start_matches("/v1");
    path.starts_with("/health")
        || path.starts_with("/outputs/")
        || (path.starts_with("/files/") && (path.ends_with("/stream") || path.ends_with("/download")))
}

/// Lets a request through, with its [`Caller`].
pub(super) async fn guard(State(server): State<Arc<Server>>, mut request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    let announced = request.headers().get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    let most = if path.ends_with("/files") { MOST_FORM } else { MOST_BODY };
    if announced.is_some_and(|length| length > most) {
        // Before it is read.
        return answer(&path, Problem::TooLarge(most));
    }
    if open(&path) {
        return next.run(request).await;
    }
    let peer = request.extensions().get::<Peer>().map(|peer| peer.0.ip());
    match server.caller(request.method(), request.headers(), peer).await {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(problem) => answer(&path, problem),
    }
}

fn answer(path: &str, problem: Problem) -> Response {
    if path.contains("/images/") { OpenAi(problem).into_response() } else { problem.into_response() }
}

impl Server {
    pub(super) async fn has_keys(&self) -> Result<bool, Problem> {
        if self.gate.keys.load(Ordering::Relaxed) {
            return Ok(true);
        }
        let keys = self.store.has_keys().await?;
        self.gate.keys.store(keys, Ordering::Relaxed);
        Ok(keys)
    }

    async fn caller(&self, method: &Method, headers: &HeaderMap, peer: Option<IpAddr>) -> Result<Caller, Problem> {
        if !self.has_keys().await? {
            self.same_site(method, headers)?;
            return Ok(Caller { tenant: LOCAL.into(), admin: true });
        }
        let sent = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()).and_then(|value| value.split_once(' '));
        let key = match sent {
            Some((kind, key)) if kind.eq_ignore_ascii_case("bearer") || kind.eq_ignore_ascii_case("token") => {
                self.store.key(key.trim()).await?
            }
            _ => None,
        };
        match key {
            Some(key) => Ok(Caller { tenant: key.tenant, admin: key.admin }),
            None => {
                let Some(peer) = peer else { return Err(Problem::Unauthenticated) };
                if self.gate.wrong.len() > MANY {
                    self.gate.wrong.retain_recent();
                }
                match self.gate.wrong.check_key(&peer) {
                    Ok(()) => Err(Problem::Unauthenticated),
                    Err(until) => Err(Problem::Throttled(seconds(&until))),
                }
            }
        }
    }

    /// Without keys, a page that its user looks at must not be able to use this server: by another name that leads here, or by
    /// sending from its own.
    fn same_site(&self, method: &Method, headers: &HeaderMap) -> Result<(), Problem> {
        let header = |name| headers.get(name).and_then(|value: &axum::http::HeaderValue| value.to_str().ok());
        let public = self.public_url.as_deref().and_then(|url| Url::parse(url).ok());
        let named = |name: &str| {
            let name = name.trim_start_matches('[').trim_end_matches(']');
            ["localhost", "127.0.0.1", "::1"].contains(&name) || public.as_ref().and_then(Url::host_str) == Some(name)
        };
        let without_port = |host: &str| match host.rsplit_once(':') {
            Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name.to_owned(),
            _ => host.to_owned(),
        };
        let host = header(HOST).map(without_port);
        if self.gate.local && host.as_deref().is_some_and(|host| !named(host)) {
            return Err(Problem::Forbidden("This name is not this server's; without keys it answers to localhost only."));
        }
        if matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS) {
            return Ok(());
        }
        let Some(origin) = header(ORIGIN) else { return Ok(()) };
        let origin = Url::parse(origin).ok().and_then(|origin| origin.host_str().map(str::to_owned));
        let own = origin.is_some_and(|origin| named(&origin) || Some(&origin) == host.as_ref());
        if own { Ok(()) } else { Err(Problem::Forbidden("Pages of other sites may not use this server.")) }
    }
}
