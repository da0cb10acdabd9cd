//! `darkroom serve`, and the worker process that it starts.

use std::ffi::OsString;
use std::io::BufRead;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::Context;
use tokio::runtime::Runtime;
use url::Url;

use super::settings::{device, size};
use crate::api::{self, Files, Keep, Options, Server, Tls, Unit};
use crate::blobs::Blobs;
use crate::config::Config;
use crate::engine::DeviceChoice;
use crate::fetch::{CacheView, Limits as FetchLimits, Web};
use crate::jobs::{Limits, Store};
use crate::ops::Machine;
use crate::ops::generate::Precision;
use crate::ops::serve::{Secret, Sign, Work, work};
use crate::ops::{self, models};

/// For a webhook to answer.
const WEBHOOK: Duration = Duration::from_secs(20);

/// Serve pictures over HTTP, to the clients of Replicate, OpenAI and Cog
///
/// Jobs are kept in the data folder (or in the database that --database names) and survive a crash of the service, of the worker and of
/// the machine.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Where to listen
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8000")]
    listen: SocketAddr,
    /// As for generate; give it twice to serve a dev and a schnell model, each with a worker of its own
    #[arg(long, value_name = "MODEL", default_value = "pocket")]
    model: Vec<String>,
    #[command(flatten)]
    place: Place,
    /// s3://bucket/prefix for pictures and uploads (AWS_... set the access) [default: the data folder]
    #[arg(long, value_name = "STORAGE")]
    storage: Option<String>,
    /// Encrypt: auto (a certificate of our own, made on the first start), or CERTIFICATE.pem,KEY.pem
    #[arg(long, value_name = "HOW", value_parser = certificate)]
    tls: Option<Certificate>,
    /// As clients reach this server, if a proxy is in front of it
    #[arg(long, value_name = "URL", value_parser = public_url)]
    public_url: Option<String>,
    /// How pictures are given: links, data (inside the answer), or auto (links over https only, which clients ask for)
    #[arg(long, value_name = "HOW", value_parser = files, default_value = "auto")]
    files: Files,
    /// auto, cpu, cuda, cuda:1 (the second card) or metal
    #[arg(long, value_name = "DEVICE", value_parser = device, default_value = "auto")]
    device: DeviceChoice,
    /// How much of the card may be used, such as 12GiB; the model is made to fit [default: all that is free]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    vram_limit: Option<u64>,
    /// f32, bf16, f16 to compute in; fp8, fp8-products, fp8-merged, q8_0, q6_k, q5_k, q4_k, q4_0 to keep matrices in less memory [default: f32 on a CPU, else
    /// bf16, or what fits the card]
    #[arg(long, value_name = "DTYPE")]
    dtype: Option<Precision>,
    /// Accept requests of others than this machine although there are no keys yet
    #[arg(long)]
    open_to_all: bool,
    /// Jobs that may wait, in all
    #[arg(long, value_name = "JOBS", default_value_t = 1000)]
    queue: u32,
    /// Jobs of one tenant that may wait
    #[arg(long, value_name = "JOBS", default_value_t = 100)]
    queue_of_tenant: u32,
    /// Room for what one tenant sends ahead of its jobs or with them: pictures, LoRAs; each is kept for a day or longer
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "50GiB")]
    files_of_tenant: u64,
    /// New jobs a minute that a tenant may create; 0 for as many as they like
    #[arg(long, value_name = "JOBS", default_value_t = 600)]
    creates_per_minute: u32,
    /// Remove pictures, inputs and logs this long after the end of their job, such as 1h or 30d [default: never]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    keep_pictures: Option<Duration>,
    /// Then forget the job itself this long after its end [default: never]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    keep_jobs: Option<Duration>,
    /// When a LoRA cannot be used: fail, or base (the base model's picture with a warning); requests may say otherwise
    #[arg(long, value_name = "WHAT", value_parser = ["fail", "base"], default_value = "fail")]
    on_lora_error: String,
    /// Heed go_fast of requests: fp8 products, with LoRAs merged before the weights are rounded, where bf16 weights stay on the card
    #[arg(long)]
    go_fast: bool,
    /// A worker that shows no sign of life for so long in a job hangs and is replaced; fifteen times that on a CPU
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "120s")]
    hang_after: Duration,
    /// Be the worker of this name
    #[arg(long, value_name = "NAME", hide = true)]
    worker: Option<String>,
    /// The one of the models that the worker is for
    #[arg(long, value_name = "INDEX", hide = true, default_value_t = 0)]
    worker_model: usize,
}

/// Where a service keeps what it knows.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Place {
    /// Queue, pictures and keys [default: darkroom in the user's data folder]
    #[arg(long, value_name = "FOLDER")]
    data: Option<PathBuf>,
    /// postgres://... instead of a file in the data folder
    #[arg(long, value_name = "ADDRESS", env = "DATABASE_URL", hide_env_values = true)]
    database: Option<String>,
}

impl Place {
    /// The data folder, made if it is not there.
    pub(super) fn folder(&self) -> anyhow::Result<PathBuf> {
        let data = match &self.data {
            Some(data) => data.clone(),
            None => dirs::data_dir().context("there is no data folder; give one with --data")?.join("darkroom"),
        };
        std::fs::create_dir_all(&data).with_context(|| format!("the folder {} cannot be made", data.display()))?;
        Ok(data)
    }

    pub(super) fn database(&self, data: &Path) -> String {
        self.database.clone().unwrap_or_else(|| format!("sqlite:{}", data.join("jobs.db").display()))
    }
}

/// The store of a place, and its folder.
pub(super) fn open(place: &Place) -> anyhow::Result<(Runtime, Store, PathBuf)> {
    open_within(place, Limits::default())
}

fn open_within(place: &Place, limits: Limits) -> anyhow::Result<(Runtime, Store, PathBuf)> {
    let data = place.folder()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let store = runtime.block_on(Store::open(&place.database(&data), limits)).map_err(ops::Error::from)?;
    Ok((runtime, store, data))
}

/// What `--tls` names.
#[derive(Debug, Clone)]
enum Certificate {
    Own,
    Files { certificate: PathBuf, key: PathBuf },
}

fn certificate(text: &str) -> Result<Certificate, String> {
    match text.split_once(',') {
        _ if text == "auto" => Ok(Certificate::Own),
        Some((certificate, key)) => Ok(Certificate::Files { certificate: certificate.into(), key: key.into() }),
        None => Err("must be auto, or CERTIFICATE.pem,KEY.pem".into()),
    }
}

/// Links begin with it, so what a browser would mend is refused.
fn public_url(text: &str) -> Result<String, String> {
    let lower = text.to_ascii_lowercase();
    let after = lower.strip_prefix("https://").or_else(|| lower.strip_prefix("http://"));
    let host = after.is_some_and(|rest| rest.starts_with(|c: char| c.is_alphanumeric() || c == '['));
    let whole = Url::parse(text).is_ok_and(|url| url.query().is_none() && url.fragment().is_none());
    if host && whole && !text.contains(char::is_whitespace) {
        Ok(text.into())
    } else {
        Err("must be an address such as https://pictures.example.com".into())
    }
}

fn files(text: &str) -> Result<Files, String> {
    match text {
        "auto" => Ok(Files::Auto),
        "links" => Ok(Files::Links),
        "data" => Ok(Files::Data),
        _ => Err("must be auto, links or data".into()),
    }
}

/// `90s`, `15m`, `1h`, `30d`.
fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || "must be a number with s, m, h or d, such as 90s or 30d".to_owned();
    let unit = text.chars().last().ok_or_else(wrong)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => return Err(wrong()),
    };
    let number: u64 = text[..text.len() - 1].parse().map_err(|_| wrong())?;
    Ok(Duration::from_secs(number.checked_mul(seconds).ok_or_else(wrong)?))
}

pub(super) fn run(args: Args, config: &Config) -> anyhow::Result<()> {
    let limits = Limits {
        waiting: args.queue.into(),
        waiting_of_tenant: args.queue_of_tenant.into(),
        files_of_tenant: i64::try_from(args.files_of_tenant).unwrap_or(i64::MAX),
        ..Limits::default()
    };
    let (runtime, store, data) = open_within(&args.place, limits)?;
    let storage = args.storage.clone().unwrap_or_else(|| data.join("files").display().to_string());
    let blobs = Blobs::open(&storage, &config.store).map_err(ops::Error::from)?;
    let secret = Secret::of(&data).context("the data folder's secret")?;
    match args.worker {
        Some(name) => {
            let model = args.model.get(args.worker_model).context("there is no such model")?.clone();
            let work = Work {
                store,
                blobs,
                secret,
                name,
                model,
                machine: Machine { device: args.device, vram_limit: args.vram_limit },
                precision: args.dtype,
            };
            be_worker(&work, config, &runtime)
        }
        None => serve(&args, data, (store, blobs, secret), config, &runtime),
    }
}

fn be_worker(by: &Work, config: &Config, runtime: &Runtime) -> anyhow::Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    let seen = stop.clone();
    let (wake, woken) = mpsc::channel();
    // A line says that there is work. The service's end, however it comes, closes this.
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            if line.is_err() || wake.send(()).is_err() {
                break;
            }
        }
        seen.store(true, Ordering::SeqCst);
    });
    work(by, config, runtime.handle(), &stop, &woken, &|sign: Sign| drop(super::show(&sign.to_string())))?;
    Ok(())
}

fn serve(
    args: &Args,
    data: PathBuf,
    (store, blobs, secret): (Store, Blobs, Secret),
    config: &Config,
    runtime: &Runtime,
) -> anyhow::Result<()> {
    let local = args.listen.ip().is_loopback();
    let keys = runtime.block_on(store.has_keys()).map_err(ops::Error::from)?;
    if !local && !args.open_to_all && !keys {
        anyhow::bail!(
            "{} can be reached from other machines, and there are no keys: everybody could use this server; make a key with `darkroom \
             keys create --tenant NAME`, or listen on 127.0.0.1, or add --open-to-all",
            args.listen
        );
    }
    let _lock = lock(&data)?;
    if args.place.database.is_none() {
        // The lock is on what is in the folder.
        runtime.block_on(store.take_over()).map_err(ops::Error::from)?;
    }
    let tls = args.tls.as_ref().map(|how| tls(how, &data, args.listen)).transpose()?;
    if !local && tls.is_none() {
        super::say(
            "warning: without --tls keys and pictures travel in the open; put a proxy that encrypts in front of this server",
        );
    }
    let found = args.model.iter().map(|name| models::resolve(name, config)).collect::<Result<Vec<_>, _>>()?;
    let names: Vec<String> = found.iter().map(|model| model.name.clone()).collect();
    for (base, waiting) in runtime.block_on(store.waiting_by_base()).map_err(ops::Error::from)? {
        if !names.contains(&base) {
            super::say(&format!(
                "warning: {waiting} jobs wait for {base}, which is not served here; they go on waiting until a server has it (--model)"
            ));
        }
    }
    let units: Vec<_> = found.into_iter().map(|model| Arc::new(Unit::new(model, args.hang_after))).collect();
    let limits = FetchLimits { headers: WEBHOOK, stall: WEBHOOK, ..FetchLimits::default() };
    let web = Web::new(config.private_urls, limits)?;
    let options = Options {
        data,
        public_url: args.public_url.clone(),
        files: args.files,
        local,
        https: tls.is_some(),
        creates: NonZeroU32::new(args.creates_per_minute),
        keep: Keep { pictures: args.keep_pictures, jobs: args.keep_jobs },
        without_lora: args.on_lora_error == "base",
        go_fast: args.go_fast,
        loras: config.cache.as_ref().and_then(|cache| CacheView::open(cache.join("loras"), config.lora_cache_bytes).ok()),
    };
    let scheme = if tls.is_some() { "https" } else { "http" };
    let server = Arc::new(Server::new(store, blobs, secret, web, units.clone(), options));
    runtime.block_on(async {
        let listener =
            tokio::net::TcpListener::bind(args.listen).await.with_context(|| format!("cannot listen on {}", args.listen))?;
        let address = format!("{scheme}://{}", listener.local_addr()?);
        let (stop, stopped) = tokio::sync::watch::channel(false);
        let supervisors: Vec<_> = (0..units.len())
            .map(|i| {
                let worker = api::Worker { program: program(), arguments: worker_arguments(i) };
                tokio::spawn(worker.supervise(server.clone(), units[i].clone(), stopped.clone()))
            })
            .collect();
        super::say(&format!("serving {} on {address}; Replicate's clients: REPLICATE_BASE_URL={address}", names.join(" and ")));
        if names.iter().any(|name| name == "pocket") {
            super::say("note: this is pocket, the tiny model for trying it out; give it FLUX.1 with --model");
        }
        super::show(&address)?;
        api::serve(server, listener, tls, signal()).await?;
        stop.send_replace(true);
        for supervisor in supervisors {
            supervisor.await?;
        }
        anyhow::Ok(())
    })
}

fn program() -> OsString {
    std::env::current_exe().map_or_else(|_| "darkroom".into(), Into::into)
}

/// What this process was started with; the worker's name follows.
fn worker_arguments(model: usize) -> Vec<OsString> {
    std::env::args_os().skip(1).chain(["--worker-model".into(), model.to_string().into()]).collect()
}

/// A certificate of our own, for this machine's names, or somebody's files.
fn tls(how: &Certificate, data: &Path, listen: SocketAddr) -> anyhow::Result<Tls> {
    if let Certificate::Files { certificate, key } = how {
        return Ok(Tls::open(certificate, key)?);
    }
    let mut names = vec!["localhost".to_owned(), "127.0.0.1".into(), "::1".into()];
    if !listen.ip().is_loopback() && !listen.ip().is_unspecified() {
        names.push(listen.ip().to_string());
    }
    names.extend(sysinfo::System::host_name());
    let (tls, certificate) = Tls::own(data, &names).context("the certificate")?;
    let path = certificate.display();
    super::say(&format!(
        "the certificate is our own; clients trust it with SSL_CERT_FILE={path} (Python), NODE_EXTRA_CA_CERTS={path} (Node)"
    ));
    Ok(tls)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_can_begin_with_a_public_url() {
        for good in
            ["https://pictures.example.com", "http://10.0.0.7:8000/flux/", "HTTPS://[::1]:8443", "https://münchen.example"]
        {
            assert_eq!(public_url(good).as_deref(), Ok(good));
        }
        for bad in [
            "foo",
            "ftp://x",
            "https://",
            "https:",
            "https:x",
            "https:///x",
            "http://:80",
            "//x",
            "",
            "https://x/?a=1",
            "https://x#a",
            "https://x:port",
            "https://x ",
        ] {
            assert!(public_url(bad).is_err_and(|why| why.contains("https://")), "{bad}");
        }
    }
}
