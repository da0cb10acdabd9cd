//! From a module's tensors to its change.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Tensor};
use safetensors::Dtype;

use super::adapter::{Update, zero};
use super::change::{Change, Factor, Kind, Magnitude};
use super::keys::{self, Role};
use super::metadata::{Scaling, Settings};
use super::modules::{Module, Naming, Place};
use super::{Error, Report};
use crate::weights::{Checkpoint, Component, Kind as Storage};

/// The keys of one module by what they are for it.
#[derive(Debug, Default)]
pub(super) struct Parts<'a> {
    pub(super) body: String,
    pub(super) naming: Option<Naming>,
    pub(super) keys: BTreeMap<Role, &'a str>,
}

impl Parts<'_> {
    /// The module's name without prefix, with dots where the file has dots.
    fn dotted(&self) -> String {
        let stem = self.keys.values().find_map(|key| keys::split_role(key)).map_or("", |(stem, _)| stem.trim_end_matches('_'));
        let start = stem.len().saturating_sub(self.body.len());
        stem.get(start..).unwrap_or(&self.body).into()
    }
}

/// The changes of all modules; those that change nothing are counted and left out.
pub(super) fn updates(
    checkpoint: &Checkpoint,
    path: &Path,
    modules: BTreeMap<Module, Parts<'_>>,
    report: &mut Report,
) -> Result<Vec<Update>, Error> {
    refuse_unsupported(&modules)?;
    let settings = Settings::find(path, checkpoint.metadata())?.unwrap_or_default();
    let scalings = [
        (Component::Transformer, settings.scaling("transformer.")?),
        (Component::Clip, settings.scaling("text_encoder.")?),
        (Component::T5, settings.scaling("text_encoder_2.")?),
    ];
    let mut updates = Vec::new();
    for (module, parts) in modules {
        let scaling = scalings.iter().find(|(component, _)| *component == module.component).map(|(_, scaling)| scaling);
        let mut assembly = Assembly { checkpoint, module: &module, parts, scaling, report };
        let changes = assembly.changes()?;
        if changes.is_empty() {
            report.modules_empty += 1;
        }
        for (bias, change) in &changes {
            *report.algorithms.entry(change.kind.name()).or_default() += 1;
            if change.magnitude.is_some() {
                *report.algorithms.entry("dora").or_default() += 1;
            }
            check_img_in(&module, *bias, change)?;
        }
        updates.extend(changes.into_iter().map(|(bias, change)| Update { module: module.clone(), bias, change }));
    }
    Ok(updates)
}

fn refuse_unsupported(modules: &BTreeMap<Module, Parts<'_>>) -> Result<(), Error> {
    let mut found: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (role, key) in modules.values().flat_map(|parts| &parts.keys) {
        match role {
            Role::Unsupported(what) => found.entry(what).or_default().push((*key).into()),
            Role::Mid | Role::Tucker => found.entry("a convolution's decomposition").or_default().push((*key).into()),
            _ => {}
        }
    }
    match found.pop_first() {
        Some((what, keys)) => Err(Error::Unsupported { what: what.into(), keys }),
        None => Ok(()),
    }
}

/// Control and Fill models have more input channels: their adapters belong to another base.
fn check_img_in(module: &Module, bias: bool, change: &Change) -> Result<(), Error> {
    const CHANNELS: usize = 64;
    let shape = change.kind.shape()?;
    match shape.as_slice() {
        [_, columns] if module.name == "img_in" && !bias && *columns != CHANNELS => Err(Error::Unsupported {
            what: format!("a control or fill LoRA: it widens the picture's input from {CHANNELS} to {columns} channels"),
            keys: Vec::new(),
        }),
        _ => Ok(()),
    }
}

struct Assembly<'a> {
    checkpoint: &'a Checkpoint,
    module: &'a Module,
    parts: Parts<'a>,
    scaling: Option<&'a Scaling>,
    report: &'a mut Report,
}

impl Assembly<'_> {
    /// What changes the weight (false) and the bias (true).
    fn changes(&mut self) -> Result<Vec<(bool, Change)>, Error> {
        let mut changes = Vec::new();
        let mut factor = 1.;
        if let Some((kind, rank)) = self.adaptation()? {
            factor = self.factor(rank)?;
            let magnitude = self.magnitude(&kind)?;
            // With a magnitude even a zero delta changes something.
            if magnitude.is_some() || !self.is_zero() {
                changes.push((false, Change { kind, factor, magnitude }));
            }
        } else if self.parts.keys.contains_key(&Role::Magnitude) {
            return Err(self.bad("it has a DoRA magnitude and no factors"));
        }
        let plain = |kind| Change { kind, factor: 1., magnitude: None };
        if let Some(key) = self.present(Role::Diff) {
            changes.push((false, plain(Kind::Difference(self.vector_or_matrix(key)?))));
        }
        if let Some(key) = self.key(Role::SetWeight) {
            changes.push((false, plain(Kind::Replacement(self.vector_or_matrix(key)?))));
        }
        if let Some(key) = self.present(Role::DiffBias) {
            changes.push((true, plain(Kind::Difference(self.tensor(key)?.flatten_all()?))));
        }
        if let Some(key) = self.key(Role::SetBias) {
            changes.push((true, plain(Kind::Replacement(self.tensor(key)?.flatten_all()?))));
        }
        if let Some(key) = self.present(Role::UpBias) {
            let kind = Kind::Difference(self.tensor(key)?.flatten_all()?);
            changes.push((true, Change { kind, factor, magnitude: None }));
        }
        Ok(changes)
    }

    /// The factors of one algorithm, with the rank by which alpha is divided (none where alpha means nothing).
    fn adaptation(&self) -> Result<Option<(Kind, Option<usize>)>, Error> {
        use Role::{Down, Up};
        use Role::{HadamardFirstDown, HadamardFirstUp, HadamardSecondDown, HadamardSecondUp};
        use Role::{KroneckerLeft, KroneckerLeftDown, KroneckerLeftUp, KroneckerRight, KroneckerRightDown, KroneckerRightUp};
        let has = |role: Role| self.parts.keys.contains_key(&role);
        if has(Up) || has(Down) {
            let (up, down) = (self.matrix(Up)?, self.matrix(Down)?);
            let rank = down.dim(0)?;
            if up.dim(1)? != rank {
                return Err(self.bad(&format!("up {:?} and down {:?} have different ranks", up.dims(), down.dims())));
            }
            return Ok(Some((Kind::LowRank { up, down }, Some(rank))));
        }
        let parts = [HadamardFirstUp, HadamardFirstDown, HadamardSecondUp, HadamardSecondDown];
        if parts.iter().any(|part| has(*part)) {
            let first = Factor::Product(self.matrix(HadamardFirstUp)?, self.matrix(HadamardFirstDown)?);
            let second = Factor::Product(self.matrix(HadamardSecondUp)?, self.matrix(HadamardSecondDown)?);
            if [&first, &second].iter().any(|factor| !fits(factor)) || first.dims()? != second.dims()? {
                return Err(self.bad("the factors of its LoHa have different shapes"));
            }
            let Factor::Product(_, down) = &first else { return Ok(None) };
            let rank = down.dim(0)?;
            return Ok(Some((Kind::Hadamard { first, second }, Some(rank))));
        }
        let left = self.factor_of(KroneckerLeft, KroneckerLeftUp, KroneckerLeftDown)?;
        let right = self.factor_of(KroneckerRight, KroneckerRightUp, KroneckerRightDown)?;
        match (left, right) {
            (None, None) => Ok(None),
            (Some(left), Some(right)) => {
                if !fits(&left) || !fits(&right) {
                    return Err(self.bad("the factors of its LoKr have different ranks"));
                }
                let rank = |factor: &Factor| match factor {
                    Factor::Product(_, down) => down.dim(0).ok(),
                    Factor::Whole(_) => None,
                };
                let rank = rank(&right).or_else(|| rank(&left));
                Ok(Some((Kind::Kronecker { left, right }, rank)))
            }
            _ => Err(self.bad("one side of its LoKr is missing")),
        }
    }

    fn factor_of(&self, whole: Role, up: Role, down: Role) -> Result<Option<Factor>, Error> {
        let has = |role: Role| self.parts.keys.contains_key(&role);
        match (has(whole), has(up) || has(down)) {
            (true, _) => Ok(Some(Factor::Whole(self.matrix(whole)?))),
            (false, true) => Ok(Some(Factor::Product(self.matrix(up)?, self.matrix(down)?))),
            (false, false) => Ok(None),
        }
    }

    /// alpha / r, where alpha is the stored tensor, else what the header says, else r.
    fn factor(&mut self, rank: Option<usize>) -> Result<f64, Error> {
        if let Some(rank) = rank {
            *self.report.ranks.entry(rank).or_default() += 1;
        }
        if let Some(key) = self.key(Role::Multiplier) {
            return self.number(key);
        }
        // Both sides of a LoKr are whole: its alpha is bookkeeping, except PEFT's.
        let Some(rank) = rank else {
            let scaled = self.scaling.and_then(|scaling| scaling.whole_kronecker(&self.parts.dotted()));
            return Ok(scaled.unwrap_or(1.));
        };
        let stored = self.key(Role::Alpha).map(|key| self.number(key)).transpose()?;
        // A stored 0 means what an absent alpha means.
        let alpha = stored.filter(|alpha| *alpha != 0.).or_else(|| self.scaling?.alpha(&self.parts.dotted()));
        let Some(alpha) = alpha else { return Ok(1.) };
        if !alpha.is_finite() {
            return Err(self.bad(&format!("its alpha is {alpha}")));
        }
        if !self.report.alphas.contains(&alpha) {
            self.report.alphas.push(alpha);
        }
        let root = stored.is_none() && self.scaling.is_some_and(|scaling| scaling.root);
        Ok(alpha / if root { (rank as f64).sqrt() } else { rank as f64 })
    }

    fn magnitude(&self, kind: &Kind) -> Result<Option<Magnitude>, Error> {
        let Some(key) = self.key(Role::Magnitude) else { return Ok(None) };
        let m = self.tensor(key)?;
        let (output, input) = match kind.shape()?.as_slice() {
            [output, input] => (*output, *input),
            _ => return Ok(None),
        };
        // A vector that could be either is for each output, as PEFT and ai-toolkit write it.
        match m.dims() {
            [n] | [n, 1] if *n == output => Ok(Some(Magnitude::Output(m.reshape((output, 1))?))),
            [n] | [1, n] if *n == input => Ok(Some(Magnitude::Input(m.reshape((1, input))?))),
            other => Err(self.bad(&format!("its magnitude has shape {other:?} for a weight of {output} x {input}"))),
        }
    }

    /// The change is zero whatever the other factors are.
    fn is_zero(&self) -> bool {
        let sides: [&[Role]; 7] = [
            &[Role::Up],
            &[Role::HadamardFirstUp],
            &[Role::HadamardSecondUp],
            &[Role::HadamardFirstDown],
            &[Role::HadamardSecondDown],
            &[Role::KroneckerLeft, Role::KroneckerLeftUp],
            &[Role::KroneckerRight, Role::KroneckerRightUp, Role::KroneckerRightDown],
        ];
        sides.iter().any(|side| side.iter().any(|role| self.key(*role).is_some_and(|key| zero(self.checkpoint, key))))
    }

    fn key(&self, role: Role) -> Option<&str> {
        self.parts.keys.get(&role).copied()
    }

    /// The key, unless all its values are zero.
    fn present(&self, role: Role) -> Option<&str> {
        self.key(role).filter(|key| !zero(self.checkpoint, key))
    }

    fn bad(&self, reason: &str) -> Error {
        Error::Module { module: self.parts.body.clone(), reason: reason.into() }
    }

    /// As stored where candle can multiply with it, else widened without loss.
    fn tensor(&self, key: &str) -> Result<Tensor, Error> {
        let stored = self.checkpoint.get(key).ok_or_else(|| self.bad("a tensor is missing"))?;
        let dtype = match stored.kind {
            Storage::Plain(Dtype::F16) => DType::F16,
            Storage::Plain(Dtype::BF16 | Dtype::F8_E4M3 | Dtype::F8_E5M2) => DType::BF16,
            _ => DType::F32,
        };
        if stored.shape.contains(&0) {
            return Err(self.bad(&format!("{key} is empty")));
        }
        Ok(self.checkpoint.tensor(stored, dtype)?)
    }

    /// A number in a tensor of one element.
    fn number(&self, key: &str) -> Result<f64, Error> {
        if let Some(whole) = self.checkpoint.get(key).and_then(|stored| self.checkpoint.whole_number(stored)) {
            return Ok(whole as f64);
        }
        let tensor = self.tensor(key)?;
        if tensor.elem_count() != 1 {
            return Err(self.bad(&format!("{key} should be one number and has shape {:?}", tensor.dims())));
        }
        Ok(f64::from(tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?[0]))
    }

    fn matrix(&self, role: Role) -> Result<Tensor, Error> {
        let key = self.key(role).ok_or_else(|| self.bad(&format!("its {role:?} factor is missing")))?;
        let mut tensor = self.tensor(key)?;
        // Written as 1 x 1 convolutions by some.
        while tensor.rank() > 2 && tensor.dim(tensor.rank() - 1)? == 1 {
            tensor = tensor.squeeze(tensor.rank() - 1)?;
        }
        if tensor.rank() != 2 {
            return Err(self.bad(&format!("{key} is no matrix but {:?}", tensor.dims())));
        }
        if self.module.is_norm() {
            return Err(self.bad(&format!("{key} is a matrix for a norm, which has a vector")));
        }
        Ok(tensor)
    }

    /// For norms a vector, for linear layers a matrix.
    fn vector_or_matrix(&self, key: &str) -> Result<Tensor, Error> {
        let tensor = self.tensor(key)?;
        if self.module.is_norm() {
            return Ok(tensor.flatten_all()?);
        }
        if tensor.rank() != 2 {
            return Err(self.bad(&format!("{key} should be a matrix and has shape {:?}", tensor.dims())));
        }
        Ok(tensor)
    }
}

/// The inner sizes agree.
fn fits(factor: &Factor) -> bool {
    match factor {
        Factor::Whole(_) => true,
        Factor::Product(up, down) => up.dim(1).ok() == down.dim(0).ok(),
    }
}

/// Rows of the module's tensor that the change covers, for a tensor of this shape; an error in words if it does not fit.
pub(super) fn covered(
    module: &Module,
    bias: bool,
    change: &Change,
    shape: &[usize],
    d: usize,
) -> Result<std::ops::Range<usize>, String> {
    let got = change.kind.shape().map_err(|e| e.to_string())?;
    let output = shape.first().copied().unwrap_or(0);
    let rows = module.place.rows(output, d);
    let name = if bias { "bias" } else { "weight" };
    if rows.end > output || rows.start > rows.end || (module.place == Place::SwappedHalves && !output.is_multiple_of(2)) {
        return Err(format!("{module}: the base's {name} has {output} rows"));
    }
    let mut want = vec![rows.len()];
    want.extend(&shape[1..]);
    if got == want { Ok(rows) } else { Err(format!("{module}: the LoRA's {name} is {got:?}, the base's {want:?}")) }
}
