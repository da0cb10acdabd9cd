//! Tensors and files that `tests/fixtures/*/export.py` wrote with the reference implementation.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use darkroom::engine::{Job, LoraMode, NoiseKind, Pipeline, Plan};
use models::bundle::Bundle;
use models::weights::{Checkpoint, Component, Source};
use serde_json::Value;

/// Largest relative error of a module in f32.
pub const MODULE: f64 = 2e-5;

pub fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// tiny-dev's folder, as an argument.
pub fn tiny() -> String {
    path("tiny-dev").display().to_string()
}

/// The file of one of the small LoRAs, as an argument.
pub fn lora(name: &str) -> String {
    path("lora").join(format!("{name}.safetensors")).display().to_string()
}

/// A small real adapter.
pub fn weights() -> Vec<u8> {
    std::fs::read(lora("diffusers")).unwrap()
}

/// A tar of these members.
pub fn archive(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, *bytes).unwrap();
    }
    builder.into_inner().unwrap()
}

/// Copies these folders of a tiny model into another.
pub fn copy_folders(model: &str, folders: &[&str], to: &Path) {
    for folder in folders {
        std::fs::create_dir_all(to.join(folder)).unwrap();
        for entry in std::fs::read_dir(path(model).join(folder)).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), to.join(folder).join(entry.file_name())).unwrap();
        }
    }
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

/// A tiny model.
pub fn bundle(model: &str) -> Bundle {
    Bundle::from_folder(&path(model)).unwrap()
}

/// A tiny model on the processor.
pub fn pipeline(model: &str, plan: impl Into<Plan>) -> Pipeline {
    Pipeline::load(&bundle(model), &Device::Cpu, plan, &mut |_| {}).unwrap()
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

/// The mean difference of two pictures' values, of 255.
pub fn apart(a: &[u8], b: &[u8]) -> f64 {
    assert_eq!(a.len(), b.len(), "sizes differ");
    a.iter().zip(b).map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>() / a.len() as f64
}

#[track_caller]
pub fn assert_close(what: &str, got: &Tensor, want: &Tensor, bound: f64) {
    let error = relative_error(got, want);
    assert!(error <= bound, "{what}: relative error {error:.2e} is over {bound:.0e}");
}
