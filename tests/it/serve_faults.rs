//! Clients that dribble, flood, lie and leave; disks, databases and clocks that fail. Numbers are the rows of the fault list in
//! docs/faults.md.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use candle_core::{DType, Device};
use serde_json::{Value, json};

use crate::cli::Place;
use crate::service::{DEV_LORA, Service, bytes, long, until, user1001};
use crate::site::{Reply, Site};

/// What comes back on a plain connection within `patience` of sending the parts, with a pause before each but the first.
fn talk(service: &Service, parts: &[&[u8]], pause: Duration, patience: Duration) -> String {
    let mut stream = TcpStream::connect(service.address.trim_start_matches("http://")).unwrap();
    for (i, part) in parts.iter().enumerate() {
        if i > 0 {
            std::thread::sleep(pause);
        }
        if stream.write_all(part).is_err() {
            break;
        }
    }
    stream.set_read_timeout(Some(patience)).unwrap();
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(n @ 1..) = stream.read(&mut buffer) {
        answer.extend(&buffer[..n]);
    }
    String::from_utf8_lossy(&answer).into_owned()
}

fn jobs(service: &Service) -> usize {
    service.get("/v1/predictions").json()["results"].as_array().unwrap().len()
}

/// Rows 1 to 3 and 5: whoever is slow is cut off, and others do not notice.
#[test]
fn slow_clients_are_cut_off() {
    let place = Place::new();
    let service = Service::start(&place, &[]);
    let begun = Instant::now();
    let (head, body) = (
        b"POST /v1/predictions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{\"ver".as_slice(),
        Duration::from_secs(40),
    );
    std::thread::scope(|scope| {
        let dribble: [&[u8]; 6] = [b"GET / HTTP/1.1\r\n", b"A", b":", b" ", b"b", b"\r"];
        let headers = scope.spawn({
            let service = &service;
            move || talk(service, &dribble, Duration::from_secs(4), body)
        });
        let nothing = scope.spawn(|| talk(&service, &[b""], Duration::ZERO, body));
        let half = scope.spawn(|| talk(&service, &[head], Duration::ZERO, body));
        for _ in 0..20 {
            assert_eq!(service.get("/health/live").status, 200);
            std::thread::sleep(Duration::from_millis(100));
        }
        headers.join().unwrap();
        nothing.join().unwrap();
        assert!(begun.elapsed() < Duration::from_secs(36), "headers end after 15 s");
        let half = half.join().unwrap();
        assert!(half.starts_with("HTTP/1.1 408"), "{half}");
    });
    assert!(begun.elapsed() < Duration::from_secs(39), "a body may be idle for 30 s");
    assert_eq!(jobs(&service), 0);
}

/// Rows 4 to 9, 18, 19: what is malformed or too much is refused, and nothing is queued.
#[test]
fn malformed_requests_are_refused() {
    let place = Place::new();
    let service = Service::start(&place, &[]);
    let once = |text: &[u8]| talk(&service, &[text], Duration::ZERO, Duration::from_secs(3));
    let status = |text: &[u8]| once(text).split_whitespace().nth(1).unwrap_or("closed").to_owned();
    let big = format!(
        "POST {DEV_LORA} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99999999\r\n\r\n"
    );
    assert_eq!(status(big.as_bytes()), "413", "before the body is read");
    let chunk = vec![b' '; 1 << 20];
    let body = reqwest::Body::from(chunk.repeat(40));
    let sent =
        service.client.post(format!("{}{DEV_LORA}", service.address)).header("content-type", "application/json").body(body);
    let answer = service.runtime.block_on(sent.send());
    assert!(answer.is_err() || answer.unwrap().status() == 413, "and at the limit");
    let long = format!("GET / HTTP/1.1\r\nHost: localhost\r\nX: {}\r\n\r\n", "a".repeat(2_000_000));
    let answer = status(long.as_bytes());
    assert!(["431", "closed"].contains(&answer.as_str()), "{answer}");
    let many = format!("GET / HTTP/1.1\r\nHost: localhost\r\n{}\r\n", "X: y\r\n".repeat(10_000));
    let answer = status(many.as_bytes());
    assert!(["431", "closed"].contains(&answer.as_str()), "{answer}");
    let both = b"POST /v1/predictions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n";
    // The answer's status line is asked, not its text: random ids in it may hold any digits.
    let answer = once(both);
    let answers: Vec<_> = answer.lines().filter(|line| line.contains("HTTP/1.1 ")).collect();
    assert!(answers.len() <= 1 && !answers.concat().contains("HTTP/1.1 404"), "a second request out of one body: {answers:?}");
    assert_eq!(status(b"GET /v1/predictions/%FF%FE HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"), "400");
    assert_eq!(status(b"nonsense\r\n\r\n"), "400");
    assert!(["200", "closed"].contains(&status(b"GET /health/live HTTP/1.0\r\n\r\n").as_str()));
    let wrong = service.send(service.client.delete(format!("{}/v1/predictions", service.address)));
    assert_eq!((wrong.status, wrong.headers["allow"].to_str().unwrap().contains("GET")), (405, true));
    let packed = service.client.post(format!("{}{DEV_LORA}", service.address)).header("content-type", "application/json");
    let packed = packed.header("content-encoding", "gzip").body(vec![0x1f, 0x8b, 8, 0]);
    assert_eq!(service.send(packed).status, 422, "not unpacked, so no bomb");

    // Rows 28 to 33.
    let raw = |text: &str| {
        let request = service.client.post(format!("{}{DEV_LORA}", service.address)).header("content-type", "application/json");
        service.send(request.body(text.to_owned()))
    };
    for bad in [
        "",
        "{",
        "{\"input\": {\"prompt\": \"x\"}} x",
        "[]",
        "nul",
        &"[".repeat(100_000),
        "{\"input\": {\"guidance\": 1e999, \"prompt\": \"x\"}}",
    ] {
        let answer = raw(bad);
        assert_eq!(answer.status, 422, "{bad:.40}: {}", answer.json());
    }
    for wrong in [
        json!({ "prompt": "x", "guidance": "3" }),
        json!({ "prompt": "x", "seed": "1" }),
        json!({ "prompt": "x", "num_outputs": 1_000_000_000u64 }),
        json!({ "prompt": "x", "lora_scale": 3.0001 }),
        json!({ "prompt": "x", "image": "ftp://example.com/a.png" }),
        json!({ "prompt": "x", "image": "http://u:p@example.com/a.png" }),
        json!({ "prompt": "x", "lora_weights": "file:///etc/passwd" }),
        json!({ "prompt": "a\u{0}b" }),
    ] {
        let answer = service.post(DEV_LORA, &[], &json!({ "input": wrong }));
        assert_eq!(answer.status, 422, "{wrong}: {}", answer.json());
        assert!(answer.json()["detail"].as_str().unwrap().starts_with("- input"), "{}", answer.json());
    }
    assert_eq!(jobs(&service), 0);
    // Row 34: a seed below zero is its distance from it; none is drawn, and told.
    let seeded =
        |seed: Value| service.picture(&json!({ "prompt": "x", "num_inference_steps": 1, "seed": seed, "output_format": "png" }));
    assert_eq!(seeded(json!(-5))["output"], seeded(json!(5))["output"]);
    assert_eq!(seeded(json!(7.0))["output"], seeded(json!(7))["output"]);
    let drawn = seeded(Value::Null);
    assert_eq!(seeded(drawn["metrics"]["seed"].clone())["output"], drawn["output"]);
    // Row 39: text is text.
    for prompt in ["\u{202e}مرحبا", "👩‍👩‍👧‍👦 z̷a̷l̷g̷o̷", "   ", &"a ".repeat(4000)] {
        let done = service.picture(&json!({ "prompt": prompt, "num_inference_steps": 1 }));
        assert_eq!(done["status"], "succeeded", "{done}");
    }
    // Row 41: at 0 a LoRA is none. Not the files are compared, which name the LoRA.
    let site = Site::serve(|_| Reply::ok(&std::fs::read(crate::service::user1001()).unwrap()));
    let pixels = |scale: Option<f64>| {
        let mut input = json!({ "prompt": "x", "seed": 1, "num_inference_steps": 2, "output_format": "png" });
        if let Some(scale) = scale {
            input["lora_weights"] = json!(site.url("/a.safetensors"));
            input["lora_scale"] = json!(scale);
        }
        image::load_from_memory(&bytes(&service.picture(&input)["output"][0])).unwrap().into_rgb8()
    };
    assert!(pixels(Some(0.0)) == pixels(None) && pixels(Some(1.0)) != pixels(None));
}

/// Rows 14 and 16: a client that leaves does not take its job along, and one that does not read holds up nobody.
#[test]
fn clients_that_leave() {
    let place = Place::new();
    let service = Service::start(&place, &[]);
    let body = json!({ "input": long(3) }).to_string();
    let request = format!(
        "POST {DEV_LORA} HTTP/1.1\r\nHost: localhost\r\nPrefer: wait\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut stream = TcpStream::connect(service.address.trim_start_matches("http://")).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let begun = Instant::now();
    while jobs(&service) == 0 {
        assert!(begun.elapsed() < Duration::from_secs(20));
    }
    drop(stream);
    let id = service.get("/v1/predictions").json()["results"][0]["id"].as_str().unwrap().to_owned();
    let mut deaf = TcpStream::connect(service.address.trim_start_matches("http://")).unwrap();
    deaf.write_all(format!("GET /darkroom/jobs/{id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes()).unwrap();
    assert_eq!(service.wait(&id)["status"], "succeeded");
    drop(deaf);
}

/// Row 94: a download that hangs is stopped with its job, and holds up nobody for long.
#[test]
fn a_picture_that_never_comes() {
    let site = Site::serve(|_| Reply::silence());
    let place = Place::new();
    let service = Service::start(&place, &[]);
    for input in [
        json!({ "prompt": "x", "image": site.url("/never.png") }),
        json!({ "prompt": "x", "lora_weights": site.url("/never.safetensors") }),
    ] {
        let id = service.post(DEV_LORA, &[], &json!({ "input": input })).json()["id"].as_str().unwrap().to_owned();
        service.until(&id, |now| now["status"] == "processing");
        let worker = service.worker();
        let begun = Instant::now();
        assert_eq!(service.post(&format!("/v1/predictions/{id}/cancel"), &[], &json!({})).status, 200);
        assert_eq!(service.wait(&id)["status"], "canceled");
        assert!(begun.elapsed() < Duration::from_secs(15) && service.worker() == worker);
    }
}

/// Row 106: of a thousand at once as many are accepted as may wait; all of these end.
#[test]
fn a_thousand_at_once() {
    let place = Place::new();
    let service = Arc::new(Service::start(&place, &["--queue", "50", "--queue-of-tenant", "50", "--creates-per-minute", "0"]));
    let input = json!({ "prompt": "x", "num_inference_steps": 1, "megapixels": "0.25" });
    let statuses: Vec<u16> = service.runtime.block_on(async {
        let sends = (0..1000).map(|_| {
            let request =
                service.client.post(format!("{}{DEV_LORA}", service.address)).header("content-type", "application/json");
            request.body(json!({ "input": input }).to_string()).send()
        });
        futures_util::future::join_all(sends).await.into_iter().map(|answer| answer.unwrap().status().as_u16()).collect()
    });
    let accepted = statuses.iter().filter(|status| **status == 201).count();
    assert!(accepted >= 50 && statuses.iter().all(|status| [201, 429, 503].contains(status)), "{accepted}");
    let mut seen = Vec::new();
    let mut page = "/v1/predictions".to_owned();
    loop {
        let list = service.get(&page).json();
        seen.extend(list["results"].as_array().unwrap().iter().map(|job| job["id"].as_str().unwrap().to_owned()));
        match list["next"].as_str() {
            Some(next) => page = next.to_owned(),
            None => break,
        }
    }
    assert_eq!(seen.len(), accepted, "what was refused is not there, what was accepted is");
    assert!(seen.iter().all(|id| service.wait(id)["status"] == "succeeded"));
}

/// Row 109: submitting, cancelling and cancelling again from many sides at once.
#[test]
fn a_storm_of_cancels() {
    let place = Place::new();
    let service = Service::start(&place, &["--creates-per-minute", "0"]);
    let ids: Vec<String> = (0..12)
        .map(|i| service.post(DEV_LORA, &[], &json!({ "input": long(i) })).json()["id"].as_str().unwrap().to_owned())
        .collect();
    service.runtime.block_on(async {
        let cancels = ids
            .iter()
            .cycle()
            .take(120)
            .map(|id| service.client.post(format!("{}/v1/predictions/{id}/cancel", service.address)).send());
        assert!(futures_util::future::join_all(cancels).await.iter().all(|answer| answer.as_ref().unwrap().status() == 200));
    });
    for id in &ids {
        assert_eq!(service.wait(id)["status"], "canceled");
    }
    assert_eq!(service.picture(&json!({ "prompt": "x", "num_inference_steps": 1 }))["status"], "succeeded");
}

/// One whose training went astray: its numbers are finite, and those that come of them are not. It fails its own job alone.
#[test]
fn a_lora_that_overflows_costs_no_worker() {
    let place = Place::new();
    let service = Service::start(&place, &[]);
    let mut tensors = candle_core::safetensors::load(user1001(), &Device::Cpu).unwrap();
    for tensor in tensors.values_mut() {
        *tensor = tensor.to_dtype(DType::F32).unwrap().affine(0., 3e37).unwrap();
    }
    let path = place.path("astray.safetensors");
    candle_core::safetensors::save(&tensors, &path).unwrap();
    let uri = format!("data:application/octet-stream;base64,{}", STANDARD.encode(std::fs::read(&path).unwrap()));
    let plain = json!({ "prompt": "x", "num_inference_steps": 1, "seed": 1 });
    let before = service.picture(&plain);
    let worker = service.worker();
    let mut with = plain.clone();
    with["lora_weights"] = json!(uri);
    for _ in 0..2 {
        let failed = service.picture(&with);
        assert_eq!(
            (failed["status"].as_str(), failed["error_code"].as_str()),
            (Some("failed"), Some("numerical_error")),
            "{failed}"
        );
        assert_eq!(service.picture(&plain)["output"], before["output"]);
    }
    assert_eq!(service.worker(), worker, "the worker lives");
    // A file that came inside a request is kept beside the jobs, not in their rows, which are read again and again.
    let sent = &uri.as_bytes()[uri.len() - 4000..];
    let data = place.path("data");
    for file in std::fs::read_dir(&data).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file()) {
        let bytes = std::fs::read(&file).unwrap();
        assert!(!bytes.windows(64).any(|part| part == &sent[..64]), "{}", file.display());
    }
}

/// Rows 98 and 99: a storage that cannot be written to fails the job in clear words; once it can be, all is well again.
#[test]
fn a_storage_that_fails() {
    let place = Place::new();
    let service = Service::start(&place, &[]);
    let input = json!({ "prompt": "x", "num_inference_steps": 1 });
    assert_eq!(service.picture(&input)["status"], "succeeded");
    // A file in the place of the folder: root may write to every folder.
    let outputs = place.path("data/files/outputs");
    std::fs::rename(&outputs, place.path("away")).unwrap();
    std::fs::write(&outputs, b"").unwrap();
    let failed = service.picture(&input);
    assert_eq!((failed["status"].as_str(), failed["error_code"].as_str()), (Some("failed"), Some("storage")), "{failed}");
    assert!(!failed["error"].as_str().unwrap().contains("data/files"), "no path of ours: {failed}");
    std::fs::remove_file(&outputs).unwrap();
    std::fs::rename(place.path("away"), &outputs).unwrap();
    assert_eq!(service.picture(&input)["status"], "succeeded");
}

/// Row 100 and 105: another program that holds the database makes the service wait, not fail; and nobody need read its log.
#[test]
fn a_locked_database_is_waited_for() {
    let place = Place::new();
    let service = Service::start(&place, &[]);
    service.picture(&json!({ "prompt": "x", "num_inference_steps": 1 }));
    let script = "import sqlite3,sys,time\nc=sqlite3.connect(sys.argv[1],isolation_level=None)\nc.execute('BEGIN IMMEDIATE')\nprint('held',flush=True)\ntime.sleep(3)\nc.execute('COMMIT')";
    let mut holder = Command::new("python3")
        .args(["-c", script])
        .arg(place.path("data/jobs.db"))
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut held = [0; 4];
    holder.stdout.as_mut().unwrap().read_exact(&mut held).unwrap();
    let begun = Instant::now();
    let done = service.picture(&json!({ "prompt": "x", "num_inference_steps": 1 }));
    assert!(done["status"] == "succeeded" && begun.elapsed() > Duration::from_secs(1), "{done}");
    holder.wait().unwrap();
}

/// Of a table of the service's database.
fn rename(place: &Place, from: &str, to: &str) {
    let script = "import sqlite3,sys\nsqlite3.connect(sys.argv[1]).execute(f'ALTER TABLE {sys.argv[2]} RENAME TO {sys.argv[3]}')";
    let database = place.path("data/jobs.db");
    assert!(Command::new("python3").args(["-c", script]).arg(database).args([from, to]).status().unwrap().success());
}

/// A database that fails at once: it is asked again by the worker that has the model, in the middle of a job or between two, and nothing
/// is lost or done twice.
#[test]
fn a_database_that_fails_is_asked_again() {
    let place = Place::new();
    let service = Service::start(&place, &[]);
    service.picture(&json!({ "prompt": "x", "num_inference_steps": 1 }));
    let worker = service.worker();
    let outage = || {
        rename(&place, "jobs", "jobs_away");
        std::thread::sleep(Duration::from_secs(2));
        rename(&place, "jobs_away", "jobs");
    };
    outage();
    let slow = json!({ "input": { "prompt": "x", "num_inference_steps": 20, "num_outputs": 2 } });
    // Who waits for an answer meanwhile is not told to send it again.
    let done = std::thread::scope(|scope| {
        let held = scope.spawn(|| service.post(DEV_LORA, &[("Prefer", "wait=60")], &slow));
        let newest = || service.get("/v1/predictions").json()["results"][0]["status"].clone();
        until("it begins", 20, || newest() == "processing");
        outage();
        held.join().unwrap()
    });
    assert!(done.status < 300 && done.json()["status"] == "succeeded", "{} {}", done.status, done.json());
    assert_eq!(service.worker(), worker, "{}", service.said());
    assert!(service.said().contains("the database is asked again"), "{}", service.said());
}

/// Nor is whoever waits for what was accepted told of it, who would send it again; and a stream does not ask without a pause.
#[test]
fn a_database_that_fails_is_not_told_to_who_waits() {
    let place = Place::new();
    let service = Service::start(&place, &[]);
    service.ready();
    // Hundredths of a second that the service has worked.
    let worked = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", service.child.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    std::thread::scope(|scope| {
        let drawn = json!({ "prompt": "x", "n": 4, "num_inference_steps": 50, "stream": true });
        let streamed = scope.spawn({
            let service = &service;
            move || service.post("/v1/images/generations", &[], &drawn)
        });
        until("the first is accepted", 20, || jobs(&service) == 1);
        let held = scope.spawn(|| service.post(DEV_LORA, &[("prefer", "wait=3")], &json!({ "input": long(1) })));
        until("the second is accepted", 20, || jobs(&service) == 2);
        rename(&place, "jobs", "jobs_away");
        let before = worked();
        std::thread::sleep(Duration::from_secs(4));
        let worked = worked() - before;
        rename(&place, "jobs_away", "jobs");
        let held = held.join().unwrap();
        assert_eq!((held.status, held.json()["id"].is_string()), (202, true), "{}", held.json());
        assert!(worked < 200, "{worked} of 400");
        let streamed = String::from_utf8(streamed.join().unwrap().body).unwrap();
        assert!(streamed.contains("image_generation.completed"), "{streamed:.1000}");
    });
    assert_eq!(jobs(&service), 2);
}

/// A LoRA that comes slowly keeps the device from nobody else: its job is given back, and runs once its LoRA is there.
#[test]
fn a_slow_link_does_not_hold_the_device() {
    let weights = std::fs::read(user1001()).unwrap();
    let piece = weights.len() / 100;
    let site = Site::serve(move |_| Reply::ok(&weights).slowly(piece, Duration::from_millis(200)));
    let place = Place::new();
    let service = Service::start(&place, &[]);
    service.ready();
    let input = json!({ "prompt": "x", "num_inference_steps": 1, "lora_weights": site.url("/slow.safetensors") });
    let slow = service.post(DEV_LORA, &[], &json!({ "input": input })).json()["id"].as_str().unwrap().to_owned();
    service.until(&slow, |job| job["status"] == "processing");
    assert_eq!(service.picture(&json!({ "prompt": "x", "num_inference_steps": 1 }))["status"], "succeeded");
    assert_eq!(service.get(&format!("/v1/predictions/{slow}")).json()["status"], "starting", "{}", service.said());
    let done = service.wait(&slow);
    assert_eq!((done["status"].as_str(), &done["metrics"]["lora_used"]), (Some("succeeded"), &json!(true)), "{done}");
}

/// A short form of the soak: many jobs with and without LoRAs, and memory that does not grow with them. The long one is the same with
/// a thousand.
fn soak(jobs: u64) {
    let weights = std::fs::read(crate::service::user1001()).unwrap();
    let site = Site::serve(move |_| Reply::ok(&weights));
    let place = Place::new();
    let service = Service::start(&place, &["--creates-per-minute", "0", "--keep-pictures", "1s"]);
    let memory = |process: u32| {
        let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
    };
    let one = |i: u64| {
        let mut input = json!({ "prompt": format!("a person {i}"), "seed": i, "num_inference_steps": 1, "megapixels": "0.25" });
        if !i.is_multiple_of(3) {
            input["lora_weights"] = json!(site.url(&format!("/{}.safetensors", i % 5)));
            input["lora_scale"] = json!(0.5 + (i % 4) as f64 / 4.0);
        }
        let done = service.picture(&input);
        assert_eq!(done["status"], "succeeded", "{i}: {done}");
    };
    (0..20).for_each(&one);
    let worker = service.worker();
    let before = (memory(service.child.id()), memory(worker));
    (20..20 + jobs).for_each(&one);
    assert_eq!(service.worker(), worker, "it lived through all");
    let after = (memory(service.child.id()), memory(worker));
    assert!(after.0 < before.0 + 40 && after.1 < before.1 + 60, "from {before:?} to {after:?} MB");
}

#[test]
fn memory_stays_where_it_is() {
    soak(100);
}

#[test]
#[ignore = "takes minutes: cargo test --test it the_soak -- --ignored"]
fn the_soak() {
    soak(1000);
}
