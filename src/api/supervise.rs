//! The worker process and its supervisor: a card that is lost takes a child with it, not the service.

use std::ffi::OsString;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;
use tokio::sync::watch;

use super::Server;

/// Before a worker that died is started again; doubled each time, up to the second.
const PAUSES: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(30)];

/// After so long a worker has not died of its start.
const STEADY: Duration = Duration::from_secs(60);

/// For a worker to give its job back when it is asked to end.
const END: Duration = Duration::from_secs(30);

/// How to start a worker; its name comes last.
#[derive(Debug, Clone)]
pub struct Worker {
    pub program: OsString,
    pub arguments: Vec<OsString>,
}

impl Worker {
    /// Keeps a worker running until `stop` is true, and the queue in order all the while.
    pub async fn supervise(self, server: Arc<Server>, mut stop: watch::Receiver<bool>) {
        let reaper = tokio::spawn(reap(server.clone()));
        let mut pause = PAUSES[0];
        let mut count = 0;
        while !*stop.borrow() {
            count += 1;
            let (name, begun) = (format!("{}-{count}", std::process::id()), Instant::now());
            let ended = self.run(&name, &server, &mut stop).await;
            server.ready.store(false, Ordering::SeqCst);
            if *stop.borrow() {
                break;
            }
            tracing::error!(worker = name, ?ended, "the worker died");
            // Its job need not wait for the lease to end.
            if let Err(error) = server.store.abandon(&name).await {
                tracing::error!(%error, "the store failed");
            }
            pause = if begun.elapsed() > STEADY { PAUSES[0] } else { (pause * 2).min(PAUSES[1]) };
            let _ = tokio::time::timeout(pause, stop.changed()).await;
        }
        reaper.abort();
    }

    /// One life of a worker. It lives as long as its standard input is open, so that it never outlives the service.
    async fn run(
        &self,
        name: &str,
        server: &Server,
        stop: &mut watch::Receiver<bool>,
    ) -> std::io::Result<std::process::ExitStatus> {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).arg(name).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn()?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let mut lines = output.map(|output| BufReader::new(output).lines());
        loop {
            let line = async {
                match &mut lines {
                    Some(lines) => lines.next_line().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                line = line => match line {
                    Ok(Some(line)) if line == READY => server.ready.store(true, Ordering::SeqCst),
                    Ok(Some(_)) => {}
                    _ => lines = None,
                },
                ended = child.wait() => return ended,
                _ = stop.changed() => {
                    drop(input);
                    return match tokio::time::timeout(END, child.wait()).await {
                        Ok(ended) => ended,
                        Err(_) => {
                            child.kill().await?;
                            child.wait().await
                        }
                    };
                }
            }
        }
    }
}

/// What a worker says once it has its model.
pub(crate) const READY: &str = "ready";

async fn reap(server: Arc<Server>) {
    loop {
        match server.store.reap().await {
            Ok(changed) => {
                changed.iter().for_each(|job| tracing::warn!(job = %job.id, status = job.status.as_str(), "changed by time"))
            }
            Err(error) => tracing::error!(%error, "the store failed"),
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}
