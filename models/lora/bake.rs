//! A base's files with adapters merged into them: the same keys, types and layout.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::io::{self, Write};

use candle_core::{DType, Device, Tensor};

use super::patch::Selected;
use super::plan::{self, Name, Planned};
use super::{Adapter, Error};
use crate::nn::Weight;
use crate::weights::names::{self, Part};
use crate::weights::{Checkpoint, Component, Kind, Source, Stored, write};

/// Merged tensors that are kept at a time: a fused one has up to four stored parts, not far from each other.
const KEPT: usize = 6;

/// One component's files, and what a set of adapters changes in them.
#[derive(Debug)]
pub struct Baking<'a> {
    checkpoint: &'a Checkpoint,
    component: Component,
    prefix: &'static str,
    source: Source,
    parts: BTreeMap<String, Vec<Part>>,
    set: Vec<Selected>,
    /// What the user should know.
    pub notes: Vec<String>,
    /// How many tensors change.
    pub changed: usize,
    kept: RefCell<Vec<(String, Tensor)>>,
}

impl<'a> Baking<'a> {
    /// Checks that `set`'s changes of `component` fit these files. Quantised files cannot take them.
    pub fn new(component: Component, checkpoint: &'a Checkpoint, set: &[Selected]) -> Result<Self, Error> {
        let only = |selected: &Selected| {
            let mut adapter = Adapter::clone(&selected.adapter);
            adapter.updates.retain(|update| update.module.component == component);
            Selected { adapter: adapter.into(), scales: selected.scales.clone() }
        };
        let set: Vec<Selected> = set.iter().map(only).collect();
        let prefix = names::prefix_in(component, checkpoint).unwrap_or_default();
        let parts = names::canonical(component, &checkpoint.under(prefix));
        let source = Source::new(component, checkpoint, DType::F32, &Device::Cpu);
        let kept = RefCell::default();
        let baking = Self { checkpoint, component, prefix, source, parts, set, notes: Vec::new(), changed: 0, kept };
        let mut notes = Vec::new();
        let plan = plan::plan(&baking.set, &|name| baking.shape(name), &mut notes)?;
        let coarse = plan.keys().find_map(|(_, name)| {
            let quantised = |part: &Part| {
                let stored = baking.stored(&part.key)?;
                let dense = matches!(stored.kind, Kind::Plain(dtype) if write::computed_as(dtype).is_some());
                (!dense).then(|| part.key.clone())
            };
            baking.parts.get(name)?.iter().find_map(quantised)
        });
        if let Some(key) = coarse {
            let what = "a quantised base, whose steps would swallow the change: merge into the bf16 files".into();
            return Err(Error::Unsupported { what, keys: vec![key] });
        }
        let changed = plan.len();
        drop(plan);
        Ok(Self { notes, changed, ..baking })
    }

    /// Writes file number `file` of the checkpoint anew.
    pub fn write(&self, file: usize, out: &mut impl Write) -> io::Result<()> {
        let plan = plan::plan(&self.set, &|name| self.shape(name), &mut Vec::new()).map_err(io::Error::other)?;
        let mut homes: HashMap<String, &str> = HashMap::new();
        for (name, parts) in self.parts.iter().filter(|(name, _)| plan.contains_key(&(self.component, (*name).clone()))) {
            homes.extend(parts.iter().map(|part| (format!("{}{}", self.prefix, part.key), name.as_str())));
        }
        let mut entries = Vec::new();
        for key in self.checkpoint.keys() {
            let Some(stored) = self.checkpoint.get(key).filter(|stored| stored.file() == file) else { continue };
            let Kind::Plain(dtype) = stored.kind else {
                return Err(io::Error::other("a GGUF base cannot be merged into: take the bf16 files"));
            };
            let (home, plan) = (homes.get(key), &plan);
            let bytes = move || match home {
                None => Ok(self.checkpoint.bytes(stored).to_vec()),
                Some(name) => self.part(name, key, plan).map_err(io::Error::other),
            };
            entries.push(write::Entry { name: key.into(), dtype, shape: stored.shape.clone(), bytes: Box::new(bytes) });
        }
        let metadata = self.checkpoint.metadata().clone().into_iter().collect::<HashMap<_, _>>();
        let metadata = if metadata.is_empty() { None } else { Some(metadata) };
        write::write(out, metadata, entries)
    }

    /// The bytes of one stored tensor, cut out of the merged canonical one.
    fn part(&self, name: &str, key: &str, plan: &BTreeMap<Name, Vec<Planned<'_>>>) -> Result<Vec<u8>, Error> {
        let parts = &self.parts[name];
        let merged = self.merged(name, parts, plan)?;
        let mut start = 0;
        let mut found: Vec<(usize, Tensor)> = Vec::new();
        for part in parts {
            let stored = self.stored(&part.key).ok_or_else(|| Error::Misfit { misfits: vec![part.key.clone()] })?;
            let rows = stored.shape[0] / if part.half.is_some() { 2 } else { 1 };
            if key.strip_prefix(self.prefix) == Some(&part.key) {
                found.push((part.half.unwrap_or(0), merged.narrow(0, start, rows)?));
            }
            start += rows;
        }
        // Halves that the canonical order exchanged go back to theirs.
        found.sort_by_key(|(half, _)| *half);
        let tensors: Vec<&Tensor> = found.iter().map(|(_, tensor)| tensor).collect();
        Ok(write::bytes(&Tensor::cat(&tensors, 0)?)?)
    }

    fn merged(&self, name: &str, parts: &[Part], plan: &BTreeMap<Name, Vec<Planned<'_>>>) -> Result<Tensor, Error> {
        if let Some((_, tensor)) = self.kept.borrow().iter().find(|(kept, _)| kept == name) {
            return Ok(tensor.clone());
        }
        let stored = parts.first().and_then(|part| self.stored(&part.key));
        let dtype = stored.and_then(|stored| match stored.kind {
            Kind::Plain(dtype) => write::computed_as(dtype),
            Kind::Gguf(_) => None,
        });
        let misfit = || Error::Misfit { misfits: vec![name.to_owned()] };
        let (dtype, shape) = (dtype.ok_or_else(misfit)?, self.shape(&(self.component, name.into())).ok_or_else(misfit)?);
        let pristine = self.source.tensor_as(name, shape, dtype)?;
        let planned = plan.get(&(self.component, name.to_owned())).ok_or_else(misfit)?;
        let addends = plan::addends(planned, &Weight::Dense(pristine.clone()), &Device::Cpu)?;
        let merged = plan::merged(&pristine, &addends)?;
        let mut kept = self.kept.borrow_mut();
        if kept.len() >= KEPT {
            kept.remove(0);
        }
        kept.push((name.into(), merged.clone()));
        Ok(merged)
    }

    fn shape(&self, (component, name): &Name) -> Option<Vec<usize>> {
        (*component == self.component).then(|| self.source.shape(name)).flatten()
    }

    fn stored(&self, key: &str) -> Option<&Stored> {
        self.checkpoint.get(&format!("{}{key}", self.prefix))
    }
}
