//! Streams of events: each dialect tells of a job in its own words, until it has ended. A stream whose job is gone ends with an error.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, StreamExt};

use super::Server;
use super::problem::Problem;
use super::wait::STREAM;
use crate::jobs::Job;

/// How often a comment is sent: clients give up after 30 s of silence.
const COMMENT: Duration = Duration::from_secs(10);

/// How a dialect tells of a job.
pub(super) trait Tell: Send + 'static {
    /// What is new of the job; of one that has ended the last that is said of it.
    fn news(&mut self, server: &Server, job: &Job) -> impl Future<Output = Vec<Event>> + Send;

    /// What is said last if there is no end to tell of.
    fn problem(&self, problem: Problem) -> Vec<Event>;
}

/// All that there is to tell of a job, from how it is now.
pub(super) fn events(server: Arc<Server>, job: Job, teller: impl Tell) -> Response {
    let events = stream::unfold(Some((server, job, teller)), |state| async move {
        let (server, mut job, mut teller) = state?;
        loop {
            let news = teller.news(&server, &job).await;
            if job.status.is_final() {
                return Some((news, None));
            }
            if !news.is_empty() {
                return Some((news, Some((server, job, teller))));
            }
            if !server.wait(&mut job, STREAM).await {
                return Some((teller.problem(Problem::NotFound), None));
            }
        }
    });
    let events = events.flat_map(stream::iter).map(Ok::<_, Infallible>);
    Sse::new(events).keep_alive(KeepAlive::new().interval(COMMENT)).into_response()
}

/// All that a stream says.
#[cfg(test)]
pub(super) async fn said(stream: Response) -> String {
    let body = axum::body::to_bytes(stream.into_body(), usize::MAX);
    let body = tokio::time::timeout(Duration::from_secs(20), body).await.expect("it ends").expect("a body");
    String::from_utf8(body.to_vec()).expect("a text")
}
