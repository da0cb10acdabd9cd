//! `darkroom doctor`: whether this machine is fit, before it is needed.

use std::net::{SocketAddr, TcpListener};

use super::serve::{Place, open};
use super::settings::{device, size};
use super::show;
use crate::config::Config;
use crate::engine::DeviceChoice;
use crate::ops::Machine;
use crate::ops::doctor::{Finding, Verdict, examine};
use crate::ops::proof::try_kernels;

/// Look at this machine: device, driver, memory, models, disks, database, keys, port
///
/// Makes the data folder, its database, the cache and Hugging Face's cache where they are not there, and brings a database of an older
/// version forward. Nothing else is changed. The exit code is 1 if something is bad.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// As for serve
    #[arg(long, value_name = "MODEL", default_value = "pocket")]
    model: String,
    /// auto, cpu, cuda, cuda:1 (the second card) or metal
    #[arg(long, value_name = "DEVICE", value_parser = device, default_value = "auto")]
    device: DeviceChoice,
    /// How much of the card may be used, such as 12GiB. With a CPU: what the plan for such a card is
    #[arg(long, value_name = "SIZE", value_parser = size)]
    vram_limit: Option<u64>,
    /// Where the server is to listen
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8000")]
    listen: SocketAddr,
    #[command(flatten)]
    place: Place,
    /// Only try darkroom's own kernels on the CUDA card against plain operations, and keep what came out for the next starts
    #[arg(long)]
    kernels: bool,
    /// Print one JSON array
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args, config: &Config) -> anyhow::Result<()> {
    let machine = Machine { device: args.device, vram_limit: args.vram_limit };
    let findings = if args.kernels { try_kernels(machine)? } else { all(args, machine, config) };
    if args.json {
        show(&serde_json::to_string_pretty(&findings)?)?;
    } else {
        for Finding { item, verdict, text } in &findings {
            let verdict = match verdict {
                Verdict::Good => "good",
                Verdict::Note => "note",
                Verdict::Bad => "BAD ",
            };
            show(&format!("{verdict}  {item}: {text}"))?;
        }
    }
    let bad = findings.iter().filter(|finding| finding.verdict == Verdict::Bad).count();
    if bad > 0 { anyhow::bail!("{bad} of {} items are bad", findings.len()) } else { Ok(()) }
}

fn all(args: &Args, machine: Machine, config: &Config) -> Vec<Finding> {
    let mut folders = Vec::new();
    folders.extend(args.place.folder().ok().map(|folder| ("data", folder)));
    folders.extend(config.cache.clone().map(|folder| ("cache", folder)));
    folders.push(("hub's cache", config.hub.cache.clone()));
    let mut findings = examine(&args.model, machine, &folders, config);
    findings.extend(database(args));
    findings.push(match TcpListener::bind(args.listen) {
        Ok(_) => Finding::new("port", Verdict::Good, format!("{} is free", args.listen)),
        Err(error) => Finding::new("port", Verdict::Note, format!("{} cannot be listened on: {error}", args.listen)),
    });
    findings
}

fn database(args: &Args) -> Vec<Finding> {
    let (runtime, store, data) = match open(&args.place) {
        Ok(opened) => opened,
        Err(error) => return vec![Finding::new("database", Verdict::Bad, format!("{error:#}"))],
    };
    let kind = if args.place.database(&data).starts_with("postgres") { "PostgreSQL" } else { "SQLite" };
    let waiting = runtime.block_on(store.waiting());
    let keys = runtime.block_on(store.keys());
    let (Ok(waiting), Ok(keys)) = (waiting, keys) else {
        return vec![Finding::new("database", Verdict::Bad, format!("{kind} does not answer"))];
    };
    let valid = keys.iter().filter(|key| key.revoked_at.is_none()).count();
    let keys = match (keys.len(), valid) {
        (0, _) => Finding::new("keys", Verdict::Note, "none: the server belongs to this machine; darkroom keys create makes one"),
        (_, 0) => {
            Finding::new("keys", Verdict::Bad, "all are revoked: nobody can use the server; darkroom keys create makes one")
        }
        _ => Finding::new("keys", Verdict::Good, format!("{valid} valid")),
    };
    let text =
        format!("{kind}: {} jobs waiting, {} running, {} webhooks to tell", waiting.queued, waiting.running, waiting.untold);
    vec![Finding::new("database", Verdict::Good, text), keys]
}
