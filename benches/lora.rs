//! How long a LoRA takes to be put on FLUX.1's weights and off again, and to be read: `cargo bench --bench lora`.
//!
//! Two double and four single blocks of FLUX.1-dev's shapes with random weights; a LoRA of rank 16 on all their linear layers. A switch
//! is compared with a plain copy of the same weights, by all cores, in the same run.

#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout, reason = "a bench prints, and ends by panicking")]

use std::collections::BTreeMap;
use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use half::bf16;
use models::flux::{Config, Flux};
use models::lora::{Adapter, Mode, Patches, Scales, Selected};
use models::nn::Weight;
use models::weights::{Component, Source};
use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use watch::Watch;

#[path = "common/watch.rs"]
mod watch;

const REPEATS: usize = 7;
const CONFIG: Config = Config { double_blocks: 2, single_blocks: 4, ..Config::DEV };

fn main() {
    let folder = tempfile::tempdir().unwrap();
    // First, while memory is as a new process has it.
    read(folder.path());
    for dtype in [DType::BF16, DType::F32] {
        switch(dtype, folder.path());
    }
}

fn switch(dtype: DType, folder: &Path) {
    let device = Device::Cpu;
    let source = Source::synthetic(Component::Transformer, dtype, &device).unwrap();
    let _flux = Flux::with_config(&source, CONFIG).unwrap();
    let parameters: BTreeMap<_, _> =
        source.parameters().into_iter().map(|(name, p)| ((Component::Transformer, name), p)).collect();
    let matrices: Vec<(String, Vec<usize>)> = parameters
        .iter()
        .map(|((_, name), parameter)| (name.clone(), parameter.shape()))
        .filter(|(name, shape)| shape.len() == 2 && name.contains("blocks"))
        .collect();
    let path = folder.join("rank16.safetensors");
    write(&path, &matrices, 16);
    let bytes: usize = matrices.iter().map(|(_, shape)| shape.iter().product::<usize>() * dtype.size_in_bytes()).sum();
    let mut patches = Patches::new(parameters, &device, dtype);
    let adapter = Arc::new(Adapter::open(&path).unwrap());
    let set = |scale| [Selected { adapter: adapter.clone(), scales: Scales::uniform(scale) }];

    let copy = median(|_| {
        for (name, _) in &matrices {
            let (weight, _) = patches.parameter(Component::Transformer, name).unwrap().current().unwrap();
            let Weight::Dense(weight) = weight else { unreachable!("the bench's weights are dense") };
            black_box(copied(&weight));
        }
    });
    let merge = median(|i| {
        patches.apply(&set(0.5 + i as f64 / 100.0), Mode::Auto).unwrap();
    });
    let mut restored = Vec::new();
    for i in 0..REPEATS {
        patches.apply(&set(i as f64 + 2.0), Mode::Auto).unwrap();
        let start = Instant::now();
        patches.apply(&[], Mode::Auto).unwrap();
        restored.push(start.elapsed().as_secs_f64());
    }
    restored.sort_by(f64::total_cmp);
    println!("{:.2} GB of FLUX.1 blocks in {dtype:?}, LoRA of rank 16 on {} matrices", bytes as f64 / 1e9, matrices.len());
    println!("  plain copy   {:8.1} ms  {:5.2} GB/s", copy * 1e3, bytes as f64 / 1e9 / copy);
    println!(
        "  new scale    {:8.1} ms  {:5.2} GB/s, {:.0} % of the copy's rate",
        merge * 1e3,
        bytes as f64 / 1e9 / merge,
        100.0 * copy / merge
    );
    println!("  back to base {:8.3} ms", restored[REPEATS / 2] * 1e3);
}

/// A copy by all cores into fresh memory, as a merge writes it.
fn copied(weight: &Tensor) -> usize {
    fn all<T: bytemuck::Zeroable + Copy + Send + Sync>(from: &[T]) -> usize {
        let mut to: Vec<T> = kernels::zeros(from.len());
        to.par_chunks_mut(1 << 17).zip(from.par_chunks(1 << 17)).for_each(|(to, from)| to.copy_from_slice(from));
        black_box(&to).len()
    }
    let (storage, _) = weight.storage_and_layout();
    let candle_core::Storage::Cpu(storage) = &*storage else { unreachable!("the bench runs on the CPU") };
    match weight.dtype() {
        DType::F32 => all(storage.as_slice::<f32>().unwrap()),
        _ => all(storage.as_slice::<bf16>().unwrap()),
    }
}

fn read(folder: &Path) {
    // All linear layers of FLUX.1 with rank 32: about 300 MB in bf16.
    let mut shapes = Vec::new();
    for i in 0..19 {
        for side in ["img", "txt"] {
            for (name, output, input) in [
                ("mod.lin", 18432, 3072),
                ("attn.qkv", 9216, 3072),
                ("attn.proj", 3072, 3072),
                ("mlp.0", 12288, 3072),
                ("mlp.2", 3072, 12288),
            ] {
                shapes.push((format!("double_blocks.{i}.{side}_{name}.weight"), vec![output, input]));
            }
        }
    }
    for i in 0..38 {
        for (name, output, input) in [("modulation.lin", 9216, 3072), ("linear1", 21504, 3072), ("linear2", 3072, 15360)] {
            shapes.push((format!("single_blocks.{i}.{name}.weight"), vec![output, input]));
        }
    }
    let path = folder.join("rank32.safetensors");
    write(&path, &shapes, 32);
    let bytes = std::fs::metadata(&path).unwrap().len();
    let before = watch::private_bytes();
    let watch = Watch::start();
    let first = Adapter::open(&path).unwrap();
    let peak = watch.peak().saturating_sub(before);
    drop(first);
    let seconds = median(|_| {
        black_box(Adapter::open(&path).unwrap());
    });
    println!(
        "reading and checking a LoRA of {:.0} MB from the page cache: {seconds:.2} s, {:.2} GB/s, peak memory {:.0} % of its size",
        bytes as f64 / 1e6,
        bytes as f64 / 1e9 / seconds,
        100.0 * peak as f64 / bytes as f64
    );
}

/// A LoRA in BFL's names with random factors in bf16.
fn write(path: &Path, shapes: &[(String, Vec<usize>)], rank: usize) {
    let mut from = fastrand::Rng::with_seed(1);
    let mut random = |n: usize| -> Vec<u8> { (0..n).flat_map(|_| bf16::from_f32(from.f32() - 0.5).to_le_bytes()).collect() };
    let mut tensors = Vec::new();
    for (name, shape) in shapes {
        let stem = name.trim_end_matches(".weight");
        tensors.push((format!("diffusion_model.{stem}.lora_A.weight"), vec![rank, shape[1]], random(rank * shape[1])));
        tensors.push((format!("diffusion_model.{stem}.lora_B.weight"), vec![shape[0], rank], random(shape[0] * rank)));
    }
    let views =
        tensors.iter().map(|(key, shape, bytes)| (key.clone(), TensorView::new(Dtype::BF16, shape.clone(), bytes).unwrap()));
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn median(mut run: impl FnMut(usize)) -> f64 {
    run(0);
    let mut seconds: Vec<f64> = (1..=REPEATS)
        .map(|i| {
            let start = Instant::now();
            run(i);
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds[REPEATS / 2]
}
