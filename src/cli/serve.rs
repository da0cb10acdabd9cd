//! `darkroom serve`, and the worker process that it starts.

use std::ffi::OsString;
use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;

use super::generate::device;
use crate::api::{self, Files, Server};
use crate::config::Config;
use crate::engine::DeviceChoice;
use crate::jobs::{Limits, Store};
use crate::ops::generate::Precision;
use crate::ops::serve::{Work, work};
use crate::ops::{self, models};

/// Serve pictures over HTTP, to Replicate's clients among others
///
/// Jobs are kept in the data folder (or in the database that --database names) and survive a crash of the service, of the worker and of
/// the machine.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Where to listen
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8000")]
    listen: SocketAddr,
    /// As for generate
    #[arg(long, value_name = "MODEL", default_value = "pocket")]
    model: String,
    /// Queue, pictures and keys [default: darkroom in the user's data folder]
    #[arg(long, value_name = "FOLDER")]
    data: Option<PathBuf>,
    /// postgres://... instead of a file in the data folder
    #[arg(long, value_name = "ADDRESS")]
    database: Option<String>,
    /// As clients reach this server, if a proxy is in front of it
    #[arg(long, value_name = "URL")]
    public_url: Option<String>,
    /// How pictures are given: links, data (inside the answer), or auto (links over https only, which clients ask for)
    #[arg(long, value_name = "HOW", value_parser = files, default_value = "auto")]
    files: Files,
    /// auto, cpu, cuda, cuda:1 (the second card) or metal
    #[arg(long, value_name = "DEVICE", value_parser = device, default_value = "auto")]
    device: DeviceChoice,
    /// f32, bf16 or f16 [default: f32 on a CPU, else bf16]
    #[arg(long, value_name = "DTYPE")]
    dtype: Option<Precision>,
    /// Accept requests of others than this machine although there are no keys yet
    #[arg(long)]
    open_to_all: bool,
    /// Be the worker of this name
    #[arg(long, value_name = "NAME", hide = true)]
    worker: Option<String>,
}

fn files(text: &str) -> Result<Files, String> {
    match text {
        "auto" => Ok(Files::Auto),
        "links" => Ok(Files::Links),
        "data" => Ok(Files::Data),
        _ => Err("must be auto, links or data".into()),
    }
}

pub(super) fn run(args: Args, config: &Config) -> anyhow::Result<()> {
    let data = match &args.data {
        Some(data) => data.clone(),
        None => dirs::data_dir().context("there is no data folder; give one with --data")?.join("darkroom"),
    };
    std::fs::create_dir_all(&data).with_context(|| format!("the folder {} cannot be made", data.display()))?;
    let database = args.database.clone().unwrap_or_else(|| format!("sqlite:{}", data.join("jobs.db").display()));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let store = runtime.block_on(Store::open(&database, Limits::default())).map_err(ops::Error::from)?;
    match args.worker {
        Some(name) => {
            let work = Work { store, data, name, model: args.model, device: args.device, precision: args.dtype };
            be_worker(&work, config, &runtime)
        }
        None => serve(&args, data, store, config, &runtime),
    }
}

fn be_worker(by: &Work, config: &Config, runtime: &tokio::runtime::Runtime) -> anyhow::Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    let seen = stop.clone();
    // The service's end, however it comes, closes this.
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        seen.store(true, Ordering::SeqCst);
    });
    work(by, config, runtime.handle(), &stop, || drop(super::show(api::READY)))?;
    Ok(())
}

fn serve(args: &Args, data: PathBuf, store: Store, config: &Config, runtime: &tokio::runtime::Runtime) -> anyhow::Result<()> {
    if !args.listen.ip().is_loopback() && !args.open_to_all {
        anyhow::bail!(
            "{} can be reached from other machines, and there are no keys: everybody could use this server; listen on 127.0.0.1 behind a \
             proxy that asks for a key, or add --open-to-all",
            args.listen
        );
    }
    let _lock = lock(&data)?;
    let model = models::resolve(&args.model, config)?;
    let name = model.name.clone();
    let secret = secret(&data)?;
    let server = Arc::new(Server {
        store,
        model,
        data,
        public_url: args.public_url.clone(),
        files: args.files,
        secret,
        ready: AtomicBool::new(false),
        draining: AtomicBool::new(false),
    });
    let worker = api::Worker { program: std::env::current_exe()?.into(), arguments: worker_arguments() };
    runtime.block_on(async {
        let listener =
            tokio::net::TcpListener::bind(args.listen).await.with_context(|| format!("cannot listen on {}", args.listen))?;
        let address = listener.local_addr()?;
        let (stop, stopped) = tokio::sync::watch::channel(false);
        let supervisor = tokio::spawn(worker.supervise(server.clone(), stopped));
        super::say(&format!("serving {name} on http://{address}; Replicate's clients: REPLICATE_BASE_URL=http://{address}"));
        if name == "pocket" {
            super::say("note: this is pocket, the tiny model for trying it out; give it FLUX.1 with --model");
        }
        super::show(&format!("http://{address}"))?;
        api::serve(server, listener, signal()).await?;
        stop.send_replace(true);
        supervisor.await?;
        anyhow::Ok(())
    })
}

/// What this process was started with; the worker's name follows.
fn worker_arguments() -> Vec<OsString> {
    std::env::args_os().skip(1).chain(["--worker".into()]).collect()
}

/// The first SIGTERM or Ctrl-C. The second ends the process at once, as the system does.
async fn signal() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
            return std::future::pending().await;
        };
        tokio::select! { _ = terminate.recv() => {} _ = interrupt.recv() => {} }
        tokio::spawn(async move {
            tokio::select! { _ = terminate.recv() => {} _ = interrupt.recv() => {} }
            std::process::exit(130);
        });
    }
    #[cfg(not(unix))]
    let _ = tokio::signal::ctrl_c().await;
}

/// One service for each data folder.
fn lock(data: &Path) -> anyhow::Result<std::fs::File> {
    let path = data.join("lock");
    let file = std::fs::File::options().write(true).create(true).truncate(false).open(&path)?;
    if file.try_lock().is_err() {
        anyhow::bail!("another darkroom serves from {}; give this one its own --data", data.display());
    }
    Ok(file)
}

/// Signs links; made once, readable by its owner alone.
fn secret(data: &Path) -> anyhow::Result<[u8; 32]> {
    let path = data.join("secret");
    if let Ok(bytes) = std::fs::read(&path) {
        return bytes.try_into().map_err(|_| anyhow::anyhow!("{} is damaged; remove it", path.display()));
    }
    let mut secret = [0; 32];
    // Two random identifiers of the system's randomness, 122 bits each.
    secret[..16].copy_from_slice(uuid::Uuid::new_v4().as_bytes());
    secret[16..].copy_from_slice(uuid::Uuid::new_v4().as_bytes());
    // Readable by its owner alone, as temporary files are made.
    let mut file = tempfile::NamedTempFile::new_in(data)?;
    std::io::Write::write_all(&mut file, &secret)?;
    file.as_file().sync_all()?;
    file.persist(&path)?;
    Ok(secret)
}
