//! One LoRA under two namings in one file: fused modules and their members. Each says all of it, and both together would say it twice.

use std::collections::{BTreeMap, BTreeSet};

use super::adapter::zero;
use super::assemble::Parts;
use super::keys::Role;
use super::modules::{Module, Naming, Place};
use crate::weights::{Checkpoint, Component};

/// A module that changes some rows of a tensor.
struct Claim<'a> {
    module: &'a Module,
    naming: Naming,
    /// Nothing that belongs to its change is missing.
    complete: bool,
}

/// Where two namings change exactly the same rows of a tensor, keeps the first that is whole. Says what is left out. What one naming says by itself
/// stays as it is, as does a naming that has something of its own to say: their changes add up.
pub(super) fn settle(checkpoint: &Checkpoint, modules: &mut BTreeMap<Module, Parts<'_>>) -> Option<String> {
    let mut surplus: Vec<(Module, Naming, bool)> = Vec::new();
    for bias in [false, true] {
        let mut tensors: BTreeMap<(Component, &str), Vec<Claim<'_>>> = BTreeMap::new();
        for (module, parts) in modules.iter().filter(|(_, parts)| changes(checkpoint, parts, bias)) {
            let Some(naming) = parts.naming else { continue };
            let complete = parts.keys.contains_key(&Role::Up) == parts.keys.contains_key(&Role::Down);
            let claims = tensors.entry((module.component, module.name.as_str())).or_default();
            claims.push(Claim { module, naming, complete });
        }
        for ((_, tensor), claims) in &tensors {
            let covered = |naming: Naming| {
                let own = claims.iter().filter(|claim| claim.naming == naming);
                own.fold(0u8, |rows, claim| rows | members(claim.module.place, tensor))
            };
            let broken = |naming: Naming| claims.iter().any(|claim| claim.naming == naming && !claim.complete);
            let Some(kept) = claims.iter().map(|claim| claim.naming).min_by_key(|naming| (broken(*naming), *naming)) else {
                continue;
            };
            let double = claims.iter().filter(|claim| claim.naming != kept && covered(claim.naming) == covered(kept));
            surplus.extend(double.map(|claim| (claim.module.clone(), claim.naming, bias)));
        }
    }
    for (module, _, bias) in &surplus {
        if let Some(parts) = modules.get_mut(module) {
            parts.keys.retain(|role, _| of_bias(*role) != Some(*bias));
            if parts.keys.keys().all(|role| of_bias(*role).is_none()) {
                modules.remove(module);
            }
        }
    }
    let count = surplus.iter().map(|(module, ..)| module).collect::<BTreeSet<_>>().len();
    let namings: BTreeSet<Naming> = surplus.iter().map(|(_, naming, _)| *naming).collect();
    let names: Vec<String> = namings.iter().map(|naming| format!("{naming:?}").to_lowercase()).collect();
    let names = names.join(" and ");
    (count > 0).then(|| {
        format!("the LoRA is in its file under two namings and counts once: {count} modules by {names} names are left out")
    })
}

/// Whether the module changes the weight (or the bias). A product with zeros changes nothing.
fn changes(checkpoint: &Checkpoint, parts: &Parts<'_>, bias: bool) -> bool {
    let idle =
        !bias && !parts.keys.contains_key(&Role::Magnitude) && parts.keys.get(&Role::Up).is_some_and(|key| zero(checkpoint, key));
    !idle && parts.keys.keys().any(|role| of_bias(*role) == Some(bias))
}

/// Whether a tensor in this role changes the bias; none by itself changes neither.
fn of_bias(role: Role) -> Option<bool> {
    match role {
        Role::Alpha | Role::Multiplier => None,
        Role::UpBias | Role::DiffBias | Role::SetBias => Some(true),
        _ => Some(false),
    }
}

/// The members of a fused tensor that a place covers, one bit each.
fn members(place: Place, tensor: &str) -> u8 {
    match place {
        Place::Query => 0b0001,
        Place::Key => 0b0010,
        Place::Value => 0b0100,
        Place::Qkv => 0b0111,
        Place::Whole if tensor.ends_with("qkv") => 0b0111,
        Place::Mlp => 0b1000,
        Place::Whole | Place::SwappedHalves => 0b1111,
    }
}
