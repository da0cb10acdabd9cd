//! The official clients, unmodified, against the real program over TLS.
//!
//! They come from PyPI and npm: `scripts/clients FOLDER` installs them, then `DARKROOM_CLIENTS=FOLDER cargo test --test it serve_clients
//! -- --ignored` runs these tests.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::json;

use crate::cli::Place;
use crate::service::{Service, until, user1001};
use crate::site::{Reply, Site};

/// Where the clients are installed.
#[expect(clippy::disallowed_methods, reason = "tests may read the environment")]
pub(crate) fn clients() -> PathBuf {
    std::env::var_os("DARKROOM_CLIENTS").expect("set DARKROOM_CLIENTS to the folder that scripts/clients made").into()
}

/// Runs a script of `tests/clients` with a service at hand.
fn run(program: impl Fn(&Path) -> PathBuf, script: &str) {
    let clients = clients();
    let site = Site::serve(|request| match request.path.as_str() {
        "/user1001.safetensors" => Reply::ok(&std::fs::read(user1001()).unwrap()),
        _ => Reply::ok(b"<!doctype html>"),
    });
    let place = Place::new();
    let data = place.path("data");
    let made = place.run(&["keys", "create", "--tenant", "me", "--data", data.to_str().unwrap()]);
    let key = made.out().trim().to_owned();
    let service = Service::start(&place, &["--tls", "auto"]);
    service.ready();
    let certificate = data.join("tls/certificate.pem");
    let output = Command::new(program(&clients))
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients").join(script))
        .current_dir(place.path("."))
        .env("BASE", &service.address)
        .env("KEY", key)
        .env("SITE", &site.address)
        .env("SSL_CERT_FILE", &certificate)
        .env("NODE_EXTRA_CA_CERTS", &certificate)
        .env("NODE_PATH", clients.join("node_modules"))
        .env("NO_PROXY", "127.0.0.1,localhost")
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.trim_end().ends_with("all good"), "{out}\n{err}");
}

fn python(environment: &'static str) -> impl Fn(&Path) -> PathBuf {
    move |clients| clients.join(environment).join("bin/python")
}

fn node(_: &Path) -> PathBuf {
    "node".into()
}

#[test]
#[ignore = "needs what scripts/clients installs from PyPI and npm; CI runs it"]
fn replicate_for_python_1() {
    run(python("python1"), "replicate1.py");
}

#[test]
#[ignore = "needs what scripts/clients installs from PyPI and npm; CI runs it"]
fn replicate_for_python_2() {
    run(python("python2"), "replicate2.py");
}

#[test]
#[ignore = "needs what scripts/clients installs from PyPI and npm; CI runs it"]
fn replicate_for_javascript() {
    run(node, "replicate.cjs");
}

#[test]
#[ignore = "needs what scripts/clients installs from PyPI and npm; CI runs it"]
fn openai_for_python() {
    run(python("python1"), "openai_client.py");
}

#[test]
#[ignore = "needs what scripts/clients installs from PyPI and npm; CI runs it"]
fn openai_for_javascript() {
    run(node, "openai.cjs");
}

#[test]
#[ignore = "needs what scripts/clients installs from PyPI and npm; CI runs it"]
fn litellm() {
    run(python("python1"), "litellm_client.py");
}

/// Requests made up from the OpenAPI document, right ones and wrong ones: every answer is one that the document names.
#[test]
#[ignore = "needs what scripts/clients installs from PyPI and npm; CI runs it"]
fn schemathesis() {
    let place = Place::new();
    let data = place.path("data");
    let made = place.run(&["keys", "create", "--tenant", "me", "--admin", "--data", data.to_str().unwrap()]);
    // No job is taken, so that a thousand requests are no hours of work; all that is checked before is checked.
    let service = Service::start(&place, &["--queue-of-tenant", "0", "--creates-per-minute", "0"]);
    // A form has no types: what is no text there is text all the same.
    let forms = ["/v1/files", "/v1/images/edits"].map(|path| {
        format!("[[operations]]\ninclude-path = \"{path}\"\n[operations.checks.negative_data_rejection]\nenabled = false\n\n")
    });
    std::fs::write(place.path("schemathesis.toml"), forms.concat()).unwrap();
    let output = Command::new(clients().join("python2/bin/schemathesis"))
        .args(["run", &format!("{}/darkroom/openapi.json", service.address)])
        .args(["-H", &format!("Authorization: Bearer {}", made.out().trim())])
        // The same requests each time: CI is no place for surprises.
        .args([
            "--seed",
            "1",
            "--max-examples",
            "20",
            "--phases",
            "examples,coverage,fuzzing",
            "--request-timeout",
            "30",
            "--no-color",
        ])
        // Streams of jobs that there are none of; and what answers 501 on purpose.
        .args(["--exclude-path-regex", "(stream|events|trainings|variations)$"])
        // Texts such as a LoRA's reference or a version have more rules than the document can state.
        // And wrong keys are answered 429 after sixty of them.
        .args(["--exclude-checks", "positive_data_acceptance,ignored_auth"])
        .current_dir(place.path("."))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains(" passed"), "{said}");
}

/// Pictures, uploads and their removal in a bucket, on moto's S3.
#[test]
#[ignore = "needs what scripts/clients installs from PyPI and npm; CI runs it"]
fn a_bucket() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("http://127.0.0.1:{port}");
    let mut server = Command::new(clients().join("python1/bin/moto_server"));
    let mut server = server.args(["-p", &port.to_string()]).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let signed = "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/s3/aws4_request";
    let ask = |method: reqwest::Method, path: &str| {
        let request = reqwest::Client::new().request(method, format!("{address}{path}")).header("authorization", signed);
        runtime.block_on(async { request.send().await.ok()?.text().await.ok() })
    };
    until("moto_server starts", 60, || ask(reqwest::Method::PUT, "/pictures").is_some());
    let place = Place::new();
    let environment = [
        ("AWS_ACCESS_KEY_ID", "x"),
        ("AWS_SECRET_ACCESS_KEY", "canary"),
        ("AWS_REGION", "us-east-1"),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_ENDPOINT_URL", &address),
    ];
    let more = ["--storage", "s3://pictures/some/prefix", "--files", "links", "--keep-pictures", "3s"];
    let service = Service::start_with(&place, &more, &environment);
    let done = service.picture(&json!({ "prompt": "x", "num_inference_steps": 1, "output_format": "png" }));
    assert!(service.get(done["output"][0].as_str().unwrap()).body.starts_with(b"\x89PNG"), "{done}");
    let there = || ask(reqwest::Method::GET, "/pictures?list-type=2").unwrap().contains("some/prefix/outputs/");
    assert!(there() && !place.path("data/files").exists());
    until("old pictures go", 30, || !there());
    // A bucket that is away fails jobs, not the service.
    server.kill().unwrap();
    server.wait().unwrap();
    let failed = service.picture(&json!({ "prompt": "x", "num_inference_steps": 1 }));
    assert_eq!(failed["error_code"], "storage", "{failed}");
    assert!(!failed.to_string().contains("canary") && !service.said().contains("canary"));
}
