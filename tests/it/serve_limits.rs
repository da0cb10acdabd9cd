//! What one caller sends must neither stop the service for others nor fill it: deep, long and many things, and clients that leave.

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use darkroom::jobs::JobId;
use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};

use crate::cli::Place;
use crate::serve_dialects::png;
use crate::service::{Answer, DEV_LORA, Service, long, user1001};

fn raw(service: &Service, path: &str, body: String) -> Answer {
    let request = service.client.post(format!("{}{path}", service.address)).header("content-type", "application/json");
    service.send(request.body(body))
}

/// Of the service's database.
async fn ask(place: &Place, sql: &'static str) -> sqlx::any::AnyRow {
    sqlx::any::install_default_drivers();
    let pool = sqlx::AnyPool::connect(&format!("sqlite:{}", place.path("data/jobs.db").display())).await.unwrap();
    let row = sqlx::query(sql).fetch_one(&pool).await.unwrap();
    pool.close().await;
    row
}

/// Files that clients sent.
fn kept(place: &Place) -> usize {
    std::fs::read_dir(place.path("data/files/uploads")).map_or(0, Iterator::count)
}

fn listed(service: &Service) -> usize {
    service.get("/v1/files").json()["results"].as_array().unwrap().len()
}

fn tiny() -> Value {
    json!({ "prompt": "x", "num_inference_steps": 1 })
}

#[test]
fn deep_bodies_are_refused_and_the_model_goes_on() {
    let place = Place::new();
    let service = Service::start(&place, &[]);
    for depth in [65, 120, 126] {
        let deep = format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        for (path, status) in [(DEV_LORA, 422), ("/predictions", 422)] {
            let answer = raw(&service, path, format!("{{\"input\": {{\"prompt\": \"x\", \"a\": {deep}}}}}"));
            assert_eq!(answer.status, status, "{path}, {depth}");
        }
        for (path, status) in [("/darkroom/jobs", 422), ("/v1/images/generations", 400)] {
            let answer = raw(&service, path, format!("{{\"prompt\": \"x\", \"a\": {deep}}}"));
            let said = String::from_utf8(answer.body).unwrap();
            assert!(answer.status == status && said.contains("at most 64 are allowed"), "{path}, {depth}: {said}");
        }
        let form = Form::new().text("prompt", "x").text("a", deep.clone()).part("image", Part::bytes(png(64)));
        let edit = service.send(service.client.post(format!("{}/v1/images/edits", service.address)).multipart(form));
        assert_eq!((edit.status, edit.json()["error"]["param"].as_str()), (400, Some("a")), "{depth}");
        let form = Form::new().text("metadata", format!("{{\"a\": {deep}}}")).part("content", Part::bytes(vec![1]));
        assert_eq!(service.send(service.client.post(format!("{}/v1/files", service.address)).multipart(form)).status, 422);
    }
    assert_eq!(service.get("/v1/predictions").json()["results"], json!([]));
    assert_eq!(service.picture(&tiny())["status"], "succeeded");
}

#[test]
fn what_is_kept_of_a_request_is_short() {
    let place = Place::new();
    let service = Service::start(&place, &[]);
    service.ready();
    // As long as a body may be, and of many names.
    let many: Value = (0..50_000).map(|i| (format!("key{i}"), json!(i))).collect::<serde_json::Map<_, _>>().into();
    let mut inputs = [tiny(), tiny()];
    inputs[0]["junk"] = json!(vec![1; 2_000_000]);
    inputs[1].as_object_mut().unwrap().extend(many.as_object().unwrap().clone());
    for input in inputs {
        let done = service.picture(&input);
        assert_eq!((done["status"].as_str(), &done["input"]["prompt"]), (Some("succeeded"), &json!("x")));
        assert!(done["input"]["junk"].is_null() && done["input"].to_string().len() <= 64 << 10);
        let logs = done["logs"].as_str().unwrap();
        assert!(logs.contains("is not one of this model's") && logs.contains("too long to be kept"), "{logs}");
        assert!(logs.len() < 10_000, "{}", logs.len());
        assert_eq!(raw(&service, "/predictions", json!({ "input": input }).to_string()).status, 200);
        let ours = raw(&service, "/darkroom/jobs", input.to_string());
        assert_eq!(ours.status, 202);
        service.wait(ours.json()["id"].as_str().unwrap());
    }
    // A file inside its request is kept beside the jobs, however its scheme is written.
    let lora = format!("DATA:application/octet-stream;base64,{}", STANDARD.encode(std::fs::read(user1001()).unwrap()));
    let mut with = tiny();
    with["lora_weights"] = json!(lora);
    let done = service.picture(&with);
    assert_eq!((&done["metrics"]["lora_used"], kept(&place)), (&json!(true), 1), "{}", done["error"]);
    with = tiny();
    with["num_inference_steps"] = json!(4);
    with["image"] = json!(format!("DATA:image/png;base64,{}", STANDARD.encode(png(64))));
    assert_eq!((service.picture(&with)["status"].as_str(), kept(&place)), (Some("succeeded"), 2));
    let row = service.runtime.block_on(ask(&place, "SELECT MAX(LENGTH(request)), COUNT(*) FROM jobs"));
    let (longest, jobs): (i64, i64) = (sqlx::Row::get(&row, 0), sqlx::Row::get(&row, 1));
    assert!(longest < 80_000 && jobs == 8, "{longest} bytes in one of {jobs}");

    let link = format!("https://example.com/{}", "a".repeat(5000));
    for field in ["lora_weights", "extra_lora", "image", "hf_api_token", "civitai_api_token"] {
        let mut wrong = tiny();
        wrong[field] = json!(link);
        let answer = service.post(DEV_LORA, &[], &json!({ "input": wrong }));
        let said = answer.json()["detail"].as_str().unwrap().to_owned();
        assert!(answer.status == 422 && said.contains("5020 bytes") && said.contains("at most 4096"), "{field}: {said}");
    }
    for (path, status) in [("/darkroom/jobs", 422), ("/v1/images/generations", 400)] {
        for wrong in [json!({ "loras": [{ "weights": link }] }), json!({ "hf_api_token": link }), json!({ "webhook": link })] {
            let mut body = tiny();
            body.as_object_mut().unwrap().extend(wrong.as_object().unwrap().clone());
            assert_eq!(service.post(path, &[], &body).status, status, "{path}");
        }
    }
    assert_eq!(service.post(DEV_LORA, &[], &json!({ "input": tiny(), "webhook": link })).status, 422);
}

#[test]
fn what_is_refused_or_repeated_leaves_no_file() {
    let place = Place::new();
    let service = Service::start(&place, &["--queue-of-tenant", "1"]);
    let running = service.post(DEV_LORA, &[], &json!({ "input": long(1) })).json()["id"].as_str().unwrap().to_owned();
    service.until(&running, |job| job["status"] == "processing");
    let with = |side: u32| {
        let picture = format!("data:image/png;base64,{}", STANDARD.encode(png(side)));
        json!({ "input": { "prompt": "x", "image": picture, "lora_weights": "data:application/octet-stream;base64,AAAA" } })
    };
    let post = |body: &Value| service.post(DEV_LORA, &[("idempotency-key", "k")], body);
    let first = post(&with(64));
    assert_eq!((first.status, kept(&place)), (201, 2), "the picture and the LoRA");
    let again = post(&with(64));
    assert_eq!((again.status, &again.json()["id"]), (201, &first.json()["id"]));
    assert_eq!(post(&with(80)).status, 422, "another request under its key");
    assert_eq!(service.post(DEV_LORA, &[], &with(64)).status, 429, "one waits already");
    let mut wrong = with(64);
    wrong["input"]["extra_lora"] = json!("/etc/passwd");
    assert_eq!(service.post(DEV_LORA, &[], &wrong).status, 422);
    wrong = with(64);
    wrong["webhook"] = json!("http://u:p@example.com/");
    assert_eq!(service.post(DEV_LORA, &[], &wrong).status, 422);
    let form = Form::new().text("prompt", "x").part("image", Part::bytes(png(64)));
    let edit = service.send(service.client.post(format!("{}/v1/images/edits", service.address)).multipart(form));
    assert_eq!(edit.status, 429);
    assert_eq!((kept(&place), listed(&service)), (2, 2));
    service.post(&format!("/v1/predictions/{running}/cancel"), &[], &json!({}));
}

#[test]
fn clients_that_leave_an_upload_leave_no_unknown_file() {
    let place = Place::new();
    let service = Service::start(&place, &[]);
    let start = b"--b\r\nContent-Disposition: form-data; name=\"content\"; filename=\"a.bin\"\r\n\r\n";
    let (content, end) = (vec![7; 8 << 20], b"\r\n--b--\r\n");
    let length = start.len() + content.len() + end.len();
    let head = format!(
        "POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\nContent-Length: {length}\r\n\r\n"
    );
    // Until one is kept that nobody waits for: the server may see first that its client has left.
    for _ in 0..50 {
        let mut stream = TcpStream::connect(service.address.trim_start_matches("http://")).unwrap();
        for part in [head.as_bytes(), start.as_slice(), content.as_slice(), end.as_slice()] {
            stream.write_all(part).unwrap();
        }
        drop(stream);
        std::thread::sleep(Duration::from_millis(100));
        if kept(&place) > 0 {
            break;
        }
    }
    assert!(kept(&place) > 0, "none was kept");
    let begun = Instant::now();
    while kept(&place) != listed(&service) {
        assert!(begun.elapsed() < Duration::from_secs(30), "{} files, of which {} are known", kept(&place), listed(&service));
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn names_of_models_are_bounded_and_come_in_pages() {
    let place = Place::new();
    let service = Service::start(&place, &[]);
    let insert = async {
        let pool = sqlx::AnyPool::connect(&format!("sqlite:{}", place.path("data/jobs.db").display())).await.unwrap();
        sqlx::query(crate::jobs_limits::MODELS).execute(&pool).await.unwrap();
    };
    sqlx::any::install_default_drivers();
    service.runtime.block_on(insert);
    let create = |name: &str| {
        let model = json!({ "owner": "me", "name": name, "visibility": "private", "hardware": "cpu" });
        service.post("/v1/models", &[], &model)
    };
    assert_eq!(create("one").status, 201);
    let refused = create("two");
    assert!(refused.status == 422 && refused.json()["detail"].as_str().unwrap().contains("1000 models"), "{}", refused.json());
    assert!(create("one").json()["detail"].as_str().unwrap().contains("there already"));
    let (mut page, mut sizes) = ("/v1/models".to_owned(), Vec::new());
    loop {
        let list = service.get(&page).json();
        sizes.push(list["results"].as_array().unwrap().len());
        match list["next"].as_str() {
            Some(next) => page = next.to_owned(),
            None => break,
        }
    }
    assert_eq!((sizes[0], &sizes[1..]), (105, [100; 9].as_slice()), "the served ones are on the first page");
    assert_eq!([service.get("/v1/models/me/model-7").status, service.get("/v1/models/me/model-0").status], [200, 404]);
    assert_eq!(service.get("/v1/models?cursor=x").status, 422);
}

#[test]
fn workers_and_keys_are_told_apart() {
    let place = Place::new();
    let service = Service::start(&place, &[]);
    service.picture(&tiny());
    // In containers every service is process 1 and every worker its first.
    let row = service.runtime.block_on(ask(&place, "SELECT worker FROM jobs"));
    let worker: String = sqlx::Row::get(&row, 0);
    assert!(worker.rsplit('-').next().unwrap().parse::<JobId>().is_ok(), "{worker}");
    // Two owners have a model of this name.
    let post = |owner: &str| {
        let path = format!("/v1/models/{owner}/flux-dev-lora/predictions");
        service.post(&path, &[("idempotency-key", "k")], &json!({ "input": tiny() })).status
    };
    assert_eq!([post("black-forest-labs"), post("lucataco"), post("black-forest-labs")], [201, 422, 201]);
}
