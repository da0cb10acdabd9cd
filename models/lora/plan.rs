//! Which tensors a set of adapters changes, by what, and what comes of one.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use kernels::{Addend, Delta};

use super::Error;
use super::adapter::Update;
use super::assemble::covered;
use super::modules::Place;
use super::patch::Selected;
use crate::nn::Weight;
use crate::weights::Component;

/// A tensor of the model: its component and its canonical name.
pub(super) type Name = (Component, String);

/// One change of one tensor.
pub(super) struct Planned<'a> {
    update: &'a Update,
    scale: f64,
    rows: Range<usize>,
}

/// What each tensor gets, in the order of the set; an error that lists every misfit. `shape` knows the base's tensors.
pub(super) fn plan<'a>(
    set: &'a [Selected],
    shape: &dyn Fn(&Name) -> Option<Vec<usize>>,
    notes: &mut Vec<String>,
) -> Result<BTreeMap<Name, Vec<Planned<'a>>>, Error> {
    let mut plan: BTreeMap<Name, Vec<Planned<'a>>> = BTreeMap::new();
    let mut misfits = Vec::new();
    for selected in set {
        let mut absent = 0;
        for update in &selected.adapter.updates {
            let name = (update.module.component, update.tensor());
            let Some(of) = shape(&name) else {
                // schnell was distilled without guidance and has no such layer.
                if update.module.name.starts_with("guidance_in") {
                    absent += 1;
                } else {
                    misfits.push(format!("it has no {}", update.module));
                }
                continue;
            };
            let weight = shape(&(update.module.component, update.module.weight()));
            let d = weight.and_then(|shape| shape.get(1).copied()).unwrap_or(0);
            match covered(&update.module, update.bias, &update.change, &of, d) {
                Err(misfit) => misfits.push(misfit),
                Ok(rows) => {
                    let scale = selected.scales.of(&update.module);
                    // At scale 0 an adapter is not there, replacements included.
                    if scale != 0. {
                        plan.entry(name).or_default().push(Planned { update, scale, rows });
                    }
                }
            }
        }
        if absent > 0 {
            notes.push(format!("{absent} changes of the guidance embedding have no effect: this base has none"));
        }
    }
    if misfits.is_empty() { Ok(plan) } else { Err(Error::Misfit { misfits }) }
}

/// The addends of one tensor, in f32 on `device`.
pub(super) fn addends(planned: &[Planned<'_>], pristine: &Weight, device: &Device) -> Result<Vec<Addend>, Error> {
    let addends = planned.iter().map(|planned| planned.addend(pristine, device)).collect::<Result<_, Error>>()?;
    Ok(kernels::joined(addends)?)
}

/// The pristine tensor with all addends: summed in f32, rounded once to its own dtype.
pub(super) fn merged(pristine: &Tensor, addends: &[Addend]) -> Result<Tensor, Error> {
    Ok(match pristine.dims() {
        [_] => kernels::merge(&pristine.unsqueeze(1)?, addends)?.squeeze(1)?,
        _ => kernels::merge(pristine, addends)?,
    })
}

impl Planned<'_> {
    fn addend(&self, pristine: &Weight, device: &Device) -> Result<Addend, Error> {
        let rows = self.rows.clone();
        let base = || -> candle_core::Result<Tensor> {
            pristine.dense(DType::F32)?.narrow(0, rows.start, rows.len())?.to_device(device)
        };
        let Update { module, bias, change } = self.update;
        let place = if module.place == Place::SwappedHalves { Place::SwappedHalves } else { Place::Whole };
        let delta = change.delta(self.scale, place, device, base)?;
        let vector = *bias || module.is_norm();
        let delta = match delta {
            Delta::Dense(delta) if vector => Delta::Dense(delta.unsqueeze(1)?),
            other => other,
        };
        Ok(Addend { rows: self.rows.clone(), delta })
    }
}
