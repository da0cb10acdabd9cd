//! What the service adds to the engine's own time, measured on the real program with pocket: `cargo bench --bench serve`.
//!
//! One client, 64 clients, 2000 clients that only wait, creates until the queue is full, and a queue of LoRAs that take long to download.

#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout, reason = "a bench prints, and ends by panicking")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use serde_json::{Value, json};

struct Service {
    child: Child,
    address: String,
    client: reqwest::Client,
    _data: tempfile::TempDir,
}

impl Service {
    fn start(more: &[&str]) -> Self {
        let data = tempfile::tempdir().expect("a folder");
        let mut command = Command::new(env!("CARGO_BIN_EXE_darkroom"));
        command.args(["serve", "--listen", "127.0.0.1:0", "--creates-per-minute", "0", "--data"]).arg(data.path()).args(more);
        command.env("DARKROOM_PRIVATE_URLS", "1").env("XDG_CACHE_HOME", data.path().join("cache"));
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("the program");
        let mut address = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut address).expect("its address");
        let client = reqwest::Client::builder().no_proxy().pool_max_idle_per_host(4096).build().expect("a client");
        Self { child, address: address.trim().into(), client, _data: data }
    }

    async fn ready(&self) {
        while !self.client.get(format!("{}/health/ready", self.address)).send().await.is_ok_and(|answer| answer.status() == 200) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn create(&self, input: &Value, wait: Option<u64>) -> reqwest::RequestBuilder {
        let url = format!("{}/v1/models/black-forest-labs/flux-dev-lora/predictions", self.address);
        let request =
            self.client.post(url).header("content-type", "application/json").body(json!({ "input": input }).to_string());
        match wait {
            Some(seconds) => request.header("prefer", format!("wait={seconds}")),
            None => request,
        }
    }

    /// Resident memory of the service without its worker, in bytes.
    fn memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0) * 1024
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn short(seed: u64) -> Value {
    json!({ "prompt": "a person", "seed": seed, "num_inference_steps": 1, "megapixels": "0.25" })
}

fn milliseconds(mut values: Vec<f64>, share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() as f64 * share) as usize).min(values.len() - 1)] * 1e3
}

fn time(value: &Value) -> DateTime<Utc> {
    value.as_str().and_then(|text| text.parse().ok()).expect("a time")
}

/// Create to result, without the engine's own time.
async fn one_client() {
    let service = Service::start(&[]);
    service.ready().await;
    let mut overhead = Vec::new();
    for i in 0..220 {
        let begun = Instant::now();
        let body: Value = service.create(&short(i), Some(60)).send().await.expect("an answer").json().await.expect("JSON");
        let total = begun.elapsed().as_secs_f64();
        // The first ones warm up.
        if i >= 20 {
            overhead.push(total - body["metrics"]["timings"]["total"].as_f64().expect("a time"));
        }
    }
    let (median, last) = (milliseconds(overhead.clone(), 0.5), milliseconds(overhead, 0.99));
    println!("one client, 200 pictures: overhead {median:.1} ms (median), {last:.1} ms (p99)");
}

/// Until it is accepted, and from its end to the answer: what is left is waiting for others.
async fn many_clients() {
    let service = Arc::new(Service::start(&["--queue-of-tenant", "1000"]));
    service.ready().await;
    let tasks: Vec<_> = (0..64u64)
        .map(|i| {
            let service = service.clone();
            tokio::spawn(async move {
                let mut overhead = Vec::new();
                for j in 0..5 {
                    let sent = Utc::now();
                    let answer = service.create(&short(i * 10 + j), Some(60)).send().await.expect("an answer");
                    let body: Value = answer.json().await.expect("JSON");
                    let got = Utc::now();
                    let lag = (time(&body["created_at"]) - sent).num_microseconds().unwrap_or(0).max(0)
                        + (got - time(&body["completed_at"])).num_microseconds().unwrap_or(0);
                    overhead.push(lag as f64 / 1e6);
                }
                overhead
            })
        })
        .collect();
    let mut overhead = Vec::new();
    for task in tasks {
        overhead.extend(task.await.expect("a client"));
    }
    let (median, last) = (milliseconds(overhead.clone(), 0.5), milliseconds(overhead, 0.99));
    println!("64 clients, 320 pictures: accepting and answering take {median:.1} ms (median), {last:.1} ms (p99)");
}

async fn waiting_clients() {
    let service = Service::start(&["--queue", "5000", "--queue-of-tenant", "5000"]);
    service.ready().await;
    let before = service.memory();
    let long = json!({ "prompt": "x", "num_inference_steps": 50, "num_outputs": 4 });
    let held: Vec<_> = (0..2000).map(|_| tokio::spawn(service.create(&long, Some(60)).send())).collect();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(25) {
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let queue =
        service.client.get(format!("{}/metrics", service.address)).send().await.expect("an answer").text().await.expect("text");
    let waiting = queue.lines().find(|line| line.starts_with("darkroom_requests_held")).unwrap_or_default();
    println!("2000 clients that wait ({waiting}): {:.0} MB more", (service.memory() - before) as f64 / 1e6);
    held.iter().for_each(tokio::task::JoinHandle::abort);
}

async fn creates() {
    const QUEUE: usize = 5000;
    let service = Arc::new(Service::start(&["--queue", "5000", "--queue-of-tenant", "5000"]));
    service.ready().await;
    let long = json!({ "prompt": "x", "num_inference_steps": 50, "num_outputs": 4 });
    let begun = Instant::now();
    let tasks: Vec<_> = (0..32)
        .map(|_| {
            let (service, long) = (service.clone(), long.clone());
            tokio::spawn(async move {
                let (mut accepted, mut refused) = (0, Vec::new());
                let mut full = None;
                while refused.len() < 50 {
                    let sent = Instant::now();
                    let status = service.create(&long, None).send().await.expect("an answer").status().as_u16();
                    match status {
                        201 => accepted += 1,
                        429 | 503 => {
                            full.get_or_insert_with(Instant::now);
                            refused.push(sent.elapsed().as_secs_f64());
                        }
                        other => panic!("{other}"),
                    }
                }
                (accepted, full.expect("full in the end"), refused)
            })
        })
        .collect();
    let (mut accepted, mut refused, mut full) = (0, Vec::new(), begun);
    for task in tasks {
        let (own, at, waits) = task.await.expect("a client");
        accepted += own;
        full = full.max(at);
        refused.extend(waits);
    }
    let rate = f64::from(accepted) / (full - begun).as_secs_f64();
    // One client alone, so that it does not wait for the 31 others.
    let mut alone = Vec::new();
    for _ in 0..100 {
        let sent = Instant::now();
        service.create(&long, None).send().await.expect("an answer");
        alone.push(sent.elapsed().as_secs_f64());
    }
    println!(
        "creates, 32 clients: {accepted} of {QUEUE} accepted at {rate:.0} a second while the worker draws; refused in {:.1} ms (median, 32 \
         clients), {:.1} ms (median, one client), {:.1} ms (p99, one client)",
        milliseconds(refused, 0.5),
        milliseconds(alone.clone(), 0.5),
        milliseconds(alone, 0.99)
    );
}

/// A site on which every LoRA takes `pause` to come.
fn slow_site(file: PathBuf, pause: Duration) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = format!("http://{}", listener.local_addr().expect("an address"));
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let bytes = std::fs::read(&file).expect("the LoRA");
            std::thread::spawn(move || {
                let _ = stream.read(&mut [0; 4096]);
                std::thread::sleep(pause);
                let head = format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", bytes.len());
                let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&bytes));
            });
        }
    });
    address
}

async fn downloads() {
    const PAUSE: Duration = Duration::from_millis(700);
    let site = slow_site(Path::new(env!("CARGO_MANIFEST_DIR")).join("models/pocket/people/user1001.safetensors"), PAUSE);
    let service = Service::start(&[]);
    service.ready().await;
    let mut ids = Vec::new();
    for i in 0..12 {
        let input = json!({
            "prompt": "user1001, a person", "num_inference_steps": 28, "seed": i, "lora_weights": format!("{site}/{i}.safetensors"),
        });
        let body: Value = service.create(&input, None).send().await.expect("an answer").json().await.expect("JSON");
        ids.push(body["id"].as_str().expect("an id").to_owned());
    }
    let mut waited = Vec::new();
    for id in &ids {
        loop {
            let url = format!("{}/v1/predictions/{id}", service.address);
            let body: Value = service.client.get(url).send().await.expect("an answer").json().await.expect("JSON");
            if body["completed_at"].is_string() {
                waited.push(body["metrics"]["timings"]["fetch"].as_f64().expect("a time"));
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    let (first, rest) = (waited[0], waited[1..].to_vec());
    println!(
        "12 LoRAs that take {} ms each to come: the first job waits {:.0} ms for its own, the others {:.1} ms (median), {:.1} ms (most)",
        PAUSE.as_millis(),
        first * 1e3,
        milliseconds(rest.clone(), 0.5),
        milliseconds(rest, 1.0)
    );
}

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let is = |name: &str| wanted.is_empty() || wanted.iter().any(|part| name.contains(part.as_str()));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(async {
        if is("one") {
            one_client().await;
        }
        if is("many") {
            many_clients().await;
        }
        if is("waiting") {
            waiting_clients().await;
        }
        if is("creates") {
            creates().await;
        }
        if is("downloads") {
            downloads().await;
        }
    });
}
