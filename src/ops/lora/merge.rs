//! A base with adapters in it, as files.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use ::models::bundle::{Blob, Files};
use ::models::lora::Baking;
use ::models::weights::Component;
use serde::Serialize;

use super::{Lora, Sources, target};
use crate::config::Config;
use crate::engine::Selected;
use crate::fetch::{self, Progress};
use crate::ops::{Error, files, models};

#[derive(Debug, Clone)]
pub struct MergeOrder {
    /// A card's name, a folder or a file.
    pub base: String,
    pub loras: Vec<Lora>,
    /// A `.safetensors` file for the transformer alone, else a folder in the diffusers layout.
    pub out: PathBuf,
    pub force: bool,
}

/// What was written.
#[derive(Debug, Clone, Serialize)]
pub struct MergedModel {
    pub path: PathBuf,
    pub tensors_changed: usize,
    pub bytes: u64,
    pub remarks: Vec<String>,
}

/// Writes the base anew with the adapters merged into it: its own layout, keys and types. What is at `out` is there either whole or
/// not at all.
pub fn merge(
    order: &MergeOrder,
    config: &Config,
    told: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<MergedModel, Error> {
    let model = models::resolve(&order.base, config)?;
    let out = order.out.as_path();
    let folder = target::check(out, order.force)?;
    let selected = Sources::new(config).open(&order.loras, told)?;
    let names: Vec<String> = order.loras.iter().map(|lora| fetch::shown(&lora.reference)).collect();
    let names = names.join(", ");
    let mut remarks: Vec<String> = selected.iter().flat_map(|selected| selected.adapter.report.warnings()).collect();
    let bundle = &model.bundle;
    let mut changed = 0;
    if out.extension().is_some_and(|end| end.eq_ignore_ascii_case("safetensors")) {
        let elsewhere = selected.iter().flat_map(|s| &s.adapter.updates).filter(|u| u.module.component != Component::Transformer);
        match elsewhere.count() {
            0 => {}
            n => remarks
                .push(format!("{n} changes of the text encoders are not in a file of the transformer; give a folder for all")),
        }
        let [_] = bundle.transformer.weights.as_slice() else {
            let hint = "give a folder as the output".into();
            let problem = format!("has its transformer in {} files", bundle.transformer.weights.len());
            return Err(Error::Combination { field: "base", problem, hint });
        };
        let temporary = files::temporary(folder).map_err(|source| Error::Write { path: out.into(), source })?;
        let to = |_: &Path| Ok(temporary.path().to_owned());
        changed += bake(Component::Transformer, &bundle.transformer, &names, &selected, &mut remarks, &to)?;
        files::finish(temporary, out, order.force)?;
    } else {
        let root = root(&bundle.transformer).ok_or_else(|| Error::Combination {
            field: "base",
            problem: "is no folder in the diffusers layout".into(),
            hint: "give an output that ends in .safetensors, for the transformer alone".into(),
        })?;
        let temporary = files::temporary_folder(folder);
        let temporary = temporary.map_err(|source| Error::Write { path: out.into(), source })?;
        let parts = [(Component::Transformer, &bundle.transformer), (Component::T5, &bundle.t5), (Component::Clip, &bundle.clip)];
        for (component, files) in parts {
            if selected.iter().all(|s| s.adapter.updates.iter().all(|u| u.module.component != component)) {
                continue;
            }
            let to = |path: &Path| path.strip_prefix(&root).map(|inside| temporary.path().join(inside)).map_err(|_| unlike(path));
            changed += bake(component, files, &names, &selected, &mut remarks, &to)?;
        }
        copy_rest(&root, temporary.path())?;
        if out.exists() {
            fs::remove_dir_all(out).map_err(|source| Error::Write { path: out.into(), source })?;
        }
        fs::rename(temporary.keep(), out).map_err(|source| Error::Write { path: out.into(), source })?;
    }
    Ok(MergedModel { path: out.into(), tensors_changed: changed, bytes: size(out), remarks })
}

/// Writes each file of a component to where `place` says. `names` are the adapters' references.
fn bake(
    component: Component,
    files: &Files,
    names: &str,
    selected: &[Selected],
    remarks: &mut Vec<String>,
    place: &dyn Fn(&Path) -> Result<PathBuf, Error>,
) -> Result<usize, Error> {
    let checkpoint = files.checkpoint()?;
    let refused = |source| Error::Lora { reference: names.into(), source: Box::new(source) };
    let baking = Baking::new(component, &checkpoint, selected).map_err(refused)?;
    remarks.extend(baking.notes.iter().cloned());
    for (i, path) in checkpoint.paths().into_iter().enumerate() {
        let to = place(path)?;
        let write = |source| Error::Write { path: to.clone(), source };
        fs::create_dir_all(files::folder_of(&to)).map_err(write)?;
        let mut file = BufWriter::new(File::create(&to).map_err(write)?);
        baking.write(i, &mut file).and_then(|()| file.flush()).and_then(|()| file.get_ref().sync_all()).map_err(write)?;
    }
    Ok(baking.changed)
}

/// The folder of a model in the diffusers layout: that above `transformer/`.
fn root(transformer: &Files) -> Option<PathBuf> {
    let Some(Blob::File(path)) = transformer.weights.first() else { return None };
    let folder = path.parent()?;
    (folder.file_name()? == "transformer").then(|| folder.parent().map(Path::to_owned)).flatten()
}

/// Every file of a folder that is not there yet, links followed, since a hub's cache is made of them.
fn copy_rest(from: &Path, to: &Path) -> Result<(), Error> {
    let read = |source| Error::UnreadableFile { field: "base", path: from.into(), source };
    for entry in fs::read_dir(from).map_err(read)? {
        let path = entry.map_err(read)?.path();
        let target = to.join(path.file_name().unwrap_or_default());
        let write = |source| Error::Write { path: target.clone(), source };
        if path.is_dir() {
            fs::create_dir_all(&target).map_err(write)?;
            copy_rest(&path, &target)?;
        } else if !target.exists() {
            fs::copy(&path, &target).map_err(write)?;
        }
    }
    Ok(())
}

fn unlike(path: &Path) -> Error {
    let problem = format!("has a file elsewhere: {}", path.display());
    Error::Combination { field: "base", problem, hint: "give an output that ends in .safetensors".into() }
}

fn size(path: &Path) -> u64 {
    if !path.is_dir() {
        return fs::metadata(path).map_or(0, |data| data.len());
    }
    fs::read_dir(path).map_or(0, |entries| entries.flatten().map(|entry| size(&entry.path())).sum())
}
