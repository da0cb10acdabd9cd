//! Time per step and peak memory of a FLUX.1-dev-sized transformer with random weights, 1024 x 1024, 512 text tokens.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use models::flux::{Conditioning, Config, Flux, Rope};
use models::weights::{Component, Source};
use serde_json::{Value, json};

/// The transformer's sizes, the picture's side in tokens, and its text's tokens.
pub(crate) fn sizes(full: bool) -> (Config, usize, usize) {
    if full { (Config::DEV, 64, 512) } else { (tenth(), 16, 64) }
}

pub(crate) fn run(device: &Device, dtype: DType, full: bool, steps: usize) -> anyhow::Result<Value> {
    let (config, side, l_txt) = sizes(full);
    let (name, l_img) = (if full { "FLUX.1-dev" } else { "a tenth of FLUX.1-dev" }, side * side);
    let before = kernels::free_memory(device);
    let taken = |free: Option<u64>| Some(before?.saturating_sub(free?));

    let start = Instant::now();
    let flux = Flux::with_config(&Source::synthetic(Component::Transformer, dtype, device)?, config.clone())?;
    device.synchronize()?;
    let made = start.elapsed();
    let weights = taken(kernels::free_memory(device));

    let random = |shape: &[usize]| Tensor::randn(0f32, 1., shape, device)?.to_dtype(dtype);
    let img = random(&[1, l_img, config.channels])?;
    let conditioning = Conditioning {
        txt: random(&[1, l_txt, config.text_width])?,
        pooled: random(&[1, config.pooled_width])?,
        guidance: Some(Tensor::new(&[3.5f32], device)?),
    };
    let rope = Rope::new(&config, l_txt, side, side, device)?;
    // As a picture of 28 steps does it: what depends on the times alone is made once, for all of them.
    let moments = Tensor::new((0..28).map(|i| 1. - i as f32 / 28.).collect::<Vec<_>>(), device)?;
    let mut preparing = Vec::new();
    let mut prepare = || -> anyhow::Result<_> {
        device.synchronize()?;
        let start = Instant::now();
        let prepared = flux.prepare(&moments, &conditioning)?;
        device.synchronize()?;
        preparing.push(start.elapsed());
        Ok(prepared)
    };
    // The first time warms up.
    for _ in 0..3 {
        prepare()?;
    }
    let prepared = prepare()?;
    preparing.remove(0);
    preparing.sort();
    // In a step of its own: asking the driver all the time would slow down what is timed.
    let peak = taken(least_free(device, || {
        flux.step(0, &img, &prepared, &rope)?;
        Ok(device.synchronize()?)
    })?);
    let mut times = Vec::new();
    for i in 0..steps + 2 {
        let start = Instant::now();
        let out = flux.step(0, &img, &prepared, &rope)?;
        device.synchronize()?;
        let time = start.elapsed();
        let finite = out.to_dtype(DType::F32)?.sqr()?.sum_all()?.to_scalar::<f32>()?.is_finite();
        anyhow::ensure!(finite, "the output is not finite");
        if i >= 2 {
            times.push(time);
        }
    }
    times.sort();
    let median = times[times.len() / 2];
    let gigabytes = |bytes: Option<u64>| bytes.map_or("-".into(), |bytes| format!("{:.2} GB", bytes as f64 / 1e9));
    println!("\n{name}, {} px, {l_txt} text tokens, {dtype:?}, {} timed steps", side * 16, times.len());
    println!("median step    {:>10.1} ms", milliseconds(median));
    println!("fastest, slowest {:>8.1} ms, {:.1} ms", milliseconds(times[0]), milliseconds(times[times.len() - 1]));
    println!("before the first step {:>5.1} ms", milliseconds(preparing[1]));
    println!("weights made in {:>9.2} s, {}", made.as_secs_f64(), gigabytes(weights));
    println!("peak memory    {:>13}", gigabytes(peak));
    Ok(json!({
        "model": name, "pixels": side * 16, "text_tokens": l_txt, "dtype": format!("{dtype:?}"),
        "step_ms": {"median": milliseconds(median), "all": times.iter().map(|t| milliseconds(*t)).collect::<Vec<_>>()},
        "prepare_ms": {"median": milliseconds(preparing[1]), "all": preparing.iter().map(|t| milliseconds(*t)).collect::<Vec<_>>()},
        "weights_seconds": made.as_secs_f64(), "weights_bytes": weights, "peak_bytes": peak,
    }))
}

fn tenth() -> Config {
    Config { hidden: 1024, heads: 8, mlp: 4096, double_blocks: 4, single_blocks: 8, text_width: 512, ..Config::DEV }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// The least memory that is free while `run` runs, asked for every few milliseconds; `None` where the device does not tell.
fn least_free(device: &Device, run: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Option<u64>> {
    let (asked, ended) = (device.clone(), Arc::new(AtomicBool::new(false)));
    let until = ended.clone();
    let watch = std::thread::spawn(move || {
        let mut least = kernels::free_memory(&asked)?;
        while !until.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(3));
            least = least.min(kernels::free_memory(&asked)?);
        }
        Some(least)
    });
    let result = run();
    ended.store(true, Ordering::Relaxed);
    let least = watch.join().map_err(|_| anyhow::anyhow!("watching the memory panicked"))?;
    result.map(|()| least)
}
