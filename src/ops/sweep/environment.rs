//! What a run ran on, so that another can repeat it.

use std::collections::BTreeMap;
use std::process::Command;

use candle_core::Device;
use sysinfo::{CpuRefreshKind, MemoryRefreshKind, Pid, ProcessRefreshKind, ProcessesToUpdate, RefreshKind, System};

use crate::bytes::in_words;
use crate::ops::generate::device_name;

/// Of the card, as its own tool tells it: name, driver, clocks in MHz now and at most, power limit in watts.
const CARD: &str = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit";

/// Names and values, in words.
pub(super) fn environment(device: &Device) -> BTreeMap<String, String> {
    let kinds = RefreshKind::nothing().with_cpu(CpuRefreshKind::nothing()).with_memory(MemoryRefreshKind::nothing().with_ram());
    let mut found = BTreeMap::from([
        ("darkroom".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
        ("device".into(), device_name(device)),
        ("system".into(), format!("{} {}", std::env::consts::OS, std::env::consts::ARCH)),
    ]);
    if let Ok(system) = System::new_with_specifics(kinds) {
        let brand = system.cpus().first().map(|cpu| cpu.brand().trim().to_owned()).unwrap_or_default();
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        found.insert("processor".into(), format!("{brand}, {cores} cores"));
        found.insert("memory".into(), in_words(system.total_memory()));
    }
    if let Some(card) = card(device) {
        found.insert("card".into(), card);
    }
    found
}

fn card(device: &Device) -> Option<String> {
    let candle_core::DeviceLocation::Cuda { gpu_id } = device.location() else { return None };
    let asked = Command::new("nvidia-smi")
        .args([&format!("--id={gpu_id}"), &format!("--query-gpu={CARD}"), "--format=csv,noheader"])
        .output()
        .ok()
        .filter(|answer| answer.status.success())?;
    let text = String::from_utf8_lossy(&asked.stdout).trim().to_owned();
    (!text.is_empty()).then(|| format!("{text} ({CARD})"))
}

/// Watches memory while a picture is made.
pub(super) struct Memory {
    /// Some sandboxes tell nothing.
    system: Option<System>,
    process: Option<Pid>,
    total_device: Option<u64>,
    pub(super) peak: Option<u64>,
    pub(super) peak_device: Option<u64>,
}

impl Memory {
    pub(super) fn new() -> Self {
        let process = sysinfo::get_current_pid().ok();
        Self { system: System::new().ok(), process, total_device: None, peak: None, peak_device: None }
    }

    pub(super) fn begin(&mut self) {
        (self.peak, self.peak_device) = (None, None);
    }

    /// Looks once.
    pub(super) fn look(&mut self, device: &Device) {
        if let (Some(system), Some(process)) = (&mut self.system, self.process) {
            let kind = ProcessRefreshKind::nothing().with_memory().without_tasks();
            system.refresh_processes_specifics(ProcessesToUpdate::Some(&[process]), false, kind);
            self.peak = self.peak.max(system.process(process).map(sysinfo::Process::memory));
        }
        let free = kernels::free_memory(device);
        // Of what was free at first.
        let total = *self.total_device.get_or_insert(free.unwrap_or(0));
        self.peak_device = self.peak_device.max(free.map(|free| total.saturating_sub(free)));
    }
}
