//! How fast a large transformer is loaded, and how much memory that takes: `cargo bench --bench load` [-- --gigabytes 4].
//!
//! Writes FLUX.1's block shapes with random values in bf16 to a temporary file, then loads that file in processes of its own,
//! from the page cache, as bf16 (a copy) and as f32 (widened). Prints GB of file a second beside a plain copy of the same bytes,
//! and the largest private memory beside what had to live there.

#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout, reason = "a bench prints, and ends by panicking")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use candle_core::{DType, Device};
use models::flux::Flux;
use models::weights::{Checkpoint, Component, Source};
use watch::Watch;

#[path = "common/watch.rs"]
mod watch;

const REPEATS: usize = 5;
const D: usize = 3072;
const MLP: usize = 12288;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let after = |name: &str| arguments.iter().position(|a| a == name).and_then(|i| arguments.get(i + 1)).cloned();
    if let Some(path) = after("--child") {
        return child(Path::new(&path), &after("--dtype").unwrap());
    }
    let gigabytes: f64 = after("--gigabytes").map_or(4.0, |text| text.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("flux1-synthetic.safetensors");
    let bytes = write(&path, gigabytes);
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
    assert!(flux.config().hidden == D);
}

/// As many blocks as fit: two single ones for each double one, as in FLUX.1.
fn write(path: &PathBuf, gigabytes: f64) -> u64 {
    let triples = ((gigabytes * 1e9 / 2.0 - 90e6) / 623e6).round().max(1.0) as usize;
    let mut shapes: Vec<(String, Vec<usize>)> = Vec::new();
    let mut linear = |name: String, output: usize, input: usize| {
        shapes.push((format!("{name}.weight"), vec![output, input]));
        shapes.push((format!("{name}.bias"), vec![output]));
    };
    for (name, output, input) in [("img_in", D, 64), ("txt_in", D, 4096), ("final_layer.linear", 64, D)] {
        linear(name.into(), output, input);
    }
    linear("final_layer.adaLN_modulation.1".into(), 2 * D, D);
    for (name, input) in [("time_in", 256), ("guidance_in", 256), ("vector_in", 768)] {
        linear(format!("{name}.in_layer"), D, input);
        linear(format!("{name}.out_layer"), D, D);
    }
    for i in 0..triples {
        for side in ["img", "txt"] {
            let name = format!("double_blocks.{i}.{side}");
            linear(format!("{name}_mod.lin"), 6 * D, D);
            linear(format!("{name}_attn.qkv"), 3 * D, D);
            linear(format!("{name}_attn.proj"), D, D);
            linear(format!("{name}_mlp.0"), MLP, D);
            linear(format!("{name}_mlp.2"), D, MLP);
        }
    }
    for i in 0..2 * triples {
        let name = format!("single_blocks.{i}");
        linear(format!("{name}.modulation.lin"), 3 * D, D);
        linear(format!("{name}.linear1"), 3 * D + MLP, D);
        linear(format!("{name}.linear2"), D, D + MLP);
    }
    let norms = (0..triples).flat_map(|i| ["img", "txt"].map(|side| format!("double_blocks.{i}.{side}_attn.norm")));
    for norm in norms.chain((0..2 * triples).map(|i| format!("single_blocks.{i}.norm"))) {
        shapes.extend(["query", "key"].map(|which| (format!("{norm}.{which}_norm.scale"), vec![D / 24])));
    }
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in &shapes {
        let start = end;
        end += 2 * shape.iter().product::<usize>() as u64;
        header.insert(name.clone(), serde_json::json!({ "dtype": "BF16", "shape": shape, "data_offsets": [start, end] }));
    }
    let mut text = serde_json::to_vec(&header).unwrap();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut file = std::io::BufWriter::with_capacity(1 << 20, std::fs::File::create(path).unwrap());
    file.write_all(&(text.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&text).unwrap();
    // Random bytes with small exponents, the same megabytes over and over: nothing here looks at the values.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let block: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        [(state >> 40) as u8, 0x3c | ((state >> 56) as u8 & 0x83)]
    })
    .take(1 << 21)
    .flatten()
    .collect();
    let mut left = end;
    while left > 0 {
        let n = left.min(block.len() as u64);
        file.write_all(&block[..n as usize]).unwrap();
        left -= n;
    }
    file.flush().unwrap();
    end
}
