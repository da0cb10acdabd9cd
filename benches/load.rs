//! How fast a large transformer is loaded, and how much memory that takes: `cargo bench --bench load` [-- --gigabytes 4].
//!
//! Writes FLUX.1's block shapes with random values in bf16 to a temporary file, then loads that file in processes of its own,
//! from the page cache, as bf16 (a copy) and as f32 (widened). Prints GB of file a second beside a plain copy of the same bytes,
//! and the largest private memory beside what had to live there.

#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout, reason = "a bench prints, and ends by panicking")]

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use candle_core::{DType, Device};
use models::flux::Flux;
use models::weights::{Checkpoint, Component, Source};
use watch::Watch;

#[path = "common/transformer_file.rs"]
mod transformer_file;
#[path = "common/watch.rs"]
mod watch;

const REPEATS: usize = 5;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let after = |name: &str| arguments.iter().position(|a| a == name).and_then(|i| arguments.get(i + 1)).cloned();
    if let Some(path) = after("--child") {
        return child(Path::new(&path), &after("--dtype").unwrap());
    }
    let gigabytes: f64 = after("--gigabytes").map_or(4.0, |text| text.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("flux1-synthetic.safetensors");
    let bytes = transformer_file::write(&path, gigabytes).unwrap();
    println!("{:.2} GB of FLUX.1 blocks in bf16, from the page cache", bytes as f64 / 1e9);
    for dtype in ["copy", "bf16", "f32"] {
        let runs = (0..REPEATS).map(|_| {
            let output = Command::new(std::env::current_exe().unwrap())
                .arg("--child")
                .arg(&path)
                .args(["--dtype", dtype])
                .output()
                .unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let text = String::from_utf8(output.stdout).unwrap();
            let numbers: Vec<f64> = text.split_whitespace().map(|word| word.parse().unwrap()).collect();
            (numbers[0], numbers[1])
        });
        let (mut seconds, peaks): (Vec<f64>, Vec<f64>) = runs.unzip();
        seconds.sort_by(f64::total_cmp);
        let median = seconds[REPEATS / 2];
        let lives = if dtype == "f32" { 2 * bytes } else { bytes } as f64;
        let peak = peaks.into_iter().fold(0., f64::max);
        println!(
            "{dtype:<5} {median:>6.2} s  {:>5.2} GB/s  peak {:>5.2} GB, {:.1} % of what lives there",
            bytes as f64 / 1e9 / median,
            peak / 1e9,
            100. * peak / lives
        );
    }
}

/// One load; prints seconds and the largest private memory in bytes.
fn child(path: &Path, dtype: &str) {
    let watch = Watch::start();
    let start = Instant::now();
    let checkpoint = Checkpoint::open(&[path.to_path_buf()]).unwrap();
    if dtype == "copy" {
        // What a careful program does by hand: every byte once, by one thread.
        let copies: Vec<Vec<u8>> = checkpoint.keys().map(|key| checkpoint.bytes(checkpoint.get(key).unwrap()).to_vec()).collect();
        println!("{} {}", start.elapsed().as_secs_f64(), watch.peak());
        assert!(!copies.is_empty());
        return;
    }
    let dtype = if dtype == "f32" { DType::F32 } else { DType::BF16 };
    let source = Source::new(Component::Transformer, &checkpoint, dtype, &Device::Cpu);
    let flux = Flux::load(&source, None).unwrap();
    source.finish().unwrap();
    println!("{} {}", start.elapsed().as_secs_f64(), watch.peak());
    assert!(flux.config().hidden == transformer_file::D);
}
