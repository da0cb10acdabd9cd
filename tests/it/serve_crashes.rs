//! The crash matrix: the service and its worker die at every named point of a job's life; nothing that was accepted is lost, doubled
//! or changed.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::cli::Place;
use crate::service::{DEV_LORA, Service, until, user1001};
use crate::site::{Reply, Site};

/// Of the service (which takes its worker with it), and of the worker alone.
const SERVICE: [&str; 4] = ["accepting", "accepted", "telling", "told"];
const WORKER: [&str; 7] = ["claimed", "fetched", "step", "painted", "written", "finishing", "finished"];

fn site() -> Site {
    Site::serve(|request| match request.path.as_str() {
        "/user1001.safetensors" => Reply::ok(&std::fs::read(user1001()).unwrap()),
        _ => Reply::ok(b""),
    })
}

fn body(site: &Site) -> Value {
    json!({
        "input": {
            "prompt": "user1001, portrait of a person", "seed": 3, "num_inference_steps": 2, "num_outputs": 2, "output_format": "png",
            "lora_weights": site.url("/user1001.safetensors"),
        },
        "webhook": site.url("/told"), "webhook_events_filter": ["completed"],
    })
}

/// What becomes of one job when the process dies at `point`.
fn dies_at(point: &str, whole: &Value) {
    let (site, place) = (site(), Place::new());
    let mark = place.path("died");
    let wish = format!("{point}={}", mark.display());
    let of_service = SERVICE.contains(&point);
    let mut service = Service::start_with(&place, &[], &[("DARKROOM_FAIL", &wish)]);
    // The answer may be lost with the process.
    let sent = service.runtime.block_on(async {
        let request = service.client.post(format!("{}{DEV_LORA}", service.address)).header("content-type", "application/json");
        let answer = request.header("idempotency-key", "k").body(body(&site).to_string()).send().await.ok()?;
        answer.json::<Value>().await.ok()
    });
    if of_service {
        until(point, 60, || mark.exists());
        service.kill("-9");
        service = Service::start(&place, &[]);
    }
    // A client that heard nothing asks again, with the same key.
    let job = sent.unwrap_or_else(|| service.post(DEV_LORA, &[("idempotency-key", "k")], &body(&site)).json());
    let done = service.wait(job["id"].as_str().unwrap());
    assert!(mark.exists(), "{point} was never reached");
    assert_eq!((done["status"].as_str(), &done["output"]), (Some("succeeded"), whole), "{point}");
    assert_eq!(service.get("/v1/predictions").json()["results"].as_array().unwrap().len(), 1, "{point}: one job");
    until(&format!("{point}: the webhook"), 60, || site.count("/told") > 0);
    until(&format!("{point}: the outbox"), 60, || {
        String::from_utf8(service.get("/metrics").body).unwrap().contains("darkroom_webhooks_waiting 0")
    });
    let told = site.requests().into_iter().filter(|request| request.path == "/told");
    let ids: BTreeSet<_> = told.map(|request| request.header("webhook-id").unwrap().to_owned()).collect();
    assert_eq!(ids.len(), 1, "{point}: told twice only under one name");
}

fn whole() -> Value {
    let (site, place) = (site(), Place::new());
    let service = Service::start(&place, &[]);
    let answer = service.post(DEV_LORA, &[("prefer", "wait")], &body(&site)).json();
    assert_eq!(answer["status"], "succeeded", "{answer}");
    answer["output"].clone()
}

#[test]
fn the_service_dies_anywhere() {
    let whole = whole();
    SERVICE.iter().for_each(|point| dies_at(point, &whole));
}

#[test]
fn the_worker_dies_anywhere() {
    let whole = whole();
    WORKER.iter().for_each(|point| dies_at(point, &whole));
}
