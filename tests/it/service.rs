//! `darkroom serve` as a process, for the tests that talk to it.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::cli::Place;

/// The service as a process; killed when dropped.
pub(crate) struct Service {
    pub(crate) child: Child,
    pub(crate) address: String,
    /// What it said on standard error.
    pub(crate) log: PathBuf,
    pub(crate) runtime: tokio::runtime::Runtime,
    pub(crate) client: reqwest::Client,
}

pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: reqwest::header::HeaderMap,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.body)))
    }
}

impl Service {
    pub(crate) fn start(place: &Place, more: &[&str]) -> Self {
        Self::start_with(place, more, &[])
    }

    pub(crate) fn start_with(place: &Place, more: &[&str], environment: &[(&str, &str)]) -> Self {
        let data = place.path("data");
        let arguments = [&["serve", "--listen", "127.0.0.1:0", "--data", data.to_str().unwrap()][..], more].concat();
        let mut command = place.command(&arguments);
        let log = place.path("service.log");
        let file = std::fs::File::options().create(true).append(true).open(&log).unwrap();
        command.env("DARKROOM_PRIVATE_URLS", "1").envs(environment.iter().copied()).stdout(Stdio::piped()).stderr(file);
        let mut child = command.spawn().unwrap();
        let mut address = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut address).unwrap();
        assert!(address.starts_with("http"), "{}", std::fs::read_to_string(&log).unwrap());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        // The service closes a connection after 15 s without a request, which nobody here would notice between two of them.
        let mut client = reqwest::Client::builder().no_proxy().pool_max_idle_per_host(0);
        if let Ok(certificate) = std::fs::read(data.join("tls/certificate.pem")) {
            client = client.tls_certs_only([reqwest::Certificate::from_pem(&certificate).unwrap()]);
        }
        Self { child, address: address.trim().into(), log, runtime, client: client.build().unwrap() }
    }

    pub(crate) fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    pub(crate) fn get_as(&self, key: &str, path: &str) -> Answer {
        self.send(self.client.get(format!("{}{path}", self.address)).bearer_auth(key))
    }

    pub(crate) fn post_as(&self, key: &str, path: &str, body: &Value) -> Answer {
        self.post(path, &[("authorization", &format!("Bearer {key}"))], body)
    }

    /// Waits until the worker has its model.
    pub(crate) fn ready(&self) {
        let begun = Instant::now();
        while self.get("/health/ready").status != 200 {
            assert!(begun.elapsed() < Duration::from_secs(60), "{}", self.said());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub(crate) fn send(&self, request: reqwest::RequestBuilder) -> Answer {
        self.runtime.block_on(async {
            let response = request.send().await.unwrap();
            let (status, headers) = (response.status().as_u16(), response.headers().clone());
            Answer { status, headers, body: response.bytes().await.unwrap().to_vec() }
        })
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        let url = if path.starts_with("http") { path.into() } else { format!("{}{path}", self.address) };
        self.send(self.client.get(url))
    }

    pub(crate) fn post(&self, path: &str, headers: &[(&str, &str)], body: &Value) -> Answer {
        let mut request = self.client.post(format!("{}{path}", self.address)).header("content-type", "application/json");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.send(request.body(body.to_string()))
    }

    /// A finished prediction of flux-dev-lora.
    pub(crate) fn picture(&self, input: &Value) -> Value {
        let answer = self.post(DEV_LORA, &[("prefer", "wait")], &json!({ "input": input }));
        assert_eq!(answer.status, 201, "{}", String::from_utf8_lossy(&answer.body));
        answer.json()
    }

    pub(crate) fn wait(&self, id: &str) -> Value {
        let begun = Instant::now();
        loop {
            let prediction = self.get(&format!("/v1/predictions/{id}")).json();
            if !["starting", "processing"].contains(&prediction["status"].as_str().unwrap()) {
                return prediction;
            }
            assert!(begun.elapsed() < Duration::from_secs(120), "{prediction}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub(crate) fn until(&self, id: &str, is: impl Fn(&Value) -> bool) {
        until(id, 60, || is(&self.get(&format!("/v1/predictions/{id}")).json()));
    }

    pub(crate) fn worker(&self) -> u32 {
        let begun = Instant::now();
        loop {
            let found = Command::new("pgrep").args(["-P", &self.child.id().to_string()]).output().unwrap();
            // Between a worker's death and the next one's start there is none.
            if let Ok(worker) = String::from_utf8(found.stdout).unwrap().trim().parse() {
                return worker;
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "there is no worker");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn kill(&mut self, signal: &str) -> Option<i32> {
        Command::new("kill").args([signal, &self.child.id().to_string()]).status().unwrap();
        self.child.wait().unwrap().code()
    }
}

/// Waits until it is so; fails after so many seconds.
#[track_caller]
pub(crate) fn until(what: &str, seconds: u64, mut is: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is() {
        assert!(begun.elapsed() < Duration::from_secs(seconds), "not within {seconds} s: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) const DEV_LORA: &str = "/v1/models/black-forest-labs/flux-dev-lora/predictions";

/// Some seconds of work.
pub(crate) fn long(seed: u64) -> Value {
    json!({ "prompt": "a portrait", "seed": seed, "num_inference_steps": 50, "num_outputs": 4, "output_format": "png" })
}

/// A data URI's content.
pub(crate) fn bytes(output: &Value) -> Vec<u8> {
    let uri = output.as_str().unwrap();
    STANDARD.decode(uri.split_once(";base64,").unwrap().1).unwrap()
}

pub(crate) fn user1001() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/pocket/people/user1001.safetensors")
}
