//! The report of a sweep in a real browser.
//!
//! `scripts/clients FOLDER` installs Playwright; the browser is the machine's own Chromium. Then `DARKROOM_CLIENTS=FOLDER cargo test --test
//! it sweep_browser -- --ignored`.

use std::path::Path;
use std::process::Command;

use crate::cli::Place;
use crate::fixtures;
use crate::serve_clients::clients;

/// Makes a run with these arguments and drives its report.
fn drive(arguments: &[&str]) {
    let place = Place::new();
    let model = fixtures::tiny();
    let mut all = vec!["sweep", "--model", &model, "--width", "32", "-q", "-o", "run"];
    all.extend(arguments);
    place.run(&all).succeeds();
    let output = Command::new(clients().join("python1/bin/python"))
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/report.py"))
        .arg(place.path("run/report.html"))
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}\n{err}");
}

#[test]
#[ignore = "needs Playwright and Chromium"]
fn a_grid_of_two_axes_and_seeds() {
    drive(&["a cat", "--height", "32", "--guidance", "1,2,3", "--steps", "1,2", "--seeds", "3"]);
}

#[test]
#[ignore = "needs Playwright and Chromium"]
fn hostile_prompts_and_shapes() {
    let hostile = "</script><img src=x onerror=alert(1)> {{DATA}} \u{202e}";
    drive(&[hostile, "a cat", "--height", "16,32,64", "--seed", "18446744073709551615,7", "--steps", "1"]);
}

#[test]
#[ignore = "needs Playwright and Chromium"]
fn a_single_picture() {
    drive(&["a cat", "--height", "32", "--steps", "1"]);
}
