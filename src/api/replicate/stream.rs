//! A prediction's events as they come, for clients that stream. The link's signature is the permission.

use std::convert::Infallible;
use std::sync::Arc;

use axum::extract::{Path, Query, State};
use axum::http::HeaderMap;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, StreamExt};
use serde_json::json;

use crate::api::Server;
use crate::api::outputs::Signed;
use crate::api::problem::Problem;
use crate::api::wait::{COMMENT, STREAM};
use crate::jobs::{Job, JobId, Status};

/// Where a stream is: so many bytes of logs were sent. It is the events' id, from which a client that comes back goes on; without
/// an id one client drops events.
#[derive(Debug, Clone)]
struct Place {
    job: JobId,
    tenant: String,
    base: String,
    logs: usize,
    over: bool,
}

pub(super) async fn stream(
    State(server): State<Arc<Server>>,
    Path(id): Path<String>,
    Query(signed): Query<Signed>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let known: JobId = id.parse().map_err(|()| Problem::NotFound)?;
    if !server.permits(&format!("{id}/stream"), &signed) {
        return Err(Problem::NotFound);
    }
    let job = server.store.find(&known).await?.ok_or(Problem::NotFound)?;
    let last = headers.get("last-event-id").and_then(|id| id.to_str().ok()?.parse().ok());
    let place = Place { job: known, tenant: job.tenant, base: server.base(&headers), logs: last.unwrap_or(0), over: false };
    let events = stream::unfold((server, place), |(server, mut place)| async move {
        if place.over {
            return None;
        }
        loop {
            let job = server.look(&place.tenant, &place.job).await?;
            let events = place.events(&server, &job).await;
            if !events.is_empty() {
                return Some((stream::iter(events.into_iter().map(Ok::<_, Infallible>)), (server, place)));
            }
            tokio::time::sleep(STREAM).await;
        }
    });
    Ok(Sse::new(events.flatten()).keep_alive(KeepAlive::new().interval(COMMENT)).into_response())
}

impl Place {
    /// What is new of the job.
    async fn events(&mut self, server: &Server, job: &Job) -> Vec<Event> {
        let mut events = Vec::new();
        if let Some(new) = job.logs.get(self.logs..).filter(|new| !new.is_empty()) {
            self.logs = job.logs.len();
            events.push(self.event("logs", new));
        }
        if !job.status.is_final() {
            return events;
        }
        self.over = true;
        let done = match job.status {
            Status::Succeeded => {
                let pictures = server.pictures(job, &self.base, server.gives_links(&self.base)).await.ok().flatten();
                events.extend(pictures.unwrap_or_default().iter().map(|picture| self.event("output", picture)));
                json!({})
            }
            Status::Failed => {
                events.push(self.event("error", &json!({ "detail": job.error }).to_string()));
                json!({ "reason": "error" })
            }
            _ => json!({ "reason": "canceled" }),
        };
        events.push(self.event("done", &done.to_string()));
        events
    }

    fn event(&self, name: &str, data: &str) -> Event {
        // A carriage return would end a line of the protocol.
        Event::default().event(name).id(self.logs.to_string()).data(data.replace('\r', ""))
    }
}
