//! The official clients, unmodified, against the real program over TLS.
//!
//! They come from PyPI and npm: `scripts/clients FOLDER` installs them, then `DARKROOM_CLIENTS=FOLDER cargo test --test it serve_clients
//! -- --ignored` runs these tests.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cli::Place;
use crate::service::{Service, user1001};
use crate::site::{Reply, Site};

/// Where the clients are installed.
#[expect(clippy::disallowed_methods, reason = "tests may read the environment")]
fn clients() -> PathBuf {
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
    let output = Command::new(clients().join("python2/bin/schemathesis"))
        .args(["run", &format!("{}/darkroom/openapi.json", service.address)])
        .args(["-H", &format!("Authorization: Bearer {}", made.out().trim())])
        .args(["--max-examples", "20", "--phases", "examples,coverage,fuzzing", "--request-timeout", "30", "--no-color"])
        // Streams of jobs that there are none of; and what answers 501 on purpose.
        .args(["--exclude-path-regex", "(stream|events|trainings)$", "--exclude-operation-id", "post__v1_models"])
        // Texts such as a LoRA's reference or a version have more rules than the document can state.
        .args(["--exclude-checks", "positive_data_acceptance"])
        .current_dir(place.path("."))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains(" passed"), "{said}");
}
