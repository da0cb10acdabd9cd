//! Whether this machine is fit to generate and to serve, item by item, and what to do where it is not.

use std::path::{Path, PathBuf};

use ::models::bundle::Blob;
use serde::Serialize;

use super::generate::device_name;
use super::models::{self, Installed};
use super::proof;
use crate::bytes;
use crate::config::Config;
use crate::engine::{Sizes, memory};
use crate::ops::{Error, Machine};

/// Less free than this on a disk is little, in bytes.
const LITTLE: u64 = 2 << 30;

/// The NVIDIA driver says its version here.
const NVIDIA: &str = "/proc/driver/nvidia/version";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    Good,
    /// It works, but not as well as it could.
    Note,
    Bad,
}

/// What was looked at, and what was found.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    pub item: String,
    pub verdict: Verdict,
    pub text: String,
}

impl Finding {
    #[must_use]
    pub fn new(item: &str, verdict: Verdict, text: impl Into<String>) -> Self {
        Self { item: item.into(), verdict, text: text.into() }
    }
}

/// Device, driver, memory, the model and whether it fits, the other models, and the disks of these folders.
#[must_use]
pub fn examine(model: &str, machine: Machine, folders: &[(&str, PathBuf)], config: &Config) -> Vec<Finding> {
    let mut findings = vec![processor(), driver()];
    let device = machine.open();
    findings.push(match &device {
        Ok(device) if device.is_cpu() => Finding::new(
            "device",
            Verdict::Note,
            "cpu: FLUX.1 takes minutes a step here; with a card, build with --features cuda or metal",
        ),
        Ok(device) => Finding::new("device", Verdict::Good, device_name(device)),
        Err(error) => Finding::new("device", Verdict::Bad, error.to_string()),
    });
    findings.extend(device.iter().filter(|device| device.is_cuda()).map(proof::examine));
    findings.push(fits(model, device.as_ref().ok(), machine, config));
    findings.push(installed(config));
    findings.extend(folders.iter().map(|(item, folder)| disk(item, folder)));
    findings
}

fn processor() -> Finding {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    match memory() {
        Some((free, all)) => Finding::new(
            "machine",
            Verdict::Good,
            format!("{cores} processor cores, {} of {} memory free", bytes::in_words(free), bytes::in_words(all)),
        ),
        None => Finding::new("machine", Verdict::Note, format!("{cores} processor cores; the system does not tell its memory")),
    }
}

fn driver() -> Finding {
    match std::fs::read_to_string(NVIDIA) {
        Ok(text) => {
            let line = text.lines().next().unwrap_or_default();
            let built = if cfg!(feature = "cuda") { "" } else { "; this build has no CUDA: build with --features cuda" };
            let verdict = if cfg!(feature = "cuda") { Verdict::Good } else { Verdict::Note };
            Finding::new("driver", verdict, format!("{}{built}", line.trim_start_matches("NVRM version: ")))
        }
        Err(_) if cfg!(target_os = "macos") => Finding::new("driver", Verdict::Good, "Metal is a part of the system"),
        Err(_) => Finding::new("driver", Verdict::Note, "there is no NVIDIA driver"),
    }
}

/// Whether the model is here, and whether its weights and as much again as a picture needs fit.
fn fits(name: &str, device: Option<&candle_core::Device>, machine: Machine, config: &Config) -> Finding {
    let model = match models::resolve(name, config) {
        Ok(model) => model,
        // What its files will need is known before they are here.
        Err(error @ Error::NotPulled { .. }) => {
            let plan = device.and_then(|device| machine.reckon(device, &|| Ok(Sizes::FLUX1)));
            let plan = match plan {
                Some(Ok(plan)) => format!("; FLUX.1 in bf16 would have {plan}"),
                Some(Err(reason)) => format!("; {reason}"),
                None => String::new(),
            };
            return Finding::new("model", Verdict::Bad, format!("{error}{plan}"));
        }
        Err(error) => return Finding::new("model", Verdict::Bad, error.to_string()),
    };
    let Some(device) = device else { return Finding::new("model", Verdict::Good, model.name) };
    if let Some(plan) = machine.reckon(device, &|| Ok(Sizes::of(&model.bundle, &model.shape)?)) {
        return match plan {
            Ok(plan) => {
                let waits = plan.need.is_some_and(|need| need.sent[0] > 0);
                let verdict = if waits { Verdict::Note } else { Verdict::Good };
                Finding::new("model", verdict, format!("{}: {plan}", model.name))
            }
            Err(error) => Finding::new("model", Verdict::Bad, format!("{}: {error}", model.name)),
        };
    }
    let bundle = &model.bundle;
    let files = [&bundle.transformer, &bundle.t5, &bundle.clip, &bundle.vae].into_iter().flat_map(|files| &files.weights);
    let stored = match files.map(Blob::size).sum::<std::io::Result<u64>>() {
        Ok(bytes) => bytes,
        Err(error) => return Finding::new("model", Verdict::Bad, format!("{}: {error}", model.name)),
    };
    // Files are mostly in 16 bits; a CPU computes in 32.
    let need = if device.is_cpu() { stored * 2 } else { stored };
    let have = kernels::free_memory(device).unwrap_or_else(|| memory().map_or(u64::MAX, |(free, _)| free));
    let place = if device.is_cpu() { "in main memory" } else { "on the card" };
    let text =
        format!("{}: weights need about {} {place}, {} are free", model.name, bytes::in_words(need), bytes::in_words(have));
    if need > have {
        return Finding::new("model", Verdict::Bad, text + "; take a smaller one, such as an fp8 or GGUF file");
    }
    // LoRAs put changed weights beside the pristine ones.
    let (verdict, home) = if 2 * need <= have {
        (Verdict::Good, "beside the changed ones")
    } else {
        (Verdict::Note, "in main memory or in their file")
    };
    Finding::new("model", verdict, format!("{text}; with a LoRA on, pristine weights stay {home}"))
}

fn installed(config: &Config) -> Finding {
    let here: Vec<String> = models::list(config)
        .into_iter()
        .filter(|listed| matches!(listed.installed, Installed::Embedded | Installed::Yes))
        .map(|listed| listed.name)
        .collect();
    let verdict = if here.iter().any(|name| name != "pocket") { Verdict::Good } else { Verdict::Note };
    let more = if verdict == Verdict::Note { "; fetch FLUX.1 with: darkroom models pull NAME" } else { "" };
    Finding::new("models here", verdict, format!("{}{more}", here.join(", ")))
}

/// Whether a folder can be written to, and how much room is there.
fn disk(item: &str, folder: &Path) -> Finding {
    let shown = folder.display();
    if let Err(error) = std::fs::create_dir_all(folder).and_then(|()| tempfile::NamedTempFile::new_in(folder).map(drop)) {
        return Finding::new(item, Verdict::Bad, format!("{shown} cannot be written to: {error}"));
    }
    match fs4::available_space(folder) {
        Ok(free) if free < LITTLE => {
            Finding::new(item, Verdict::Bad, format!("{shown}: only {} are free; make room", bytes::in_words(free)))
        }
        Ok(free) => Finding::new(item, Verdict::Good, format!("{shown}: {} free", bytes::in_words(free))),
        Err(error) => Finding::new(item, Verdict::Note, format!("{shown}: free space is not known ({error})")),
    }
}
