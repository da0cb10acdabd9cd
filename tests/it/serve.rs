//! `darkroom serve` as a process: what clients get, and what survives when processes are killed.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cli::Place;
use crate::service::{DEV_LORA, Service, bytes, long, until, user1001};
use crate::site::{Reply, Site};

#[test]
fn pictures_for_replicates_clients() {
    let place = Place::new();
    let service = Service::start(&place, &[]);
    let input = json!({ "prompt": "a person with long red hair", "seed": 7, "num_inference_steps": 4, "style": "none" });
    let first = service.picture(&input);
    assert_eq!((first["status"].as_str(), first["error"].as_str()), (Some("succeeded"), None));
    assert_eq!(first["input"], input, "the request is echoed");
    let picture = image::load_from_memory(&bytes(&first["output"][0])).unwrap();
    assert_eq!((picture.width(), picture.height()), (128, 128));
    assert!(first["output"][0].as_str().unwrap().starts_with("data:image/webp;base64,"));
    assert!(first["logs"].as_str().unwrap().starts_with("Using seed: 7\n") && first["logs"].as_str().unwrap().contains("4/4"));
    let logs = first["logs"].as_str().unwrap();
    assert!(
        logs.contains("Note: the input style is not one of this model's") && logs.contains("Note: this server runs pocket"),
        "{logs}"
    );
    assert!(first["metrics"]["predict_time"].as_f64().unwrap() > 0.0 && first["started_at"].is_string());
    // The same job, the same bytes; under every address that clients make of the base.
    assert_eq!(service.picture(&input)["output"], first["output"]);
    let id = first["id"].as_str().unwrap();
    for path in ["/predictions/", "/v1/predictions/", "/v1/v1/predictions/"] {
        assert_eq!(service.get(&format!("{path}{id}")).json()["output"], first["output"]);
    }
    let four = service.picture(&json!({ "prompt": "x", "num_outputs": 4, "num_inference_steps": 2, "aspect_ratio": "16:9" }));
    assert_eq!(four["output"].as_array().unwrap().len(), 4);
    assert!(four["logs"].as_str().unwrap().contains("8/8"));
    // From a picture, at its size.
    let again = json!({ "prompt": "x", "image": first["output"][0], "prompt_strength": 0.5, "num_inference_steps": 4 });
    assert_eq!(service.picture(&again)["status"], "succeeded");

    let mut seen = service.get("/v1/predictions").json()["results"].as_array().unwrap().len();
    assert_eq!(seen, 4);
    let sent = json!({ "input": { "prompt": "x", "num_inference_steps": 1 } });
    let create = |headers: &[(&str, &str)]| service.post(DEV_LORA, headers, &sent);
    let one = create(&[("idempotency-key", "k1")]).json();
    assert_eq!(create(&[("idempotency-key", "k1")]).json()["id"], one["id"]);
    let elsewhere = DEV_LORA.replace("flux-dev-lora", "flux-schnell-lora");
    let to_another = service.post(&elsewhere, &[("idempotency-key", "k1")], &sent);
    assert_eq!(to_another.status, 422, "the same words to another model: {}", to_another.json());
    let other = service.post(DEV_LORA, &[("idempotency-key", "k1")], &json!({ "input": { "prompt": "y" } }));
    assert_eq!(other.status, 422);
    seen += 1;
    assert_eq!(service.get("/v1/predictions").json()["results"].as_array().unwrap().len(), seen);
    assert_eq!(service.get("/health/ready").status, 200);
    let listed = |query: &str| service.get(&format!("/v1/predictions?{query}")).json()["results"].as_array().map(Vec::len);
    let last = one["created_at"].as_str().unwrap();
    assert_eq!(
        (listed("created_after=2020-01-01T00:00:00Z"), listed("created_before=2020-01-01T00:00:00Z")),
        (Some(seen), Some(0))
    );
    assert_eq!((listed(&format!("created_after={last}")), listed(&format!("created_before={last}"))), (Some(1), Some(seen - 1)));
    assert_eq!(service.get("/v1/predictions?created_after=yesterday").status, 422);
}

#[test]
fn wrong_requests_have_replicates_answers() {
    let place = Place::new();
    let service = Service::start(&place, &[]);
    let create = |body: &Value| service.post("/v1/predictions", &[], body);
    let fault = |input: Value, kind: &str, detail: &str| {
        let answer = service.post(DEV_LORA, &[], &json!({ "input": input }));
        let body = answer.json();
        assert_eq!((answer.status, body["invalid_fields"][0]["type"].as_str()), (422, Some(kind)), "{body}");
        assert!(body["detail"].as_str().unwrap().contains(detail) && body["title"] == "Input validation failed", "{body}");
        assert_eq!(answer.headers["content-type"], "application/problem+json");
    };
    fault(json!({}), "required", "- input: prompt is required\n");
    fault(json!({ "prompt": 3 }), "invalid_type", "Expected: string, given: integer");
    fault(json!({ "prompt": "x", "num_outputs": 5 }), "number_lte", "less than or equal to 4");
    fault(json!({ "prompt": "x", "num_inference_steps": 0 }), "number_gte", "greater than or equal to 1");
    fault(json!({ "prompt": "x", "num_inference_steps": 2.5 }), "invalid_type", "Expected: integer");
    fault(json!({ "prompt": "x", "lora_scale": -2 }), "number_gte", "-1");
    fault(json!({ "prompt": "x", "aspect_ratio": "5:1" }), "enum", "\"21:9\"");
    fault(json!({ "prompt": "x", "megapixels": 1 }), "invalid_type", "Expected: string");
    fault(json!({ "prompt": "x", "image": "data:text/html;base64,AAAA" }), "invalid", "input.image");
    fault(json!({ "prompt": "x", "image": "file:///etc/passwd" }), "invalid", "input.image");
    fault(json!({ "prompt": "x", "lora_weights": "/etc/passwd" }), "invalid", "input.lora_weights");
    fault(json!({ "prompt": "x", "lora_weights": "s3://operators/private.safetensors" }), "invalid", "cannot be fetched");
    fault(json!({ "prompt": "x".repeat(9000) }), "invalid", "at most 8192 bytes");

    assert_eq!(create(&json!({ "version": "0".repeat(64), "input": {} })).json()["title"], "Invalid version or not permitted");
    assert_eq!(create(&json!({ "version": "black-forest-labs/flux-dev:latest", "input": {} })).status, 422);
    assert_eq!(create(&json!({ "input": { "prompt": "x" } })).json()["invalid_fields"][0]["description"], "version is required");
    let extra = create(&json!({ "version": "black-forest-labs/flux-dev", "input": { "prompt": "x" }, "priority": 1 }));
    assert_eq!(extra.json()["invalid_fields"][0]["type"], "additional_property_not_allowed");
    let form = service
        .client
        .post(format!("{}/v1/predictions", service.address))
        .header("content-type", "application/x-www-form-urlencoded");
    assert_eq!(service.send(form.body("a=b")).status, 415);
    assert_eq!(service.post("/v1/predictions", &[], &json!([1])).status, 422);
    for path in
        ["/v1/predictions/nope", "/v1/predictions/01m7yqeftae4rvn2akdv04dse4", "/v1/models/a/b", "/nowhere", "/outputs/x/y"]
    {
        assert_eq!(
            service.get(path).json(),
            json!({ "detail": "The requested resource could not be found.", "status": 404 }),
            "{path}"
        );
    }
    for (headers, part) in [(("prefer", "wait=0"), "Prefer"), (("cancel-after", "1s"), "Cancel-After")] {
        let answer = service.post(DEV_LORA, &[headers], &json!({ "input": { "prompt": "x" } }));
        assert!(answer.status == 422 && answer.json()["detail"].as_str().unwrap().contains(part));
    }
    assert_eq!(service.get("/v1/predictions").json()["results"], json!([]), "nothing was accepted");
}

#[test]
fn models_describe_themselves() {
    let place = Place::new();
    let service = Service::start(&place, &[]);
    let model = service.get("/v1/models/black-forest-labs/flux-dev-lora").json();
    let version = model["latest_version"]["id"].as_str().unwrap();
    assert_eq!(version.len(), 64);
    let schema = &model["latest_version"]["openapi_schema"]["components"]["schemas"];
    assert_eq!(schema["Input"]["properties"]["num_inference_steps"]["maximum"], 50);
    assert_eq!(schema["Input"]["properties"]["lora_scale"]["minimum"], -1.0);
    assert_eq!(schema["Input"]["properties"]["aspect_ratio"]["allOf"][0]["$ref"], "#/components/schemas/aspect_ratio");
    assert_eq!(schema["aspect_ratio"]["enum"].as_array().unwrap().len(), 11);
    assert_eq!(schema["Output"]["items"]["format"], "uri");
    let one = service.get(&format!("/v1/models/black-forest-labs/flux-dev-lora/versions/{version}")).json();
    assert_eq!(one["openapi_schema"], model["latest_version"]["openapi_schema"]);
    assert_eq!(service.get("/v1/models").json()["results"].as_array().unwrap().len(), 5);
    assert!(service.get("/v1/account").json()["username"].is_string());
    // By hash alone, as `run("owner/name:hash")` sends it.
    let created = service.post(
        "/v1/predictions",
        &[("prefer", "wait")],
        &json!({ "version": version, "input": { "prompt": "x", "num_inference_steps": 1 } }),
    );
    assert_eq!((created.json()["model"].as_str(), created.status), (Some("black-forest-labs/flux-dev-lora"), 201));
}

#[test]
fn deployments_are_the_models_themselves() {
    let place = Place::new();
    let service = Service::start(&place, &[]);
    let path = "/v1/deployments/black-forest-labs/flux-dev-lora";
    let (list, one) = (service.get("/v1/deployments").json(), service.get(path).json());
    assert!(list["results"].as_array().unwrap().contains(&one), "{list}");
    let model = service.get("/v1/models/black-forest-labs/flux-dev-lora").json();
    let release = &one["current_release"];
    assert_eq!(
        (&release["version"], release["model"].as_str()),
        (&model["latest_version"]["id"], Some("black-forest-labs/flux-dev-lora"))
    );
    assert!(
        release["configuration"]["min_instances"].is_u64()
            && one["owner"] == "black-forest-labs"
            && one["name"] == "flux-dev-lora"
    );
    assert_eq!(service.get("/v1/deployments/me/mine").status, 404);
    let made = service.post(
        &format!("{path}/predictions"),
        &[("prefer", "wait")],
        &json!({ "input": { "prompt": "x", "num_inference_steps": 1 } }),
    );
    assert_eq!((made.status, made.json()["status"].as_str()), (201, Some("succeeded")), "{}", made.json());
}

/// Whatever their sender says that they are.
#[test]
fn downloads_are_nothing_that_browsers_run() {
    let place = Place::new();
    let service = Service::start(&place, &[]);
    let downloaded = |kind: &str| {
        let part = reqwest::multipart::Part::bytes(b"<script>".to_vec()).file_name("a");
        let form = reqwest::multipart::Form::new().part("content", part).text("type", kind.to_owned());
        let file = service.send(service.client.post(format!("{}/v1/files", service.address)).multipart(form));
        assert_eq!(file.status, 201, "{kind:?}: {}", file.json());
        let file = service.get(file.json()["urls"]["download"].as_str().unwrap());
        assert_eq!((file.status, file.headers["x-content-type-options"].to_str().unwrap()), (200, "nosniff"), "{kind:?}");
        file.headers["content-type"].to_str().unwrap().to_owned()
    };
    for picture in ["image/png", "image/jpeg", "image/webp", "image/gif"] {
        assert_eq!(downloaded(picture), picture);
    }
    for other in
        ["image/SVG+xml", "image/svg+xml", "image/png,text/html", "image/png; x=\"", "image/a\nb", "text/html", "IMAGE/PNG", ""]
    {
        assert_eq!(downloaded(other), "application/octet-stream", "{other:?}");
    }
}

#[test]
fn links_to_pictures_are_their_own_permission() {
    let place = Place::new();
    let service = Service::start(&place, &["--files", "links"]);
    let done = service.picture(&json!({ "prompt": "x", "num_inference_steps": 1, "output_format": "png" }));
    let link = done["output"][0].as_str().unwrap();
    let picture = service.get(link);
    assert_eq!((picture.status, picture.headers["content-type"].to_str().unwrap()), (200, "image/png"));
    assert!(picture.body.starts_with(b"\x89PNG") && picture.headers["x-content-type-options"] == "nosniff");
    let (path, query) = link.split_once('?').unwrap();
    let changed = if query.contains("signature=0") {
        query.replacen("=0", "=1", 1)
    } else {
        query.replacen("signature=", "signature=0", 1)
    };
    let later = query.replace("expires=", "expires=9");
    for wrong in [
        path.to_owned(),
        format!("{path}?{changed}"),
        format!("{path}?{later}"),
        link.replace("out-0", "out-1"),
        link.replace("out-0.png", "..%2F..%2Fsecret"),
    ] {
        assert_eq!(service.get(&wrong).status, 404, "{wrong}");
    }
}

#[test]
fn a_persons_lora_and_then_nobodys() {
    let site = Site::serve(|request| match request.path.starts_with("/user1001.safetensors") {
        true => Reply::ok(&std::fs::read(user1001()).unwrap()),
        false => Reply::new("404 Not Found", &[], b""),
    });
    let place = Place::new();
    let service = Service::start(&place, &[]);
    let plain =
        json!({ "prompt": "user1001, portrait of a person", "seed": 2, "num_inference_steps": 6, "output_format": "png" });
    let nobody = service.picture(&plain);
    let mut with = plain.clone();
    with["lora_weights"] = json!(site.url("/user1001.safetensors?X-Amz-Signature=canary"));
    let her = service.picture(&with);
    assert_eq!(her["status"], "succeeded", "{her}");
    assert_ne!(her["output"], nobody["output"]);
    assert!(her["logs"].as_str().unwrap().contains("LoRA ") && !her["logs"].as_str().unwrap().contains("canary"));
    assert_eq!(service.picture(&plain)["output"], nobody["output"], "no trace of her");
    assert_eq!(service.picture(&with)["output"], her["output"]);
    // pocket's own people are known by name; the machine's files are not.
    with["lora_weights"] = json!("user1001");
    assert_eq!(service.picture(&with)["output"], her["output"]);
    with["lora_weights"] = json!("user1006");
    assert_eq!(service.post(DEV_LORA, &[], &json!({ "input": with })).status, 422);
    // A LoRA that is not there fails its prediction and nothing else.
    with["lora_weights"] = json!(site.url("/gone.safetensors?X-Amz-Signature=canary"));
    let failed = service.picture(&with);
    assert_eq!((failed["status"].as_str(), &failed["output"]), (Some("failed"), &Value::Null));
    let error = failed["error"].as_str().unwrap();
    assert!(error.contains("was not found") && !error.contains("canary"), "{error}");
    assert_eq!(service.picture(&plain)["output"], nobody["output"]);
}

#[test]
fn stopping_jobs_and_answers_that_come_too_early() {
    let place = Place::new();
    let service = Service::start(&place, &[]);
    let early = service.post(DEV_LORA, &[("prefer", "wait=1")], &json!({ "input": long(1) }));
    // Whatever it is doing: another word would be taken for the end.
    let (status, body) = (early.status, early.json());
    assert!(status == 202 && body["status"] == "starting" && body["output"].is_null(), "{status} {body}");
    let running = body["id"].as_str().unwrap().to_owned();
    let queued = service.post(DEV_LORA, &[], &json!({ "input": long(2) })).json()["id"].as_str().unwrap().to_owned();
    // As clients do: a JSON content type and no body.
    let cancel = |id: &str| {
        let url = format!("{}/v1/predictions/{id}/cancel", service.address);
        service.send(service.client.post(url).header("content-type", "application/json"))
    };
    assert_eq!(cancel(&queued).json()["status"], "canceled");
    service.until(&running, |now| now["status"] == "processing");
    let begun = Instant::now();
    assert_eq!(cancel(&running).status, 200);
    assert_eq!(service.wait(&running)["status"], "canceled");
    assert!(begun.elapsed() < Duration::from_secs(20));
    // After the end it is told again.
    assert_eq!(cancel(&running).json()["status"], "canceled");
    assert_eq!(service.picture(&json!({ "prompt": "x", "num_inference_steps": 1 }))["status"], "succeeded");
}

#[test]
fn deadlines_end_what_waits_and_what_runs() {
    let place = Place::new();
    let service = Service::start(&place, &[]);
    let endless = json!({ "input": endless_input() });
    let first = service.post(DEV_LORA, &[], &endless).json()["id"].as_str().unwrap().to_owned();
    service.until(&first, |now| now["status"] == "processing");
    let body = json!({ "input": { "prompt": "x" } });
    let late = service.post(DEV_LORA, &[("cancel-after", "5s")], &body).json();
    assert!(late["deadline"].is_string(), "{late}");
    let ended = service.wait(late["id"].as_str().unwrap());
    // Clients know no `aborted`.
    assert_eq!(
        (ended["status"].as_str(), ended["error_code"].as_str(), &ended["started_at"]),
        (Some("canceled"), Some("deadline"), &Value::Null)
    );
    let cancel = |id: &str| service.post(&format!("/v1/predictions/{id}/cancel"), &[], &json!({})).status;
    assert_eq!(cancel(&first), 200);
    assert_eq!(service.wait(&first)["status"], "canceled");
    let running = service.post(DEV_LORA, &[("cancel-after", "5s")], &endless).json();
    let ended = service.wait(running["id"].as_str().unwrap());
    assert!(ended["status"] == "canceled" && ended["started_at"].is_string(), "{ended}");
}

/// Minutes of work for any processor: a picture sixty times pocket's own size.
fn endless_input() -> Value {
    let picture = image::RgbImage::from_pixel(1024, 1024, image::Rgb([90, 90, 90]));
    let mut file = std::io::Cursor::new(Vec::new());
    picture.write_to(&mut file, image::ImageFormat::Png).unwrap();
    let uri = format!(
        "data:image/png;base64,{}",
        base64::Engine::encode(&base64::engine::general_purpose::STANDARD, file.into_inner())
    );
    json!({ "prompt": "x", "image": uri, "num_inference_steps": 50, "num_outputs": 4, "prompt_strength": 1.0 })
}

#[test]
fn no_job_is_lost_when_processes_are_killed() {
    let place = Place::new();
    let mut service = Service::start(&place, &[]);
    let whole = service.picture(&long(9))["output"].clone();
    let create =
        |service: &Service| service.post(DEV_LORA, &[], &json!({ "input": long(9) })).json()["id"].as_str().unwrap().to_owned();
    // The worker, in the middle of a job.
    let id = create(&service);
    service.until(&id, |now| now["logs"].as_str().unwrap().contains("20/200"));
    let worker = service.worker();
    Command::new("kill").args(["-9", &worker.to_string()]).status().unwrap();
    let done = service.wait(&id);
    assert_eq!((done["status"].as_str(), &done["output"]), (Some("succeeded"), &whole), "the same picture");
    // On a busy machine the job may have ended before the kill came; then the new worker is not there at once.
    until("a new worker comes", 30, || service.worker() != worker);

    // The service, with one job running and one waiting. Its worker goes with it.
    let (running, waiting) = (create(&service), create(&service));
    service.until(&running, |now| now["status"] == "processing");
    let worker = service.worker();
    service.kill("-9");
    until("the worker ends with its service", 30, || !Path::new(&format!("/proc/{worker}")).exists());
    let mut service = Service::start(&place, &[]);
    for id in [&running, &waiting] {
        assert_eq!((service.wait(id)["status"].as_str(), &service.wait(id)["output"]), (Some("succeeded"), &whole));
    }

    // A second service on the same folder is refused; a polite end gives the job back and is no failure.
    let data = place.path("data").display().to_string();
    place.run(&["serve", "--listen", "127.0.0.1:0", "--data", &data]).fails(1, &["another darkroom serves"]);
    let id = create(&service);
    service.until(&id, |now| now["status"] == "processing");
    assert_eq!(service.kill("-TERM"), Some(0));
    let service = Service::start(&place, &[]);
    assert_eq!(service.wait(&id)["output"], whole);
}

#[test]
fn the_first_signal_lets_open_requests_end_and_the_second_does_not() {
    let place = Place::new();
    let mut service = Service::start(&place, &[]);
    let body = json!({ "input": long(1) }).to_string();
    let held = |service: &Service| {
        let request = service.client.post(format!("{}{DEV_LORA}", service.address)).header("content-type", "application/json");
        let request = request.header("prefer", "wait").body(body.clone());
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async { request.send().await.ok()?.json::<Value>().await.ok() })
        })
    };
    let running = |service: &Service| until("a job runs", 30, || service.get("/darkroom/queue").json()["running"] == 1);
    let open = held(&service);
    running(&service);
    assert_eq!(service.kill("-TERM"), Some(0), "it ends by itself");
    assert_eq!(open.join().unwrap().unwrap()["status"], "succeeded", "what was held is answered first");

    let mut service = Service::start(&place, &[]);
    let open = held(&service);
    running(&service);
    Command::new("kill").args(["-TERM", &service.child.id().to_string()]).status().unwrap();
    // Two at once would be one.
    std::thread::sleep(Duration::from_secs(1));
    let begun = Instant::now();
    assert_eq!(service.kill("-TERM"), Some(130));
    assert!(begun.elapsed() < Duration::from_secs(10) && open.join().unwrap().is_none());
    let service = Service::start(&place, &[]);
    let id = service.get("/v1/predictions").json()["results"][0]["id"].as_str().unwrap().to_owned();
    assert_eq!(service.wait(&id)["status"], "succeeded", "and its job is not lost");
}

#[test]
fn what_serve_refuses() {
    let place = Place::new();
    place.run(&["serve", "--listen", "0.0.0.0:0", "--data", "d"]).fails(1, &["no keys", "--open-to-all"]);
    place.run(&["serve", "--model", "flux9", "--data", "d"]).fails(2, &["flux9"]);
    place.run(&["serve", "--database", "mysql://x", "--data", "d"]).fails(2, &["no database"]);
    place.run(&["keys", "list", "--database", "foo", "--data", "d"]).fails(2, &["foo", "no database"]);
    place.run(&["serve", "--tls", "foo", "--data", "d"]).fails(2, &["--tls", "foo", "auto"]);
    for url in ["foo", "ftp://x", "https://"] {
        // Without a model it ends, whatever it thinks of the address.
        let ran = place.run(&["serve", "--public-url", url, "--model", "flux9", "--listen", "127.0.0.1:0", "--data", "d"]);
        ran.fails(2, &["--public-url", url, "https://"]);
    }
    std::fs::write(place.path("file"), b"x").unwrap();
    place.run(&["serve", "--data", "file"]).fails(1, &["cannot be made"]);
}

#[test]
fn the_doctor_says_what_is_wrong_before_it_is_needed() {
    let place = Place::new();
    let data = place.path("data");
    let data = data.to_str().unwrap();
    let healthy = place.run(&["doctor", "--data", data, "--device", "cpu", "--listen", "127.0.0.1:0", "--json"]).succeeds();
    let found = healthy.json();
    let of = |item: &str| {
        found.as_array().unwrap().iter().find(|finding| finding["item"] == item).unwrap_or_else(|| panic!("{item}: {found}"))
    };
    for item in
        ["machine", "driver", "device", "model", "models here", "data", "cache", "hub's cache", "database", "keys", "port"]
    {
        assert_ne!(of(item)["verdict"], "bad", "{item}");
    }
    assert!(of("model")["text"].as_str().unwrap().starts_with("pocket: weights need about"));
    assert!(of("keys")["text"].as_str().unwrap().contains("darkroom keys create"));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let sick = place.run(&["doctor", "--data", data, "--model", "flux9", "--device", "cuda", "--listen", &address]);
    assert!(!sick.is_success());
    for part in ["BAD   model: model is \"flux9\"", "BAD   device: ", "note  port: ", "cannot be listened on"] {
        assert!(sick.out().contains(part), "{part}: {}", sick.out());
    }
    assert!(sick.err().contains("2 of 11 items are bad"), "{}", sick.err());
}
