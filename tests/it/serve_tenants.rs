//! The service as many use it: keys, tenants, limits, links, what operators see.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cli::Place;
use crate::service::{DEV_LORA, Service, long, until, user1001};
use crate::site::{Reply, Site};

fn key(place: &Place, tenant: &str, more: &[&str]) -> String {
    let data = place.path("data");
    let made = place.run(&[&["keys", "create", "--tenant", tenant, "--data", data.to_str().unwrap()][..], more].concat());
    assert!(made.is_success());
    made.out().trim().to_owned()
}

fn tiny() -> Value {
    json!({ "input": { "prompt": "x", "num_inference_steps": 1, "output_format": "png" } })
}

#[test]
fn what_is_one_tenants_is_not_there_for_another() {
    let place = Place::new();
    let (alice, bob, admin) = (key(&place, "alice", &[]), key(&place, "bob", &[]), key(&place, "ops", &["--admin"]));
    let service = Service::start(&place, &["--files", "links"]);
    // Without a key, with a wrong one, and with one in the address: the same answer.
    for path in ["/v1/predictions", "/v1/account", "/metrics", "/predictions", "/darkroom/queue", "/nowhere"] {
        assert_eq!(service.get(path).status, 401, "{path}");
    }
    let refused = service.get_as(&format!("{alice}x"), "/v1/account");
    assert_eq!((refused.status, refused.json()["title"].as_str()), (401, Some("Unauthenticated")));
    assert_eq!(refused.headers["www-authenticate"], "Bearer");
    assert_eq!(service.get(&format!("/v1/account?key={alice}")).status, 401);
    assert_eq!(service.post(DEV_LORA, &[], &tiny()).status, 401);
    assert_eq!(service.post("/v1/images/generations", &[], &json!({})).json()["error"]["code"], "invalid_api_key");
    // Old clients say Token.
    let old = service.client.get(format!("{}/v1/account", service.address)).header("authorization", format!("Token {alice}"));
    assert_eq!(service.send(old).json()["username"], "alice");
    assert_eq!((service.get("/health/live").status, service.get_as(&alice, "/v1/account").status), (200, 200));

    let created = service.post(DEV_LORA, &[("authorization", &format!("Bearer {alice}")), ("prefer", "wait")], &tiny());
    let (id, link) =
        (created.json()["id"].as_str().unwrap().to_owned(), created.json()["output"][0].as_str().unwrap().to_owned());
    let upload = reqwest::multipart::Form::new().part("content", reqwest::multipart::Part::bytes(vec![1, 2]).file_name("a.bin"));
    let upload = service.client.post(format!("{}/v1/files", service.address)).bearer_auth(&alice).multipart(upload);
    let upload = service.send(upload);
    assert_eq!(upload.status, 201);
    let file = upload.json()["id"].as_str().unwrap().to_owned();
    for path in [
        format!("/v1/predictions/{id}"),
        format!("/predictions/{id}"),
        format!("/v1/files/{file}"),
        format!("/darkroom/jobs/{id}"),
        format!("/darkroom/jobs/{id}/events"),
        format!("/darkroom/jobs/{id}/preview"),
    ] {
        assert_eq!(service.get_as(&bob, &path).status, 404, "{path}");
        assert_eq!(service.get(&path).status, 401, "{path}");
        assert_eq!(service.get_as(&alice, &path).status, if path.ends_with("preview") { 404 } else { 200 }, "{path}");
    }
    assert_eq!(service.post_as(&bob, &format!("/v1/predictions/{id}/cancel"), &json!({})).status, 404);
    assert_eq!(service.send(service.client.delete(format!("{}/v1/files/{file}", service.address)).bearer_auth(&bob)).status, 404);
    let mine = |key: &str, path: &str| service.get_as(key, path).json()["results"].as_array().unwrap().len();
    assert_eq!((mine(&alice, "/v1/predictions"), mine(&bob, "/v1/predictions")), (1, 0));
    assert_eq!((mine(&alice, "/v1/files"), mine(&bob, "/v1/files")), (1, 0));
    // A file of hers is not a picture of his.
    let stolen = json!({ "input": { "prompt": "x", "image": format!("{}/v1/files/{file}", service.address) } });
    let answer = service.post_as(&bob, DEV_LORA, &stolen).json();
    assert!(answer["detail"].as_str().unwrap().contains("not there"), "{answer}");
    // Names of models of their own, as training scripts make them.
    let model = json!({ "owner": "alice", "name": "me", "visibility": "private", "hardware": "cpu" });
    let made = service.post_as(&alice, "/v1/models", &model);
    assert_eq!((made.status, made.json()["latest_version"].clone()), (201, Value::Null), "{}", made.json());
    assert_eq!(service.post_as(&alice, "/v1/models", &model).status, 422, "there already");
    assert_eq!(
        service
            .post_as(&bob, "/v1/models", &json!({ "owner": "a/b", "name": "x", "visibility": "private", "hardware": "x" }))
            .status,
        422
    );
    let seen = |key: &str| service.get_as(key, "/v1/models/alice/me").status;
    assert_eq!((seen(&alice), seen(&bob), mine(&alice, "/v1/models"), mine(&bob, "/v1/models")), (200, 404, 6, 5));
    let own = service.get_as(&alice, "/v1/models/alice/me/versions").json();
    assert_eq!(own["results"], json!([]));
    let delete = |key: &str| {
        service.send(service.client.delete(format!("{}/v1/models/alice/me", service.address)).bearer_auth(key)).status
    };
    assert_eq!((delete(&bob), delete(&alice), seen(&alice)), (404, 204, 404));
    // The same idempotency key is another one for another tenant.
    let created = |key: &str| {
        let headers = [("authorization", &*format!("Bearer {key}")), ("idempotency-key", "k")];
        service.post(DEV_LORA, &headers, &tiny()).json()["id"].as_str().unwrap().to_owned()
    };
    assert!(created(&alice) == created(&alice) && created(&alice) != created(&bob));
    // Links need no key; secrets of webhooks differ; metrics are the operator's.
    assert_eq!(service.get(&link).status, 200);
    let secret = |key: &str| service.get_as(key, "/v1/webhooks/default/secret").json()["key"].as_str().unwrap().to_owned();
    assert!(secret(&alice) != secret(&bob) && secret(&alice).starts_with("whsec_"));
    assert_eq!((service.get_as(&alice, "/metrics").status, service.get_as(&admin, "/metrics").status), (403, 200));
    // Revoked is revoked, at once and for good.
    let data = place.path("data");
    let listed = place.run(&["keys", "list", "--json", "--data", data.to_str().unwrap()]);
    let listed: Value = serde_json::from_str(&listed.out()).unwrap();
    let entry = listed.as_array().unwrap().iter().find(|key| key["tenant"] == "alice").unwrap();
    // `dk_ID_SECRET`, of which the last may have such a line itself.
    let secret = alice.splitn(3, '_').nth(2).unwrap();
    assert!(secret.len() > 20 && !listed.to_string().contains(secret), "secrets are not kept");
    assert!(place.run(&["keys", "revoke", entry["id"].as_str().unwrap(), "--data", data.to_str().unwrap()]).is_success());
    assert_eq!((service.get_as(&alice, "/v1/account").status, service.get_as(&bob, "/v1/account").status), (401, 200));
    place.run(&["keys", "revoke", "nobody", "--data", data.to_str().unwrap()]).fails(1, &["there is no key"]);
    place.run(&["keys", "create", "--tenant", "a/b", "--data", data.to_str().unwrap()]).fails(2, &["letters"]);
}

#[test]
fn a_private_lora_needs_its_token_every_time() {
    let weights = std::fs::read(user1001()).unwrap();
    let hub = Site::serve(move |request| {
        if request.header("authorization") != Some("Bearer hf_canary_alice") {
            return Reply::new("401 Unauthorized", &[], b"");
        }
        match request.path.as_str() {
            path if path.starts_with("/api/models/") => Reply::json(&json!({
                "sha": "0123456789012345678901234567890123456789",
                "siblings": [{ "rfilename": "lora.safetensors" }],
            })),
            _ => Reply::new("200 OK", &[("ETag", "\"e1\"")], &weights),
        }
    });
    let place = Place::new();
    let (alice, bob, admin) = (key(&place, "alice", &[]), key(&place, "bob", &[]), key(&place, "ops", &["--admin"]));
    // The operator's own token must not help anybody.
    let environment = [("HF_ENDPOINT", hub.address.as_str()), ("HF_TOKEN", "hf_canary_alice"), ("RUST_LOG", "debug,h2=info")];
    let service = Service::start_with(&place, &[], &environment);
    let ask = |key: &str, token: Option<&str>| {
        let mut input =
            json!({ "prompt": "x", "num_inference_steps": 1, "lora_weights": "alice/private", "output_format": "png" });
        if let Some(token) = token {
            input["hf_api_token"] = json!(token);
        }
        let headers = [("authorization", &*format!("Bearer {key}")), ("prefer", "wait")];
        service.post(DEV_LORA, &headers, &json!({ "input": input })).json()
    };
    let refused = ask(&bob, None);
    assert_eq!(
        (refused["status"].as_str(), refused["error_code"].as_str()),
        (Some("failed"), Some("lora_unauthorized")),
        "{refused}"
    );
    let hers = ask(&alice, Some("hf_canary_alice"));
    assert_eq!(
        (hers["status"].as_str(), hers["input"]["hf_api_token"].as_str()),
        (Some("succeeded"), Some("[REDACTED]")),
        "{hers}"
    );
    assert!(hers["metrics"]["lora_used"] == true && hers["metrics"]["loras"][0]["sha256"].as_str().unwrap().len() == 64);
    // The operator sees the file and its size, nobody else does, and nobody sees where it came from.
    let cached = service.get_as(&admin, "/darkroom/loras");
    let digest = cached.json()["loras"][0]["sha256"].as_str().unwrap().to_owned();
    assert_eq!(hers["metrics"]["loras"][0]["sha256"], digest.as_str());
    assert!(!cached.json().to_string().contains("alice"), "{}", cached.json());
    assert_eq!((service.get_as(&alice, "/darkroom/loras").status, service.get_as(&bob, "/darkroom/loras").status), (403, 403));
    let delete = |key: &str, digest: &str| {
        let request = service.client.delete(format!("{}/darkroom/loras/{digest}", service.address)).bearer_auth(key);
        service.send(request).status
    };
    assert_eq!((delete(&alice, &digest), delete(&admin, "../secret"), delete(&admin, "00")), (403, 404, 404));
    // It is in the cache now, and in memory; for him it is still not there.
    for token in [None, Some("hf_canary_bob")] {
        assert_eq!(ask(&bob, token)["error_code"], "lora_unauthorized");
    }
    // On demand the base model's picture, and it says so.
    let headers = [("authorization", &*format!("Bearer {bob}")), ("prefer", "wait")];
    let input = json!({ "prompt": "x", "num_inference_steps": 1, "lora_weights": "alice/private", "on_lora_error": "base" });
    let base = service.post(DEV_LORA, &headers, &json!({ "input": input })).json();
    assert_eq!((base["status"].as_str(), base["metrics"]["lora_used"].as_bool()), (Some("succeeded"), Some(false)), "{base}");
    assert!(
        base["logs"].as_str().unwrap().contains("without the LoRA")
            && base["metrics"]["lora_error"]["code"] == "lora_unauthorized"
    );
    // The tokens are nowhere: not in the log, not in the database, not in an answer.
    assert!(service.said().contains("answered"), "there is a log to look at");
    let mut places = vec![service.said().into_bytes(), service.get_as(&alice, "/v1/predictions").body];
    for file in ["jobs.db", "jobs.db-wal"] {
        places.push(std::fs::read(place.path("data").join(file)).unwrap_or_default());
    }
    for bytes in places {
        assert!(!String::from_utf8_lossy(&bytes).contains("hf_canary"), "a token lies open");
    }
}

#[test]
fn what_is_too_much_is_refused_with_the_time_to_wait() {
    let place = Place::new();
    let (alice, bob) = (key(&place, "alice", &[]), key(&place, "bob", &[]));
    let service = Service::start(&place, &["--queue-of-tenant", "2", "--queue", "3", "--creates-per-minute", "6"]);
    let create = |key: &str| service.post_as(key, DEV_LORA, &json!({ "input": long(1) }));
    let running = create(&alice).json()["id"].as_str().unwrap().to_owned();
    let status = || service.get_as(&alice, &format!("/v1/predictions/{running}")).json()["status"].clone();
    until("the first job runs", 60, || status() == "processing");
    assert_eq!([create(&alice).status, create(&alice).status], [201, 201]);
    let (own, all) = (create(&alice), [create(&bob), create(&bob)]);
    assert_eq!((own.status, all[0].status, all[1].status), (429, 201, 503));
    for refused in [&own, &all[1]] {
        let seconds: u64 = refused.headers["retry-after"].to_str().unwrap().parse().unwrap();
        assert!((1..=600).contains(&seconds));
    }
    // Six a minute: the fifth and sixth are counted as well, the seventh is too fast.
    let answers: Vec<_> = (0..4).map(|_| create(&alice)).collect();
    let fast = answers.last().unwrap();
    assert_eq!(fast.status, 429);
    assert!(fast.json()["detail"].as_str().unwrap().contains("rate limit resets in ~"), "{}", fast.json());
    let retry: u64 = fast.headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=11).contains(&retry), "{retry}");
    // Guessing keys is slowed down as well.
    let statuses: Vec<u16> = (0..200).map(|_| service.get_as("dk_wrong", "/v1/account").status).collect();
    assert_eq!((statuses[0], *statuses.last().unwrap()), (401, 429));
    assert_eq!(service.get_as(&bob, "/v1/account").status, 200, "a right key is never in the way");
}

/// Forty-eight events for somebody who never answers: those of another tenant are told at once all the same.
#[test]
fn a_silent_receiver_holds_up_nobody_elses_webhooks() {
    let site = Site::serve(|request| if request.path == "/silent" { Reply::silence() } else { Reply::ok(b"") });
    let place = Place::new();
    let (alice, bob) = (key(&place, "alice", &[]), key(&place, "bob", &[]));
    let service = Service::start(&place, &[]);
    let create = |key: &str, path: &str, more: &[(&str, &str)]| {
        let mut body = tiny();
        body["webhook"] = json!(site.url(path));
        let made = service.post(DEV_LORA, &[&[("authorization", &*format!("Bearer {key}"))][..], more].concat(), &body);
        assert_eq!(made.status, 201, "{}", made.json());
    };
    for _ in 0..11 {
        create(&alice, "/silent", &[]);
    }
    create(&alice, "/silent", &[("prefer", "wait")]);
    create(&bob, "/told", &[("prefer", "wait")]);
    let begun = Instant::now();
    while site.count("/told") < 4 {
        assert!(begun.elapsed() < Duration::from_secs(10), "{} of 4 were told", site.count("/told"));
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn files_of_a_tenant_take_no_more_room_than_they_may() {
    let place = Place::new();
    let service = Service::start(&place, &["--files-of-tenant", "1MB"]);
    let files = format!("{}/v1/files", service.address);
    let upload = |bytes: usize| {
        let part = reqwest::multipart::Part::bytes(vec![7; bytes]).file_name("a.bin");
        service.send(service.client.post(&files).multipart(reqwest::multipart::Form::new().part("content", part)))
    };
    let kept = upload(900_000).json()["id"].as_str().unwrap().to_owned();
    let refused = upload(200_000);
    assert_eq!((refused.status, refused.json()["title"].as_str()), (413, Some("No room for more files")));
    assert!(refused.json()["detail"].as_str().unwrap().contains("1.0 MB"), "{}", refused.json());
    // What comes inside a request needs room too.
    let lora = format!("data:application/octet-stream;base64,{}", "A".repeat(400_000));
    let refused = service.post(DEV_LORA, &[], &json!({ "input": { "prompt": "x", "lora_weights": lora } }));
    assert_eq!(refused.status, 413, "{}", refused.json());
    // Nothing of what was refused lies about, and a file that is deleted makes room.
    let stored = std::fs::read_dir(place.path("data/files/uploads")).unwrap().count();
    assert_eq!(stored, 1);
    assert_eq!(service.send(service.client.delete(format!("{files}/{kept}"))).status, 204);
    assert_eq!(upload(200_000).status, 201);
}

#[test]
fn without_keys_only_this_machine_is_served() {
    let place = Place::new();
    let service = Service::start(&place, &[]);
    let with = |name: &str, value: &str| service.post(DEV_LORA, &[(name, value)], &tiny()).status;
    assert_eq!([with("host", "evil.example"), with("origin", "https://evil.example"), with("origin", "null")], [403, 403, 403]);
    assert_eq!([with("host", "localhost:1"), with("origin", "http://localhost:3000")], [201, 201]);
    let form = service
        .client
        .post(format!("{}{DEV_LORA}", service.address))
        .header("content-type", "text/plain")
        .body(tiny().to_string());
    assert_eq!(service.send(form).status, 415);
}

#[test]
fn over_tls_pictures_are_links() {
    let place = Place::new();
    let service = Service::start(&place, &["--tls", "auto"]);
    assert!(service.address.starts_with("https://127.0.0.1:"));
    let done = service.picture(&tiny()["input"]);
    let link = done["output"][0].as_str().unwrap();
    assert!(link.starts_with(&format!("{}/outputs/", service.address)), "{link}");
    assert!(service.get(link).body.starts_with(b"\x89PNG"));
    let kept = std::fs::read(place.path("data/tls/certificate.pem")).unwrap();
    drop(service);
    let service = Service::start(&place, &["--tls", "auto"]);
    assert_eq!(std::fs::read(place.path("data/tls/certificate.pem")).unwrap(), kept, "clients trust it already");
    assert_eq!(service.get("/health/live").status, 200);
    // A source with a certificate that nobody vouches for, such as this one.
    let from = format!("{}/me.safetensors", service.address);
    let failed = service.picture(&json!({ "prompt": "x", "num_inference_steps": 1, "lora_weights": from }));
    assert_eq!((failed["status"].as_str(), failed["error_code"].as_str()), (Some("failed"), Some("lora_tls_error")), "{failed}");
    // Plain words to an encrypted port, and silence, are cut off without harm.
    let host = service.address.trim_start_matches("https://");
    let mut stream = TcpStream::connect(host).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP/1.1 200"));
    place.run(&["serve", "--tls", "nowhere.pem,key.pem", "--data", "d"]).fails(1, &["nowhere.pem cannot be used"]);
    place.run(&["serve", "--tls", "on", "--data", "d"]).fails(2, &["--tls", "must be auto"]);
}

#[test]
fn what_operators_see() {
    let place = Place::new();
    let service = Service::start_with(&place, &[], &[("RUST_LOG", "info"), ("DARKROOM_LOG_FORMAT", "json")]);
    service.ready();
    service.picture(&tiny()["input"]);
    let named = service.client.get(format!("{}/v1/account", service.address)).header("x-request-id", "mine-1");
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let named = service.send(named.header("traceparent", format!("00-{trace}-00f067aa0ba902b7-01")));
    assert_eq!(named.headers["x-request-id"], "mine-1");
    assert_eq!(service.get("/v1/account").headers["x-request-id"].len(), 32);
    let numbers = || String::from_utf8(service.get("/metrics").body).unwrap();
    until("the job is counted", 5, || numbers().contains("darkroom_jobs_total{status=\"succeeded\",code=\"\"} 1"));
    let numbers = numbers();
    for part in [
        "darkroom_queue_jobs 0",
        "darkroom_stage_seconds_bucket{stage=\"denoise\",le=\"300\"} 1",
        "darkroom_worker_ready{model=\"pocket\"} 1",
        "darkroom_lora_total{lora=\"none\"} 1",
        "route=\"/v1/models/{owner}/{name}/predictions\",status=\"201\"} 1",
    ] {
        assert!(numbers.contains(part), "{part} is not in\n{numbers}");
    }
    let lines = service.said();
    let line = lines.lines().find(|line| line.contains("mine-1")).unwrap();
    let line: Value = serde_json::from_str(line).unwrap();
    assert_eq!((line["span"]["id"].as_str(), line["span"]["trace"].as_str()), (Some("mine-1"), Some(trace)));
}

#[test]
fn a_worker_that_hangs_is_replaced_and_one_that_is_paused_is_fenced() {
    let place = Place::new();
    // A CPU is given fifteen times as long.
    let service = Service::start(&place, &["--hang-after", "1s"]);
    let whole = service.picture(&long(9))["output"].clone();
    let id = service.post(DEV_LORA, &[], &json!({ "input": long(9) })).json()["id"].as_str().unwrap().to_owned();
    service.until(&id, |now| now["logs"].as_str().unwrap().contains("10/200"));
    let worker = service.worker();
    Command::new("kill").args(["-STOP", &worker.to_string()]).status().unwrap();
    let begun = Instant::now();
    until("it is found to hang", 40, || service.get("/health/ready").status != 200);
    assert!(begun.elapsed() > Duration::from_secs(10), "it was given its time");
    assert_eq!(service.get("/health/live").status, 200);
    let done = service.wait(&id);
    assert_eq!((done["status"].as_str(), &done["output"]), (Some("succeeded"), &whole));
    assert_ne!(service.worker(), worker);
}

#[test]
fn old_pictures_go() {
    let place = Place::new();
    let service = Service::start(&place, &["--keep-pictures", "6s", "--files", "links"]);
    let done = service.picture(&tiny()["input"]);
    let (id, link) = (done["id"].as_str().unwrap(), done["output"][0].as_str().unwrap());
    assert_eq!(service.get(link).status, 200);
    service.until(id, |now| now["data_removed"] == true);
    let now = service.get(&format!("/v1/predictions/{id}")).json();
    assert_eq!((&now["output"], &now["input"], now["logs"].as_str()), (&Value::Null, &json!({}), Some("")));
    assert_eq!((now["status"].as_str(), now["model"].as_str()), (Some("succeeded"), Some("black-forest-labs/flux-dev-lora")));
    assert_eq!(std::fs::read_dir(place.path("data/files/outputs")).unwrap().count(), 0, "no empty folder is left of it");
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(service.get(link).status, 404);
}

#[test]
fn two_services_share_a_queue_and_their_pictures() {
    let Some(server) = crate::jobs::Postgres::get() else {
        println!("PostgreSQL is not installed: nothing was tested");
        return;
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let database = runtime.block_on(server.database());
    let (one, two) = (Place::new(), Place::new());
    let storage = one.path("shared").display().to_string();
    let more = ["--database", &database, "--storage", &storage, "--files", "links"];
    let first = Service::start(&one, &more);
    // Links are signed with the data folder's secret, so that is shared as well.
    std::fs::create_dir_all(two.path("data")).unwrap();
    std::fs::copy(one.path("data/secret"), two.path("data/secret")).unwrap();
    let second = Service::start(&two, &more);
    let made = first.post(DEV_LORA, &[], &json!({ "input": long(5) })).json();
    let id = made["id"].as_str().unwrap();
    let done = second.wait(id);
    assert_eq!(done["status"], "succeeded");
    for link in done["output"].as_array().unwrap() {
        assert!(first.get(&link.as_str().unwrap().replace(&second.address, &first.address)).body.starts_with(b"\x89PNG"));
    }
    // While one of them works, the other takes the next; whoever holds a request hears of what the other did.
    let ids: Vec<String> = (0..2)
        .map(|i| first.post(DEV_LORA, &[], &json!({ "input": long(i) })).json()["id"].as_str().unwrap().to_owned())
        .collect();
    let held = first.post(DEV_LORA, &[("prefer", "wait")], &tiny());
    assert_eq!(held.json()["status"], "succeeded", "{}", held.json());
    let workers: Vec<Value> = ids.iter().map(|id| second.wait(id)["status"].clone()).collect();
    assert_eq!(workers, ["succeeded", "succeeded"]);
    let ended = |service: &Service| {
        let numbers = String::from_utf8(service.get("/metrics").body).unwrap();
        let line = numbers.lines().find(|line| line.starts_with("darkroom_jobs_total{status=\"succeeded\"")).map(str::to_owned);
        line.and_then(|line| line.rsplit(' ').next()?.parse::<u32>().ok()).unwrap_or(0)
    };
    until("both have worked", 20, || ended(&first) > 0 && ended(&second) > 0);
}

#[test]
fn each_model_has_its_own_worker() {
    let place = Place::new();
    let tiny_schnell = crate::fixtures::path("tiny-schnell");
    let service = Service::start(&place, &["--model", "pocket", "--model", tiny_schnell.to_str().unwrap()]);
    let of = |name: &str| {
        let input = json!({ "prompt": "x", "num_inference_steps": 1, "output_format": "png" });
        let path = format!("/v1/models/black-forest-labs/{name}/predictions");
        let done = service.post(&path, &[("prefer", "wait")], &json!({ "input": input })).json();
        assert_eq!(done["status"], "succeeded", "{done}");
        done["metrics"]["base"]["name"].as_str().unwrap().to_owned()
    };
    assert_eq!([of("flux-dev"), of("flux-schnell"), of("flux-schnell-lora")], ["pocket", "tiny-schnell", "tiny-schnell"]);
    service.ready();
    let workers = service.get("/health/ready").json()["workers"].as_array().unwrap().len();
    assert_eq!(workers, 2);
}
