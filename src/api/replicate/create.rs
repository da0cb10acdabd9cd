//! Creating predictions.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::header::LOCATION;
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse;
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use super::headers::{object, wait, webhook, within};
use super::prediction::prediction;
use super::schema::Served;
use super::{Answer, input};
use crate::api::Server;
use crate::api::auth::Caller;
use crate::api::bodies::Held;
use crate::api::outputs::patiently;
use crate::api::problem::{Body, Invalid, Problem};
use crate::api::submit::{Submission, check_order, fingerprint};
use crate::jobs::{Job, Status};

/// A client that waits for 60 s in all gives up, and asks a second time, if the answer takes as long.
const HOLD: Duration = Duration::from_secs(57);

/// Keys beside `input`, of today's clients and of old ones.
const KEYS: [&str; 5] = ["input", "webhook", "webhook_events_filter", "stream", "webhook_completed"];

pub(in crate::api) async fn by_version(
    State(server): State<Arc<Server>>,
    caller: Caller,
    headers: HeaderMap,
    Body(sent, held): Body,
) -> Answer {
    let body = object(&headers, &sent)?;
    let Some(version) = body.get("version").and_then(Value::as_str) else {
        return Err(Problem::invalid("required", "", "version is required"));
    };
    let served = Served::of_version(version).ok_or(Problem::UnknownVersion)?;
    create(&server, &caller, &headers, served, (sent, body, held), &["version"]).await
}

/// Also for deployments, which are called as the model that they are of.
pub(super) async fn by_model(
    State(server): State<Arc<Server>>,
    caller: Caller,
    Path((owner, name)): Path<(String, String)>,
    headers: HeaderMap,
    Body(sent, held): Body,
) -> Answer {
    let served = Served::named(&owner, &name).ok_or(Problem::NotFound)?;
    let body = object(&headers, &sent)?;
    create(&server, &caller, &headers, served, (sent, body, held), &[]).await
}

async fn create(
    server: &Server,
    caller: &Caller,
    headers: &HeaderMap,
    served: &Served,
    (sent, body, held): (Bytes, Map<String, Value>, Arc<Held>),
    more: &[&str],
) -> Answer {
    let unknown = |key: &&String| !KEYS.contains(&key.as_str()) && !more.contains(&key.as_str());
    let refuse =
        |key: &String| Invalid::new("additional_property_not_allowed", "", format!("Additional property {key} is not allowed"));
    let unknown: Vec<_> = body.keys().filter(unknown).map(refuse).collect();
    if !unknown.is_empty() {
        return Err(Problem::Invalid(unknown));
    }
    let wait = wait(headers)?;
    let job = accept(server, caller, headers, served, &body, held).await?;
    // Megabytes, which nobody needs while the answer is held.
    drop((sent, body));
    respond(server, headers, job, wait).await
}

/// Checks the body's `input` and accepts the job.
pub(in crate::api) async fn accept(
    server: &Server,
    caller: &Caller,
    headers: &HeaderMap,
    served: &Served,
    body: &Map<String, Value>,
    held: Arc<Held>,
) -> Result<Job, Problem> {
    let none = Map::new();
    let input = match body.get("input") {
        Some(Value::Object(input)) => input,
        None | Some(Value::Null) => &none,
        Some(_) => return Err(Problem::invalid("invalid_type", "input", "Invalid type. Expected: object")),
    };
    let within = within(headers)?;
    let webhook = webhook(body)?;
    let checked = input::check(served, input)?;
    let unit = server.unit(served.is_dev());
    let base = server.base(headers);
    let (mut shown, cut) = input::shown(served, |name| input::takes(served, name), input);
    let mut image = None;
    if let Some(text) = checked.values.get("image").and_then(Value::as_str).filter(|text| !text.trim().is_empty()) {
        let sent = server.sent(caller, &base, "image", text.trim()).await?;
        if let Some(link) = &sent.shown {
            shown["image"] = json!(link);
        }
        image = Some(sent);
    }
    let mut order = input::order(&checked.values, &unit.model, server, image.as_ref().map(|sent| &sent.origin))?;
    order.previews = body.get("stream").and_then(Value::as_bool).unwrap_or(false);
    let (picture, file) = image.map_or((None, None), |sent| (sent.picture, sent.file));
    check_order(unit, &order, [picture, None]).await?;
    let mut notes = checked.notes;
    notes.extend(cut);
    if unit.model.shape.guidance != served.is_dev() {
        notes.push(format!("this server has no model of this kind; {} is used", unit.model.name));
    }
    let submission = Submission {
        order,
        model: format!("{}/{}", served.owner, served.name),
        version: served.version().into(),
        input: shown,
        notes,
        within,
        webhook,
        files: file.into_iter().collect(),
        held: Some(held),
        idempotency: headers
            .get("idempotency-key")
            .and_then(|key| key.to_str().ok())
            .map(|key| (key.to_owned(), fingerprint(&format!("{}/{}", served.owner, served.name), body))),
    };
    Ok(server.submit(caller, unit, headers, submission).await?.0)
}

/// The prediction, once it has ended if the client waits.
async fn respond(server: &Server, headers: &HeaderMap, mut job: Job, wait: Option<Duration>) -> Answer {
    let hold = wait.map_or(Duration::ZERO, |wait| wait.min(HOLD));
    let until = Instant::now() + hold;
    if wait.is_some() {
        server.wait(&mut job, hold).await;
    }
    let base = server.base(headers);
    let links = server.gives_links(&base);
    let told = patiently(&job.id, until, || prediction(server, &base, &job, links)).await;
    let mut prediction = match told {
        Ok(told) => told,
        Err(_) => {
            // Whoever is told of an error sends the job again. As long as its pictures cannot be read it has not ended: clients then
            // ask for it by its id.
            job = Job { status: Status::Running, completed_at: None, result: None, ..job };
            prediction(server, &base, &job, links).await?
        }
    };
    let ended = job.status.is_final();
    if !ended {
        // Clients take any other word for the end.
        prediction["status"] = json!("starting");
    }
    let status = if wait.is_some() && !ended { StatusCode::ACCEPTED } else { StatusCode::CREATED };
    let location = format!("{base}/v1/predictions/{}", job.id);
    Ok((status, [(LOCATION, location)], Json(prediction)).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Keep;
    use crate::blobs::Blobs;
    use crate::ops::serve::outputs;

    #[tokio::test]
    async fn a_job_whose_pictures_cannot_be_read_is_not_sent_again() {
        let folder = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(folder.path().join("files").to_str().unwrap(), &[]).unwrap();
        let server = Server::for_tests(folder.path(), blobs, Keep::default()).await;
        let job = server.ended_for_tests().await;
        let answer = async || {
            let answer = respond(&server, &HeaderMap::new(), job.clone(), Some(Duration::from_secs(1))).await.unwrap();
            let (status, body) = (answer.status(), axum::body::to_bytes(answer.into_body(), usize::MAX).await.unwrap());
            (status, serde_json::from_slice::<Value>(&body).unwrap())
        };
        // A file in the place of the folder: root may read every folder.
        let away = folder.path().join("files/outputs");
        std::fs::write(&away, b"").unwrap();
        let (status, later) = answer().await;
        assert_eq!((status, later["id"].as_str()), (StatusCode::ACCEPTED, Some(job.id.as_str())));
        assert!(later["status"] == "starting" && later["output"].is_null() && later["completed_at"].is_null(), "{later}");
        std::fs::remove_file(&away).unwrap();
        server.blobs.put(&format!("{}/0.png", outputs(job.id.as_str())), vec![1, 2, 3]).await.unwrap();
        let (status, now) = answer().await;
        assert_eq!((status, &now["status"]), (StatusCode::CREATED, &json!("succeeded")));
        assert_eq!(now["output"], json!(["data:image/png;base64,AQID"]));
    }
}
