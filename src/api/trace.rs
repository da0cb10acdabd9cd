//! A name for every request, in its answer and in the logs; and how long it took.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::header::HOST;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use tracing::Instrument;
use uuid::Uuid;

use super::Server;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Longest name that is taken over from a client or a gateway.
const LONGEST: usize = 128;

pub(super) async fn request(State(server): State<Arc<Server>>, mut request: Request, next: Next) -> Response {
    // HTTP/2 names the host in the address.
    let host = request.uri().authority().and_then(|authority| HeaderValue::from_str(authority.as_str()).ok());
    if let (Some(host), false) = (host, request.headers().contains_key(HOST)) {
        request.headers_mut().insert(HOST, host);
    }
    let begun = Instant::now();
    let id = named(request.headers());
    let trace = trace(request.headers());
    let method = request.method().clone();
    let span = tracing::info_span!("request", id, trace, %method, path = request.uri().path());
    // The pattern, not the path: there are as many paths as jobs.
    let route = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str).to_owned();
    let mut response = next.run(request).instrument(span.clone()).await;
    let (status, seconds) = (response.status().as_u16(), begun.elapsed().as_secs_f64());
    span.in_scope(|| tracing::info!(status, seconds, "answered"));
    server.meters.answered(&method, &route, status, seconds);
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

/// A client's or gateway's own name for its request, or a new one.
fn named(headers: &HeaderMap) -> String {
    let sent = headers.get(REQUEST_ID).and_then(|id| id.to_str().ok());
    let plain = |id: &&str| !id.is_empty() && id.len() <= LONGEST && id.bytes().all(|byte| byte.is_ascii_graphic());
    sent.filter(plain).map_or_else(|| Uuid::new_v4().simple().to_string(), str::to_owned)
}

/// Of `00-TRACE-SPAN-FLAGS` the trace that this request is a part of.
fn trace(headers: &HeaderMap) -> Option<String> {
    let parent = headers.get("traceparent")?.to_str().ok()?;
    parent
        .split('-')
        .nth(1)
        .filter(|trace| trace.len() == 32 && trace.bytes().all(|byte| byte.is_ascii_hexdigit()))
        .map(str::to_owned)
}
