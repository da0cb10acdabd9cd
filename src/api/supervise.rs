//! The worker process and its supervisor: a card that is lost takes a child with it, not the service.

use std::ffi::OsString;
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::{Notify, watch};

use super::Server;
use crate::jobs::JobId;
use crate::ops::models::Model;
use crate::ops::serve::Sign;

/// Before a worker that died is started again; doubled each time, up to the second.
const PAUSES: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(30)];

/// After so long a worker has not died of its start.
const STEADY: Duration = Duration::from_secs(60);

/// For a worker to give its job back when it is asked to end.
const END: Duration = Duration::from_secs(30);

/// A step takes minutes on a processor.
const SLOW: u32 = 15;

/// One base model and its worker, as the service sees them.
#[derive(Debug)]
pub struct Unit {
    pub model: Model,
    /// Without a sign of life for so long in a job, a worker on a card hangs.
    pub patience: Duration,
    state: Mutex<Life>,
    wake: Notify,
}

/// What is known of the worker.
#[derive(Debug, Clone, Default)]
pub(super) struct Life {
    /// Set once its model is loaded: the device.
    pub(super) device: Option<String>,
    pub(super) job: Option<JobId>,
    pub(super) sign: Option<Instant>,
    pub(super) deaths: u64,
}

impl Unit {
    #[must_use]
    pub fn new(model: Model, patience: Duration) -> Self {
        Self { model, patience, state: Mutex::default(), wake: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, Life> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn life(&self) -> Life {
        self.state().clone()
    }

    /// There is work.
    pub(super) fn wake(&self) {
        self.wake.notify_one();
    }

    /// Whether the worker has its model and shows signs of life.
    pub(super) fn is_ready(&self) -> bool {
        let life = self.life();
        life.device.is_some() && !self.hangs(&life)
    }

    fn hangs(&self, life: &Life) -> bool {
        let slow = life.device.as_deref() == Some("cpu");
        let patience = if slow { self.patience * SLOW } else { self.patience };
        life.device.is_some() && life.sign.is_some_and(|sign| sign.elapsed() > patience)
    }

    fn hear(&self, sign: Sign, server: &Arc<Server>) {
        let mut life = self.state();
        life.sign = Some(Instant::now());
        match sign {
            Sign::Ready(device) => life.device = Some(device),
            Sign::Begun(job) => life.job = Some(job),
            Sign::Alive => {}
            Sign::Ended(job) => {
                life.job = None;
                server.waiters.ended(&job);
                server.ended.notify_one();
                tokio::spawn(server.clone().account(job));
            }
        }
    }
}

/// How to start a worker; `--worker`, its name and its model come last.
#[derive(Debug, Clone)]
pub struct Worker {
    pub program: OsString,
    pub arguments: Vec<OsString>,
}

impl Worker {
    /// Keeps the worker of a unit running until `stop` is true.
    pub async fn supervise(self, server: Arc<Server>, unit: Arc<Unit>, mut stop: watch::Receiver<bool>) {
        let mut pause = PAUSES[0];
        let mut count = 0;
        while !*stop.borrow() {
            count += 1;
            // In containers every service is process 1: among those who share a database only chance tells their workers apart.
            let name = format!("{}-{}-{count}-{}", std::process::id(), unit.model.name, JobId::new());
            let begun = Instant::now();
            let ended = self.run(&name, &server, &unit, &mut stop).await;
            let deaths = unit.life().deaths;
            *unit.state() = Life { deaths: deaths + 1, ..Life::default() };
            if *stop.borrow() {
                // One that did not end in time was killed in the middle of a job, which is not to blame.
                if let Err(error) = server.store.give_back(&name).await {
                    tracing::error!(%error, "the store failed");
                }
                break;
            }
            tracing::error!(worker = name, ?ended, "the worker died");
            // Its job need not wait for the lease to end.
            if let Err(error) = server.store.abandon(&name).await {
                tracing::error!(%error, "the store failed");
            }
            server.reap().await;
            pause = if begun.elapsed() > STEADY { PAUSES[0] } else { (pause * 2).min(PAUSES[1]) };
            let _ = tokio::time::timeout(pause, stop.changed()).await;
        }
    }

    /// One life of a worker. It lives as long as its standard input is open, so that it never outlives the service.
    async fn run(
        &self,
        name: &str,
        server: &Arc<Server>,
        unit: &Unit,
        stop: &mut watch::Receiver<bool>,
    ) -> std::io::Result<ExitStatus> {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).arg("--worker").arg(name);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        // Ctrl-C in a terminal is for the service, which then asks its worker to end.
        #[cfg(unix)]
        command.process_group(0);
        let mut child = command.spawn()?;
        let (mut input, output) = (child.stdin.take(), child.stdout.take());
        let mut lines = output.map(|output| BufReader::new(output).lines());
        let mut look = tokio::time::interval(Duration::from_secs(1));
        loop {
            let line = async {
                match &mut lines {
                    Some(lines) => lines.next_line().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                line = line => match line {
                    Ok(Some(line)) => {
                        if let Ok(sign) = line.parse() {
                            unit.hear(sign, server);
                        }
                    }
                    _ => lines = None,
                },
                () = unit.wake.notified() => {
                    if let Some(input) = &mut input {
                        // If it cannot be written it has died, or reads nothing any more; both are seen below.
                        let _ = tokio::time::timeout(Duration::from_secs(1), input.write_all(b"\n")).await;
                    }
                }
                _ = look.tick() => {
                    let life = unit.life();
                    if unit.hangs(&life) {
                        let job = life.job.as_ref().map(ToString::to_string);
                        let seconds = life.sign.map_or(0, |sign| sign.elapsed().as_secs());
                        tracing::error!(worker = name, job, seconds, "the worker hangs and is killed");
                        child.start_kill()?;
                    }
                }
                ended = child.wait() => return ended,
                _ = stop.changed() => {
                    drop(input);
                    return end(child).await;
                }
            }
        }
    }
}

/// Waits for a worker that was asked to end.
async fn end(mut child: Child) -> std::io::Result<ExitStatus> {
    match tokio::time::timeout(END, child.wait()).await {
        Ok(ended) => ended,
        Err(_) => {
            child.kill().await?;
            child.wait().await
        }
    }
}

impl Server {
    /// Does what time demands in the queue, and wakes those whom it concerns.
    pub(super) async fn reap(&self) {
        match self.store.reap().await {
            Ok(changed) => {
                for job in &changed {
                    tracing::warn!(job = %job.id, status = job.status.as_str(), "changed by time");
                    self.waiters.ended(&job.id);
                    if job.status.is_final() {
                        self.meters.ended(job);
                    }
                }
                if changed.iter().any(|job| !job.status.is_final()) {
                    self.units.iter().for_each(|unit| unit.wake());
                }
                if !changed.is_empty() {
                    self.ended.notify_one();
                }
            }
            Err(error) => tracing::error!(%error, "the store failed"),
        }
    }

    /// Whether new work may be given, of what is being stopped.
    pub(super) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }
}
