//! Adapters on a model's weights: always from the pristine weights, never by subtracting.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use candle_core::{DType, Device};
use serde::Serialize;

use super::plan::{self, Name, Planned};
use super::resident::Resident;
use super::{Adapter, Error, Scales};
use crate::nn::{Parameter, Weight};
use crate::weights::{Component, Keep, is_large};

pub use crate::nn::Home;

/// Where pristine weights stay on the device, adapters that were used lately do too, up to one part in so many of the weights: on FLUX.1
/// 3.4 GB, of which one of rank 16 on every matrix of the blocks takes 344 MB (in f32).
pub const RESIDENT: u64 = 10;

/// How an adapter acts on a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Merged into dense weights; beside fp8 and GGUF weights, whose steps would swallow it.
    #[default]
    Auto,
    /// Merged everywhere; fp8 and GGUF weights that are touched become dense.
    Merge,
    /// Beside every weight.
    Branch,
    /// Merged, and then the dense matrices of the transformer's blocks become e4m3 for products in e4m3: also without adapters, and for
    /// as long as this is the mode.
    Fp8,
}

impl std::str::FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "merge" => Ok(Self::Merge),
            "branch" => Ok(Self::Branch),
            _ => Err("must be auto, merge or branch".into()),
        }
    }
}

/// An adapter with its strength.
#[derive(Debug, Clone)]
pub struct Selected {
    pub adapter: Arc<Adapter>,
    pub scales: Scales,
}

impl Selected {
    fn is(&self, other: &Self) -> bool {
        self.adapter.identity() == other.adapter.identity() && self.scales == other.scales
    }
}

/// What a switch did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Switch {
    /// Tensors that were written, or put back.
    pub changed: usize,
    pub restored: usize,
    /// What the user should know, such as modules that this base does not have.
    pub notes: Vec<String>,
}

/// The adapters on a model. What is computed with is a function of the pristine weights, the adapters in their order and their
/// scales alone, bit for bit, whatever was there before.
#[derive(Debug)]
pub struct Patches {
    parameters: BTreeMap<Name, Parameter>,
    device: Device,
    dtype: DType,
    pub home: Home,
    mode: Mode,
    live: Vec<Selected>,
    touched: BTreeSet<Name>,
    resident: Resident,
    /// A switch failed and so did going back: what is on the weights is not known until one succeeds.
    broken: bool,
}

impl Patches {
    /// For a model's parameters by component and canonical name, computed with in `dtype` on `device`.
    #[must_use]
    pub fn new(parameters: BTreeMap<Name, Parameter>, device: &Device, dtype: DType) -> Self {
        Self {
            parameters,
            device: device.clone(),
            dtype,
            home: Home::default(),
            mode: Mode::default(),
            live: Vec::new(),
            touched: BTreeSet::new(),
            resident: Resident::default(),
            broken: false,
        }
    }

    /// The adapters that are on the weights.
    #[must_use]
    pub fn live(&self) -> &[Selected] {
        &self.live
    }

    /// How they act.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Whether [`Mode::Fp8`] is to be had: all matrices of blocks are dense, pristine ones stay beside what becomes of them, and the device
    /// has products for it.
    #[must_use]
    pub fn can_be_fp8(&self) -> bool {
        let mut large = self.parameters.iter().filter(|(name, _)| quantised(name, Mode::Fp8));
        let dense = |parameter: &Parameter| parameter.pristine().is_ok_and(|weight| weight.is_dense());
        // Not all cards have such products for f16.
        let units = kernels::has_fp8_products(&self.device) && (self.device.is_cpu() || self.dtype == DType::BF16);
        self.home == Home::Device && units && large.all(|(_, parameter)| dense(parameter))
    }

    /// The parameter of that name.
    #[must_use]
    pub fn parameter(&self, component: Component, name: &str) -> Option<&Parameter> {
        self.parameters.get(&(component, name.to_owned()))
    }

    pub fn names(&self) -> impl Iterator<Item = (Component, &str)> {
        self.parameters.keys().map(|(component, name)| (*component, name.as_str()))
    }

    /// Whether adapters act beside weights, so that each product costs more.
    #[must_use]
    pub fn has_branches(&self) -> bool {
        self.touched.iter().any(|name| self.parameters[name].current().is_ok_and(|(_, branch)| !branch.is_empty()))
    }

    /// Bytes of all weights, as they are computed with.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let values: usize = self.parameters.values().map(|parameter| parameter.shape().iter().product::<usize>()).sum();
        (values * self.dtype.size_in_bytes()) as u64
    }

    /// Moves the parameters that `away` names to main memory, from where they are sent to the device whenever they are used.
    ///
    /// Pristine tensors that stand beside changed ones go to `home`, now and from now on.
    pub fn send_to_host(&mut self, away: &dyn Fn(Component, &str) -> bool, home: Home) -> Result<(), Error> {
        if self.home == Home::Device {
            self.home = home;
        }
        self.resident.forget();
        // First these: what lies in a file needs no copy then.
        for ((component, name), parameter) in &self.parameters {
            if away(*component, name) {
                parameter.send_to_host()?;
            }
        }
        for name in &self.touched {
            self.parameters[name].pristine_to(self.home)?;
        }
        Ok(())
    }

    /// Puts exactly `set` on the weights, in this order, in one pass over the tensors that it or the set before it touches.
    ///
    /// Everything is checked before the first tensor changes. If a tensor cannot be made (memory), the set before is put back.
    pub fn apply(&mut self, set: &[Selected], mode: Mode) -> Result<Switch, Error> {
        if !self.broken && mode == self.mode && set.len() == self.live.len() && set.iter().zip(&self.live).all(|(a, b)| a.is(b)) {
            return Ok(Switch::default());
        }
        let mut switch = Switch::default();
        // A set that does not fit the model is refused before any of it is sent to the card.
        self.plan(set, &mut switch.notes)?;
        let near = self.near(set)?;
        let plan = self.plan(&near, &mut Vec::new())?;
        let next: BTreeSet<Name> =
            self.parameters.keys().filter(|name| plan.contains_key(name) || quantised(name, mode)).cloned().collect();
        let before: BTreeSet<Name> = self.touched.union(&next).cloned().collect();
        let done = before.iter().try_for_each(|name| {
            let counted = if next.contains(name) { &mut switch.changed } else { &mut switch.restored };
            self.change(name, plan.get(name), mode).map(|()| *counted += 1)
        });
        if let Err(error) = done {
            // The device may be full: what the set has there goes first.
            drop(plan);
            drop(near);
            self.resident.forget();
            self.fall_back(&before);
            return Err(error);
        }
        (self.live, self.touched, self.mode, self.broken) = (set.to_vec(), next, mode, false);
        Ok(switch)
    }

    /// The set with its adapters on the card, where pristine weights stay there: plans leave room for both.
    fn near(&mut self, set: &[Selected]) -> Result<Vec<Selected>, Error> {
        if self.home != Home::Device || !self.device.is_cuda() {
            return Ok(set.to_vec());
        }
        let most = self.bytes() / RESIDENT;
        let adapters: Vec<_> = set.iter().map(|selected| selected.adapter.clone()).collect();
        let near = self.resident.get(&adapters, &self.device, most)?.into_iter();
        Ok(near.zip(set).map(|(adapter, selected)| Selected { adapter, scales: selected.scales.clone() }).collect())
    }

    fn plan<'a>(&self, set: &'a [Selected], notes: &mut Vec<String>) -> Result<BTreeMap<Name, Vec<Planned<'a>>>, Error> {
        plan::plan(set, &|name| self.parameters.get(name).map(Parameter::shape), notes)
    }

    /// Makes a tensor what it is under `mode` with what is planned for it: with nothing, the pristine one or its e4m3.
    fn change(&self, name: &Name, planned: Option<&Vec<Planned<'_>>>, mode: Mode) -> Result<(), Error> {
        let parameter = &self.parameters[name];
        let planned = match planned {
            Some(planned) => planned.as_slice(),
            None if quantised(name, mode) => &[],
            None => return Ok(parameter.restore()?),
        };
        let pristine = parameter.pristine()?;
        let vector = parameter.shape().len() == 1;
        let merge = match mode {
            Mode::Auto | Mode::Fp8 => pristine.is_dense(),
            Mode::Merge => true,
            Mode::Branch => vector,
        };
        if !merge {
            return Ok(parameter.branch(plan::addends(planned, &pristine, &self.device)?, self.dtype)?);
        }
        // A merge is made where the weight is, a branch where the activations are.
        let there = parameter.device();
        // By the processor for Metal: candle would give the weight a buffer of wider values that it was summed in, for good.
        let made = if there.is_metal() { Device::Cpu } else { there.clone() };
        let addends = plan::addends(planned, &pristine, &made)?;
        let dense = match pristine {
            Weight::Dense(dense) => dense,
            Weight::Mapped(mapped) => mapped.tensor()?,
            other => other.dense(self.dtype)?,
        };
        let merged = match &addends[..] {
            [] => dense,
            addends => plan::merged(&dense.to_device(&made)?, addends)?.to_device(&there)?,
        };
        let weight = if quantised(name, mode) { Keep::Fp8Products.convert(merged)? } else { Weight::Dense(merged) };
        Ok(parameter.replace(weight, self.home)?)
    }

    /// Makes the live set anew on every tensor that may have changed. If that fails too, the next switch makes all of them anew,
    /// whatever it asks for.
    fn fall_back(&mut self, changed: &BTreeSet<Name>) {
        let live = std::mem::take(&mut self.live);
        let failed = match self.plan(&live, &mut Vec::new()) {
            Err(_) => true,
            // All of them are tried, whatever becomes of one.
            Ok(plan) => changed.iter().filter(|name| self.change(name, plan.get(*name), self.mode).is_err()).count() > 0,
        };
        self.broken = failed;
        self.touched.extend(changed.iter().cloned());
        // A set that is not on the weights any more must not look as if it were.
        self.live = if failed { Vec::new() } else { live };
    }
}

/// Whether the mode makes e4m3 of this matrix.
fn quantised((component, name): &Name, mode: Mode) -> bool {
    mode == Mode::Fp8 && *component == Component::Transformer && is_large(*component, name) && name.ends_with(".weight")
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::atomic::{AtomicBool, Ordering};

    use candle_core::Tensor;

    use super::*;

    /// While the base's file is gone, neither the next set nor the one before can be made: then no set counts as being there, not even
    /// the empty one, and the next switch makes everything anew.
    #[test]
    fn what_could_not_be_undone_is_never_taken_for_a_set() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/lora/norm_out.safetensors");
        let adapter = Arc::new(Adapter::open(&path).unwrap());
        let [update] = &adapter.updates[..] else { panic!("it changes one tensor") };
        let (name, shape) = ((update.module.component, update.tensor()), update.change.kind.shape().unwrap());
        let stored = Tensor::randn(0f32, 1., shape.clone(), &Device::Cpu).unwrap();
        let gone = Arc::new(AtomicBool::new(false));
        let reread = {
            let (stored, gone) = (stored.clone(), gone.clone());
            Arc::new(move || match gone.load(Ordering::Relaxed) {
                true => candle_core::bail!("the file is gone"),
                false => Ok(Weight::Dense(stored.clone())),
            })
        };
        let parameter = Parameter::new(Weight::Dense(stored.clone()), &shape, &Device::Cpu, Some(reread));
        let bits = || parameter.tensor().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let pristine = bits();
        let mut patches = Patches::new(BTreeMap::from([(name, parameter.clone())]), &Device::Cpu, DType::F32);
        patches.home = Home::File;
        let at = |scale| [Selected { adapter: adapter.clone(), scales: Scales::uniform(scale) }];

        patches.apply(&at(0.5), Mode::Auto).unwrap();
        let half = bits();
        assert_ne!(half, pristine);
        for (next, want) in [(&[][..], &pristine), (&at(0.5)[..], &half)] {
            patches.apply(&at(0.5), Mode::Auto).unwrap();
            gone.store(true, Ordering::Relaxed);
            assert!(patches.apply(&at(1.), Mode::Auto).is_err());
            assert!(patches.live().is_empty());
            assert!(patches.apply(next, Mode::Auto).is_err(), "nothing can be known to be there");
            gone.store(false, Ordering::Relaxed);
            patches.apply(next, Mode::Auto).unwrap();
            assert_eq!(&bits(), want);
        }
    }
}
