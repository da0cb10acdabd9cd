//! What was measured so far, in a file after each part: a part that fails, or a machine that is taken away, costs no other's figures.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::{Value, json};

pub(crate) struct Report {
    path: Option<PathBuf>,
    all: Value,
    /// What went wrong, in words.
    failures: Vec<String>,
}

impl Report {
    pub(crate) fn new(path: Option<PathBuf>, device: &str) -> anyhow::Result<Self> {
        let all = json!({
            "version": env!("CARGO_PKG_VERSION"), "device": device, "ended": false, "parity": [], "speed": [], "operations": [],
            "loads": [],
        });
        let report = Self { path, all, failures: Vec::new() };
        report.write()?;
        Ok(report)
    }

    /// One more result under `key`.
    pub(crate) fn add(&mut self, key: &str, result: Value) -> anyhow::Result<()> {
        self.all[key].as_array_mut().expect("made above").push(result);
        self.write()
    }

    pub(crate) fn fail(&mut self, what: String) {
        println!("FAILED: {what}");
        self.failures.push(what);
    }

    /// Does a part of the whole, which is noted if it fails.
    pub(crate) fn part(&mut self, name: &str, work: impl FnOnce(&mut Self) -> anyhow::Result<()>) {
        let done = catch_unwind(AssertUnwindSafe(|| work(self)));
        let failure = match done {
            Ok(Ok(())) => return,
            Ok(Err(error)) => format!("{error:#}"),
            Err(_) => "it panicked".into(),
        };
        self.fail(format!("{name}: {failure}"));
    }

    /// A success if nothing failed.
    pub(crate) fn end(mut self) -> anyhow::Result<ExitCode> {
        self.all["ended"] = true.into();
        self.write()?;
        Ok(if self.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    fn write(&self) -> anyhow::Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let mut all = self.all.clone();
        all["failures"] = json!(self.failures);
        all["passed"] = (self.all["ended"] == true && self.failures.is_empty()).into();
        // In one move: whoever is cut off leaves what was there before.
        let part = path.with_extension("part");
        std::fs::write(&part, serde_json::to_string_pretty(&all)?)?;
        Ok(std::fs::rename(part, path)?)
    }
}
