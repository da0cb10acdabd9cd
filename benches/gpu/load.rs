//! How fast a transformer comes from the page cache to the device, beside what the way there can carry: `--load [GB]`.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use candle_core::{DType, Device};
use models::flux::Flux;
use models::weights::{Checkpoint, Component, Source};
use serde_json::json;

use crate::report::Report;

#[path = "../common/transformer_file.rs"]
mod transformer_file;

const REPEATS: usize = 5;

/// Writes a file of so many GB in bf16 and loads it in processes of its own, each of which meets a device with nothing on it: with
/// candle's operations and with our kernels, in turn.
pub(crate) fn run(name: &str, device: &Device, gigabytes: f64, report: &mut Report) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("flux1-synthetic.safetensors");
    let bytes = transformer_file::write(&path, gigabytes)?;
    println!("{:.2} GB of FLUX.1 blocks in bf16, from the page cache; medians of {REPEATS}", bytes as f64 / 1e9);
    let way = link_rate(device)?;
    if let Some(way) = way {
        println!("{:24} {:7} {:6.2} GB/s", "from page-locked memory", "", way / 1e9);
    }
    let kinds: &[&str] = if device.is_cuda() { &["plain", "fused"] } else { &["plain"] };
    let mut seconds = vec![Vec::with_capacity(REPEATS); kinds.len()];
    for _ in 0..REPEATS {
        for (kernels, seconds) in kinds.iter().zip(&mut seconds) {
            let mut child = Command::new(std::env::current_exe()?);
            let output = child.args(["--device", name, "--kernels", kernels, "--load-file"]).arg(&path).output()?;
            let (said, told) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            anyhow::ensure!(output.status.success(), "loading with {kernels} kernels: {}", told.trim());
            seconds.push(said.trim().parse::<f64>()?);
        }
    }
    for (kernels, mut seconds) in kinds.iter().zip(seconds) {
        seconds.sort_by(f64::total_cmp);
        let (median, slowest) = (seconds[REPEATS / 2], seconds[REPEATS - 1]);
        let rate = bytes as f64 / median;
        let part = way.map_or(String::new(), |way| format!(", {:.0} % of that", 100. * rate / way));
        println!(
            "{:24} {median:5.2} s {:6.2} GB/s{part} ({:.2} to {slowest:.2} s)",
            format!("{kernels} kernels"),
            rate / 1e9,
            seconds[0]
        );
        report.add("loads", json!({"kernels": kernels, "bytes": bytes, "seconds": seconds, "link_bytes_per_second": way}))?;
    }
    Ok(())
}

/// One load; prints its seconds.
pub(crate) fn child(path: &Path, device: &Device) -> anyhow::Result<()> {
    device.synchronize()?;
    let start = Instant::now();
    let checkpoint = Checkpoint::open(&[path.to_path_buf()])?;
    let source = Source::new(Component::Transformer, &checkpoint, DType::BF16, device);
    let flux = Flux::load(&source, None)?;
    source.finish()?;
    device.synchronize()?;
    println!("{}", start.elapsed().as_secs_f64());
    anyhow::ensure!(flux.config().hidden == transformer_file::D, "another transformer was loaded");
    Ok(())
}

/// Bytes a second that the card itself reads from page-locked memory; `None` of other devices.
#[cfg(feature = "cuda")]
fn link_rate(device: &Device) -> anyhow::Result<Option<f64>> {
    const BYTES: usize = 256 << 20;
    let Device::Cuda(card) = device else { return Ok(None) };
    let stream = card.cuda_stream();
    // SAFETY: what is in either does not matter.
    #[expect(unsafe_code, reason = "memory of the driver's, not set to anything")]
    let (from, mut to) = unsafe { (stream.context().alloc_pinned::<u8>(BYTES)?, stream.alloc::<u8>(BYTES)?) };
    let mut seconds = Vec::new();
    for _ in 0..7 {
        stream.synchronize()?;
        let start = Instant::now();
        stream.memcpy_htod(&from, &mut to)?;
        stream.synchronize()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(Some(BYTES as f64 / seconds[3]))
}

#[cfg(not(feature = "cuda"))]
fn link_rate(_device: &Device) -> anyhow::Result<Option<f64>> {
    Ok(None)
}
