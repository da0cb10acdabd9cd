//! A prediction's events as they come, for clients that stream. The link's signature is the permission.

use std::sync::Arc;

use axum::extract::{Path, Query, State};
use axum::http::HeaderMap;
use axum::response::Response;
use axum::response::sse::Event;
use serde_json::json;
use tokio::time::Instant;

use crate::api::Server;
use crate::api::outputs::{READING, Signed, patiently};
use crate::api::problem::Problem;
use crate::api::stream::{Tell, events};
use crate::jobs::{Job, JobId, Status};

/// Where a stream is: so many bytes of logs were sent. It is the events' id, from which a client that comes back goes on; without
/// an id one client drops events.
#[derive(Debug)]
struct Place {
    base: String,
    logs: usize,
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
    let place = Place { base: server.base(&headers), logs: last.unwrap_or(0) };
    Ok(events(server, job, place))
}

impl Tell for Place {
    async fn news(&mut self, server: &Server, job: &Job) -> Vec<Event> {
        let mut events = Vec::new();
        if let Some(new) = job.logs.get(self.logs..).filter(|new| !new.is_empty()) {
            self.logs = job.logs.len();
            events.push(self.event("logs", new));
        }
        match job.status {
            Status::Queued | Status::Running => {}
            Status::Succeeded => {
                let links = server.gives_links(&self.base);
                let pictures = || server.pictures(job, &self.base, links);
                match patiently(&job.id, Instant::now() + READING, pictures).await {
                    Ok(Some(pictures)) => {
                        events.extend(pictures.iter().map(|picture| self.event("output", picture)));
                        events.push(self.event("done", "{}"));
                    }
                    Ok(None) => events.extend(self.problem(Problem::NotFound)),
                    Err(problem) => events.extend(self.problem(problem)),
                }
            }
            Status::Failed => events.extend(self.failed(job.error.as_deref())),
            Status::Canceled | Status::Aborted => events.push(self.event("done", r#"{"reason":"canceled"}"#)),
        }
        events
    }

    fn problem(&self, problem: Problem) -> Vec<Event> {
        self.failed(Some(&problem.detail()))
    }
}

impl Place {
    fn failed(&self, detail: Option<&str>) -> Vec<Event> {
        let error = self.event("error", &json!({ "detail": detail }).to_string());
        vec![error, self.event("done", r#"{"reason":"error"}"#)]
    }

    fn event(&self, name: &str, data: &str) -> Event {
        // A carriage return would end a line of the protocol.
        Event::default().event(name).id(self.logs.to_string()).data(data.replace('\r', ""))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Keep;
    use crate::api::stream::said;
    use crate::blobs::Blobs;

    #[tokio::test]
    async fn a_stream_ends_if_its_job_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(folder.path().join("files").to_str().unwrap(), &[]).unwrap();
        let server = Server::for_tests(folder.path(), blobs, Keep::default()).await;
        let job = server.gone_for_tests().await;
        let place = || Place { base: "https://here".into(), logs: 0 };
        let said_of = |job: &Job| said(events(server.clone(), job.clone(), place()));
        let gone = said_of(&job).await;
        let error = gone.find("event: error\n").expect(&gone);
        assert!(gone[error..].contains("could not be found") && gone[error..].contains("{\"reason\":\"error\"}"), "{gone}");
        // Nor has it pictures any more if only its data was removed.
        let (stripped, kept) = (Job { status: Status::Succeeded, ..job }, server.ended_for_tests().await);
        let stripped = said_of(&stripped).await;
        assert!(stripped.contains("event: error\n") && !said_of(&kept).await.contains("event: error\n"), "{stripped}");
    }
}
