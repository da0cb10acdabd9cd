//! Tensors and files that `tests/fixtures/*/export.py` wrote with the reference implementation.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use darkroom::engine::{Job, LoraMode, NoiseKind};
use models::weights::{Checkpoint, Component, Source};
use serde_json::Value;

/// Largest relative error of a module in f32.
pub const MODULE: f64 = 2e-5;

pub fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// All tensors of a fixture file, on the CPU.
pub struct Fixture(HashMap<String, Tensor>);

impl Fixture {
    pub fn open(name: &str) -> Self {
        Self(candle_core::safetensors::load(path(name), &Device::Cpu).expect(name))
    }

    pub fn get(&self, key: &str) -> Tensor {
        self.0.get(key).unwrap_or_else(|| panic!("no tensor {key} in the fixture")).clone()
    }

    pub fn ids(&self, key: &str) -> Tensor {
        self.get(key).to_dtype(DType::U32).unwrap()
    }
}

pub fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(path(name)).expect(name)).unwrap()
}

/// One picture without anything special about it; tests say what is.
pub fn job(prompt: &str, width: usize, height: usize, steps: usize) -> Job {
    Job {
        prompt: prompt.into(),
        negative_prompt: String::new(),
        width,
        height,
        steps,
        guidance: 3.5,
        true_cfg: 1.,
        seed: 7,
        outputs: 1,
        noise: NoiseKind::Cpu,
        start: None,
        loras: Vec::new(),
        lora_mode: LoraMode::Auto,
        previews: None,
    }
}

/// The weights of a tiny model's component.
pub fn checkpoint(folder: &str) -> Checkpoint {
    let files = std::fs::read_dir(path(folder)).unwrap().map(|entry| entry.unwrap().path());
    let weights: Vec<PathBuf> = files.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).collect();
    Checkpoint::open(&weights).unwrap()
}

/// A component of a tiny model in f32, with its configuration.
pub fn component(model: &str, folder: &str, component: Component) -> (Source, Value) {
    let folder = format!("{model}/{folder}");
    let source = Source::new(component, &checkpoint(&folder), DType::F32, &Device::Cpu);
    (source, json(&format!("{folder}/config.json")))
}

/// max |got - want| / max |want|.
pub fn relative_error(got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!(got.dims(), want.dims(), "shapes differ");
    let max = |x: Tensor| f64::from(x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap());
    let (got, want) = (got.to_dtype(DType::F32).unwrap(), want.to_dtype(DType::F32).unwrap());
    let error = max((got - &want).unwrap()) / max(want);
    assert!(error.is_finite(), "the tensors hold values that are not numbers");
    error
}

/// |got - want|₂ / |want|₂.
pub fn relative_l2(got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!(got.dims(), want.dims(), "shapes differ");
    let norm = |x: Tensor| f64::from(x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()).sqrt();
    norm((got - want).unwrap()) / norm(want.clone())
}

#[track_caller]
pub fn assert_close(what: &str, got: &Tensor, want: &Tensor, bound: f64) {
    let error = relative_error(got, want);
    assert!(error <= bound, "{what}: relative error {error:.2e} is over {bound:.0e}");
}
