//! Any subset of modules, at any ranks, in any type and naming, in any order: what is merged is what the formula says, and all else stays.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock, Mutex};

use candle_core::DType;
use darkroom::engine::{Adapter, LoraMode, Pipeline, Scales, Selected};
use models::weights::Component;
use proptest::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::fixtures;

type Matrix = (String, usize, usize);

static TINY: LazyLock<Mutex<Pipeline>> = LazyLock::new(|| Mutex::new(fixtures::pipeline("tiny-dev", DType::F32)));

/// The matrices of the tiny transformer's blocks, by canonical name.
fn matrices(pipeline: &Pipeline) -> Vec<Matrix> {
    let patches = pipeline.patches();
    let of = |(component, name): (Component, &str)| {
        let shape = patches.parameter(component, name).unwrap().shape();
        (shape.len() == 2 && name.contains("blocks")).then(|| (name.trim_end_matches(".weight").to_owned(), shape[0], shape[1]))
    };
    patches.names().filter(|(component, _)| *component == Component::Transformer).filter_map(of).collect()
}

fn weights(pipeline: &Pipeline) -> BTreeMap<String, Vec<f32>> {
    let patches = pipeline.patches();
    let values = |name: &str| {
        let (weight, _) = patches.parameter(Component::Transformer, name).unwrap().current().unwrap();
        weight.dense(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let names: Vec<String> =
        patches.names().filter(|(c, _)| *c == Component::Transformer).map(|(_, name)| name.to_owned()).collect();
    names.into_iter().map(|name| (name.clone(), values(&name))).collect()
}

/// One changed module of a file.
#[derive(Debug, Clone)]
struct Piece {
    module: usize,
    rank: usize,
    naming: usize,
    alpha: Option<f32>,
    seed: u64,
}

#[derive(Debug, Clone)]
struct File {
    pieces: Vec<Piece>,
    dtype: usize,
    scale: f64,
}

fn piece() -> impl Strategy<Value = Piece> {
    (0usize..64, 1usize..9, 0usize..3, proptest::option::of(0.1f32..16.0), any::<u64>())
        .prop_map(|(module, rank, naming, alpha, seed)| Piece { module, rank, naming, alpha, seed })
}

fn file() -> impl Strategy<Value = File> {
    (proptest::collection::vec(piece(), 1..8), 0usize..3, -2.0f64..2.0).prop_map(|(pieces, dtype, scale)| File {
        pieces,
        dtype,
        scale,
    })
}

/// Values that every type holds exactly: eighths.
fn eighths(n: usize, seed: u64) -> Vec<f32> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..n).map(|_| f32::from(random.u8(..17)) / 8.0 - 1.0).collect()
}

/// The file, and per module what it adds at scale 1 in f64.
fn make(file: &File, matrices: &[Matrix]) -> (Arc<Adapter>, BTreeMap<String, Vec<f64>>) {
    let mut tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)> = BTreeMap::new();
    let mut sums = BTreeMap::new();
    for piece in &file.pieces {
        let (name, rows, columns) = &matrices[piece.module % matrices.len()];
        if sums.contains_key(name) {
            continue;
        }
        let (up, down) = (eighths(rows * piece.rank, piece.seed), eighths(piece.rank * columns, !piece.seed));
        let factor = piece.alpha.map_or(1.0, |alpha| f64::from(alpha) / piece.rank as f64);
        let mut sum = vec![0f64; rows * columns];
        for row in 0..*rows {
            for column in 0..*columns {
                let product =
                    (0..piece.rank).map(|i| f64::from(up[row * piece.rank + i]) * f64::from(down[i * columns + column]));
                sum[row * columns + column] = factor * product.sum::<f64>();
            }
        }
        sums.insert(name.clone(), sum);
        let (stem, ends) = match piece.naming {
            0 => (format!("lora_unet_{}", name.replace('.', "_")), ["lora_up.weight", "lora_down.weight"]),
            1 => (format!("diffusion_model.{name}"), ["lora_B.weight", "lora_A.weight"]),
            _ => (name.clone(), ["lora_up.weight", "lora_down.weight"]),
        };
        tensors.insert(format!("{stem}.{}", ends[0]), (vec![*rows, piece.rank], up));
        tensors.insert(format!("{stem}.{}", ends[1]), (vec![piece.rank, *columns], down));
        if let Some(alpha) = piece.alpha {
            tensors.insert(format!("{stem}.alpha"), (vec![], vec![alpha]));
        }
    }
    let stored: Vec<(String, Vec<usize>, Dtype, Vec<u8>)> = tensors
        .into_iter()
        .map(|(key, (shape, values))| {
            // An alpha is any number, so it keeps its own type.
            let dtype = if key.ends_with(".alpha") { 0 } else { file.dtype };
            let bytes = match dtype {
                0 => values.iter().flat_map(|v| v.to_le_bytes().to_vec()).collect(),
                1 => values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes().to_vec()).collect(),
                _ => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes().to_vec()).collect::<Vec<u8>>(),
            };
            (key, shape, [Dtype::F32, Dtype::F16, Dtype::BF16][dtype], bytes)
        })
        .collect();
    let views =
        stored.iter().map(|(key, shape, dtype, bytes)| (key.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    let mut on_disk = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut on_disk, &safetensors::serialize(views, None).unwrap()).unwrap();
    (Arc::new(Adapter::open(on_disk.path()).unwrap()), sums)
}

fn bits(weights: &BTreeMap<String, Vec<f32>>) -> BTreeMap<&str, Vec<u32>> {
    weights.iter().map(|(name, values)| (name.as_str(), values.iter().map(|v| v.to_bits()).collect())).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_merged_is_what_the_formula_says(files in proptest::collection::vec(file(), 1..4)) {
        let pipeline = TINY.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        pipeline.patches().apply(&[], LoraMode::Merge).unwrap();
        let base = weights(&pipeline);
        let matrices = matrices(&pipeline);
        prop_assert!(matrices.len() >= 15);
        let made: Vec<_> = files.iter().map(|file| make(file, &matrices)).collect();
        let set: Vec<Selected> = files.iter().zip(&made)
            .map(|(file, (adapter, _))| Selected { adapter: adapter.clone(), scales: Scales::uniform(file.scale) }).collect();
        pipeline.patches().apply(&set, LoraMode::Merge).unwrap();
        let merged = weights(&pipeline);
        for (name, values) in &merged {
            let sums: Vec<(f64, &Vec<f64>)> = files.iter().zip(&made)
                .filter_map(|(file, (_, sums))| Some((file.scale, sums.get(name.trim_end_matches(".weight"))?))).collect();
            if sums.is_empty() {
                prop_assert_eq!(values, &base[name], "{} is not in any file", name);
                continue;
            }
            for (i, value) in values.iter().enumerate() {
                let parts = sums.iter().map(|(scale, sum)| scale * sum[i]);
                let want = f64::from(base[name][i]) + parts.clone().sum::<f64>();
                let size = f64::from(base[name][i]).abs() + parts.map(f64::abs).sum::<f64>();
                prop_assert!((f64::from(*value) - want).abs() <= 2e-6 * (1.0 + size), "{}[{}]: {} is not {}", name, i, value, want);
            }
        }
        // By another way to the same set: the same bits. Off again: the base's.
        pipeline.patches().apply(&set[..set.len() - 1], LoraMode::Merge).unwrap();
        pipeline.patches().apply(&set, LoraMode::Merge).unwrap();
        prop_assert!(bits(&weights(&pipeline)) == bits(&merged));
        pipeline.patches().apply(&[], LoraMode::Merge).unwrap();
        prop_assert!(bits(&weights(&pipeline)) == bits(&base));
        // As a branch, the weights themselves are the base's all the while.
        pipeline.patches().apply(&set, LoraMode::Branch).unwrap();
        prop_assert!(bits(&weights(&pipeline)) == bits(&base));
        pipeline.patches().apply(&[], LoraMode::Merge).unwrap();
    }
}
