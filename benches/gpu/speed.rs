//! Time per step and peak memory of a FLUX.1-dev-sized transformer with random weights, 1024 x 1024, 512 text tokens.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use models::flux::{Conditioning, Config, Flux, Rope};
use models::weights::{Component, Source};
use serde_json::{Value, json};

pub(crate) fn run(device: &Device, dtype: DType, full: bool, steps: usize) -> anyhow::Result<Value> {
    let (config, side, l_txt) = if full { (Config::DEV, 64, 512) } else { (tenth(), 16, 64) };
    let (name, l_img) = (if full { "FLUX.1-dev" } else { "a tenth of FLUX.1-dev" }, side * side);
    let watch = Watch::start(device);

    let start = Instant::now();
    let flux = Flux::with_config(&Source::synthetic(Component::Transformer, dtype, device)?, config.clone())?;
    device.synchronize()?;
    let made = start.elapsed();
    let weights = watch.used();

    let random = |shape: &[usize]| Tensor::randn(0f32, 1., shape, device)?.to_dtype(dtype);
    let img = random(&[1, l_img, config.channels])?;
    let conditioning = Conditioning {
        txt: random(&[1, l_txt, config.text_width])?,
        pooled: random(&[1, config.pooled_width])?,
        guidance: Some(Tensor::new(&[3.5f32], device)?),
    };
    let rope = Rope::new(&config, l_txt, side, side, device)?;
    // As a picture does it: what depends on the times alone is made once.
    let prepared = flux.prepare(&Tensor::new(&[0.7f32], device)?, &conditioning)?;
    let mut times = Vec::new();
    for i in 0..steps + 2 {
        let start = Instant::now();
        let out = flux.step(0, &img, &prepared, &rope)?;
        device.synchronize()?;
        let finite = out.to_dtype(DType::F32)?.sqr()?.sum_all()?.to_scalar::<f32>()?.is_finite();
        anyhow::ensure!(finite, "the output is not finite");
        if i >= 2 {
            times.push(start.elapsed());
        }
    }
    times.sort();
    let (median, peak) = (times[times.len() / 2], watch.peak());
    let gigabytes = |bytes: Option<u64>| bytes.map_or("-".into(), |bytes| format!("{:.2} GB", bytes as f64 / 1e9));
    println!("\n{name}, {} px, {l_txt} text tokens, {dtype:?}, {} timed steps", side * 16, times.len());
    println!("median step    {:>10.1} ms", milliseconds(median));
    println!("fastest, slowest {:>8.1} ms, {:.1} ms", milliseconds(times[0]), milliseconds(times[times.len() - 1]));
    println!("weights made in {:>9.2} s, {}", made.as_secs_f64(), gigabytes(weights));
    println!("peak memory    {:>13}", gigabytes(peak));
    Ok(json!({
        "model": name, "pixels": side * 16, "text_tokens": l_txt, "dtype": format!("{dtype:?}"),
        "step_ms": {"median": milliseconds(median), "all": times.iter().map(|t| milliseconds(*t)).collect::<Vec<_>>()},
        "weights_seconds": made.as_secs_f64(), "weights_bytes": weights, "peak_bytes": peak,
    }))
}

fn tenth() -> Config {
    Config { hidden: 1024, heads: 8, mlp: 4096, double_blocks: 4, single_blocks: 8, text_width: 512, ..Config::DEV }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Samples the device's free memory every few milliseconds.
struct Watch {
    at_start: Option<u64>,
    device: Device,
    lowest: std::sync::Arc<AtomicU64>,
    stop: std::sync::Arc<AtomicBool>,
}

impl Watch {
    fn start(device: &Device) -> Self {
        let at_start = kernels::free_memory(device);
        let lowest = std::sync::Arc::new(AtomicU64::new(at_start.unwrap_or(u64::MAX)));
        let stop = std::sync::Arc::new(AtomicBool::new(false));
        let (thread_device, thread_lowest, thread_stop) = (device.clone(), lowest.clone(), stop.clone());
        std::thread::spawn(move || {
            while !thread_stop.load(Ordering::Relaxed) {
                let Some(free) = kernels::free_memory(&thread_device) else { return };
                thread_lowest.fetch_min(free, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(3));
            }
        });
        Self { at_start, device: device.clone(), lowest, stop }
    }

    fn used(&self) -> Option<u64> {
        Some(self.at_start?.saturating_sub(kernels::free_memory(&self.device)?))
    }

    fn peak(&self) -> Option<u64> {
        Some(self.at_start?.saturating_sub(self.lowest.load(Ordering::Relaxed)))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
