//! LoRAs as their writers' own programs store them: the weights they amount to, and the latents.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use candle_core::{DType, Device, Tensor};
use darkroom::engine::{LoraMode, Pipeline};
use models::weights::Component;

use crate::fixtures::{self, Fixture, relative_error, relative_l2};
use crate::lora::Case;

/// Largest relative L2 error of the final latents.
const LATENTS: f64 = 1e-3;
/// Largest relative error of a weight. The reference's are read off f32 layers with the identity as input, through their biases.
const WEIGHT: f64 = 2e-6;
/// Rows of each matrix that the fixture holds.
const ROWS: usize = 8;

fn weights(pipeline: &Pipeline) -> BTreeMap<String, Tensor> {
    let patches = pipeline.patches();
    let named = |component: Component, name: &str| {
        let part = match component {
            Component::Clip => "clip",
            Component::T5 => "t5",
            _ => "transformer",
        };
        let (weight, branch) = patches.parameter(component, name).unwrap().current().unwrap();
        assert!(branch.is_empty());
        (format!("{part}/{name}"), weight.dense(DType::F32).unwrap())
    };
    patches.names().map(|(component, name)| named(component, name)).collect()
}

/// The rows that the fixture holds of a matrix; a vector whole.
fn sample(tensor: &Tensor) -> Tensor {
    let rows = tensor.dim(0).unwrap();
    if tensor.rank() == 1 {
        return tensor.clone();
    }
    let picked: Vec<u32> = (0..ROWS).map(|i| (i * (rows - 1) / (ROWS - 1)) as u32).collect();
    tensor.index_select(&Tensor::new(picked, &Device::Cpu).unwrap(), 0).unwrap()
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

#[test]
fn files_of_lycoris_peft_and_diffusers_amount_to_what_they_amount_to_there() {
    let cases: Vec<Case> = serde_json::from_value(fixtures::json("lora/writers/cases.json")).unwrap();
    let expected = Fixture::open("lora/writers/expected.safetensors");
    let pipeline = fixtures::pipeline("tiny-dev", DType::F32);
    let base = weights(&pipeline);
    let mut failures = Vec::new();
    for case in &cases {
        let job = case.job();
        for unmatched in job.loras.iter().map(|lora| &lora.adapter.report.unmatched_keys).filter(|keys| !keys.is_empty()) {
            failures.push(format!("{}: unmatched {unmatched:?}", case.name));
        }
        pipeline.patches().apply(&job.loras, LoraMode::Auto).unwrap();
        let mut compared = BTreeSet::new();
        for (name, tensor) in weights(&pipeline) {
            if !case.changed.contains(&name) {
                if bits(&tensor) != bits(&base[&name]) {
                    failures.push(format!("{}: {name} should not change", case.name));
                }
                continue;
            }
            let error = relative_error(&sample(&tensor), &expected.get(&format!("{}/{name}", case.name)));
            if error > WEIGHT {
                failures.push(format!("{}: {name} is off by {error:.1e}", case.name));
            }
            compared.insert(name);
        }
        if compared != case.changed {
            let missing: Vec<_> = case.changed.difference(&compared).collect();
            failures.push(format!("{}: no such tensors: {missing:?}", case.name));
        }
        let latents = pipeline.run(&job, &mut |_| ControlFlow::Continue(())).unwrap().latents;
        let error = relative_l2(&latents, &expected.get(&format!("{}/latents", case.name)));
        if error.is_nan() || error > LATENTS {
            failures.push(format!("{}: latents {error:.1e}", case.name));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
    assert!(cases.len() >= 9);
}
