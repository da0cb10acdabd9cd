//! How much memory a bench takes.

#![allow(dead_code, unreachable_pub, reason = "each bench uses a part of it")]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Samples the process's private memory every few milliseconds (the mapped file's pages are the system's and do not count).
pub struct Watch {
    peak: &'static AtomicU64,
}

impl Watch {
    pub fn start() -> Self {
        static PEAK: AtomicU64 = AtomicU64::new(0);
        static RUN: AtomicBool = AtomicBool::new(true);
        std::thread::spawn(|| {
            while RUN.load(Ordering::Relaxed) {
                PEAK.fetch_max(private_bytes(), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        Self { peak: &PEAK }
    }

    /// The most so far, in bytes.
    pub fn peak(&self) -> u64 {
        self.peak.fetch_max(private_bytes(), Ordering::Relaxed).max(private_bytes())
    }
}

/// `RssAnon`, in bytes.
pub fn private_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) * 1024
}
