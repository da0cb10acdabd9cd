//! The proof, on the user's own model and adapters, that a switch of LoRAs leaves nothing behind.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::time::Instant;

use ::models::lora::Patches;
use ::models::nn::Weight;
use ::models::weights::Component;
use candle_core::{DType, Tensor};
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::{Lora, Sources};
use crate::config::Config;
use crate::engine::{self, LoraMode, Pipeline, Selected};
use crate::fetch::Progress;
use crate::hex::hex;
use crate::ops::Machine;
use crate::ops::generate::Precision;
use crate::ops::{Error, models};

#[derive(Debug, Clone)]
pub struct VerifyOrder {
    pub loras: Vec<Lora>,
    pub model: String,
    pub machine: Machine,
    pub precision: Option<Precision>,
    pub mode: LoraMode,
    /// How many switches.
    pub switches: usize,
    /// Of the random order.
    pub seed: u64,
}

/// What was found. An inequality is an error, so this says that all was equal.
#[derive(Debug, Clone, Serialize)]
pub struct Verified {
    pub model: String,
    pub switches: usize,
    pub tensors: usize,
    /// SHA-256 over all weights without any LoRA.
    pub base: String,
    pub states: Vec<Timed>,
}

/// One adapter, or none, on the weights.
#[derive(Debug, Clone, Serialize)]
pub struct Timed {
    pub reference: Option<String>,
    pub weights: String,
    pub times: usize,
    /// Median of switching to it.
    pub milliseconds: f64,
}

/// Puts each adapter on and takes it off again in random order. After every switch all weights must be, bit for bit, what they were
/// the first time in that state.
pub fn verify(
    order: &VerifyOrder,
    config: &Config,
    told: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Verified, Error> {
    let model = models::resolve(&order.model, config)?;
    order.precision.map_or(Ok(()), |precision| precision.allows(order.mode))?;
    let selected = Sources::new(config).open(&order.loras, told)?;
    let device = order.machine.open()?;
    let plan = order.machine.plan(&model, &device, order.precision)?;
    let pipeline = Pipeline::load(&model.bundle, &device, plan, &mut |_| {})?;
    let mut patches = pipeline.patches();
    let order = &VerifyOrder { mode: pipeline.lora_mode(order.mode), ..order.clone() };
    patches.apply(&[], order.mode).map_err(engine::Error::from)?;
    let base = digest(&patches)?;
    let mut known: BTreeMap<usize, String> = BTreeMap::from([(0, base.clone())]);
    let mut times: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
    let mut random = fastrand::Rng::with_seed(order.seed);
    for i in 0..order.switches {
        // State 0 is none; each is visited at least every so often, in an order that the seed fixes.
        let which = if i < selected.len() { i + 1 } else { random.usize(..=selected.len()) };
        apply(&mut patches, &selected, which, order, &device, &mut known, &mut times)?;
    }
    apply(&mut patches, &selected, 0, order, &device, &mut known, &mut times)?;
    let states = known.into_iter().map(|(which, weights)| {
        let mut all = times.remove(&which).unwrap_or_default();
        all.sort_by(f64::total_cmp);
        let milliseconds = all.get(all.len() / 2).copied().unwrap_or(0.0);
        let reference = which.checked_sub(1).map(|i| order.loras[i].reference.clone());
        Timed { reference, weights, times: all.len(), milliseconds }
    });
    let states = states.collect();
    Ok(Verified { model: model.name, switches: order.switches + 1, tensors: patches.names().count(), base, states })
}

fn apply(
    patches: &mut Patches,
    selected: &[Selected],
    which: usize,
    order: &VerifyOrder,
    device: &candle_core::Device,
    known: &mut BTreeMap<usize, String>,
    times: &mut BTreeMap<usize, Vec<f64>>,
) -> Result<(), Error> {
    let set = which.checked_sub(1).map(|i| std::slice::from_ref(&selected[i])).unwrap_or_default();
    let start = Instant::now();
    patches.apply(set, order.mode).map_err(engine::Error::from)?;
    device.synchronize().map_err(engine::Error::from)?;
    times.entry(which).or_default().push(start.elapsed().as_secs_f64() * 1e3);
    let found = digest(patches)?;
    let before = known.entry(which).or_insert_with(|| found.clone());
    if *before == found {
        return Ok(());
    }
    let name = which.checked_sub(1).map_or("no LoRA", |i| order.loras[i].reference.as_str());
    Err(Error::Unequal(format!("the weights with {name} differ from the first time: {found} and {before}; please report this")))
}

/// SHA-256 over what is computed with, tensor by tensor in the order of names.
fn digest(patches: &Patches) -> Result<String, Error> {
    let mut hasher = Sha256::new();
    let names: Vec<(Component, String)> = patches.names().map(|(component, name)| (component, name.to_owned())).collect();
    for (component, name) in names {
        let Some(parameter) = patches.parameter(component, &name) else { continue };
        let (weight, branch) = parameter.current().map_err(engine::Error::from)?;
        hasher.update(name.as_bytes());
        let mut add = |tensor: &Tensor| -> Result<(), Error> {
            let bytes = |tensor: &Tensor| -> candle_core::Result<Vec<u8>> {
                // Widening to f32 keeps every value apart.
                Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?.into_iter().flat_map(f32::to_le_bytes).collect())
            };
            hasher.update(bytes(tensor).map_err(engine::Error::from)?);
            Ok(())
        };
        match &weight {
            Weight::Dense(tensor) => add(tensor)?,
            other => add(&other.dense(DType::F32).map_err(engine::Error::from)?)?,
        }
        for addend in branch.iter() {
            match &addend.delta {
                kernels::Delta::LowRank { up, down } => {
                    add(up)?;
                    add(down)?;
                }
                kernels::Delta::Dense(delta) => add(delta)?,
            }
        }
    }
    Ok(hex(&hasher.finalize()))
}
