//! Fixture files and how far two tensors are apart.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use models::weights::{Checkpoint, Component, Source};

/// A file or folder in `tests/fixtures`.
pub(crate) fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Tensors that the reference implementation wrote: integers as u32, all else as f32.
pub(crate) struct Tensors(safetensors::tensor::SafeTensors<'static>);

impl Tensors {
    pub(crate) fn open(name: &str) -> Self {
        // Tests are short-lived: leaking the bytes saves a lifetime everywhere.
        let bytes: &'static [u8] = std::fs::read(path(name)).unwrap().leak();
        Self(safetensors::SafeTensors::deserialize(bytes).unwrap())
    }

    pub(crate) fn get(&self, name: &str) -> Tensor {
        let view = self.0.tensor(name).unwrap_or_else(|e| panic!("fixture tensor {name}: {e}"));
        let values = view.data().as_chunks::<4>().0;
        match view.dtype() {
            safetensors::Dtype::F32 => {
                let values: Vec<f32> = values.iter().map(|raw| f32::from_le_bytes(*raw)).collect();
                Tensor::from_vec(values, view.shape(), &Device::Cpu).unwrap()
            }
            safetensors::Dtype::I32 => {
                let values: Vec<u32> = values.iter().map(|raw| i32::from_le_bytes(*raw).try_into().unwrap()).collect();
                Tensor::from_vec(values, view.shape(), &Device::Cpu).unwrap()
            }
            other => panic!("fixture tensor {name} is {other:?}"),
        }
    }
}

/// One component of a fixture model in f32, with its config.json.
pub(crate) fn component(component: Component, folder: &str) -> (Source, serde_json::Value) {
    let folder = path(folder);
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|end| end == "safetensors"));
    let checkpoint = Checkpoint::open(&files).unwrap();
    let config = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    (Source::new(component, &checkpoint, DType::F32, &Device::Cpu), config)
}

/// Largest absolute difference over the largest absolute value of `expected`. Panics if the shapes differ.
pub(crate) fn relative_error(got: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(got.dims(), expected.dims());
    let largest = |x: Tensor| f64::from(x.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap());
    let got = got.to_dtype(DType::F32).unwrap();
    assert!(got.sum_all().unwrap().to_scalar::<f32>().unwrap().is_finite(), "a value is not finite");
    largest((&got - expected).unwrap()) / largest(expected.clone())
}

/// Panics if `got` is further from `expected` than f32 rounding explains.
#[track_caller]
pub(crate) fn assert_same(what: &str, got: &Tensor, expected: &Tensor) {
    const LIMIT: f64 = 2e-5;
    let error = relative_error(got, expected);
    assert!(error <= LIMIT, "{what}: relative error {error:.2e} is above {LIMIT:.0e}");
}
