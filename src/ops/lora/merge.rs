//! A base with adapters in it, as files.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use ::models::bundle::{Blob, Files};
use ::models::lora::Baking;
use ::models::weights::Component;
use serde::Serialize;
use tempfile::TempDir;

use super::watch::{Stage, Told, Watched, tell};
use super::{Lora, Sources, target};
use crate::config::Config;
use crate::engine::Selected;
use crate::fetch;
use crate::ops::{Error, files, models, shown};

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
    #[serde(serialize_with = "shown::path")]
    pub path: PathBuf,
    pub tensors_changed: usize,
    pub bytes: u64,
    pub remarks: Vec<String>,
}

/// Writes the base anew with the adapters merged into it: its own layout, keys and types. What is at `out` is there either whole or
/// not at all.
pub fn merge(order: &MergeOrder, config: &Config, told: Told<'_>) -> Result<MergedModel, Error> {
    let model = models::resolve(&order.base, config)?;
    let out = order.out.as_path();
    let names: Vec<String> = order.loras.iter().map(|lora| fetch::shown(&lora.reference)).collect();
    let names = names.join(", ");
    let bundle = &model.bundle;
    let root = root(&bundle.transformer);
    let alone = out.extension().is_some_and(|end| end.eq_ignore_ascii_case("safetensors"));
    let folder = target::check_model(out, order.force, alone, (bundle, root.as_deref()), &order.loras)?;
    let selected = Sources::new(config).open(&order.loras, &mut |progress| told(Stage::Fetching(progress)))?;
    let mut remarks: Vec<String> = selected.iter().flat_map(|selected| selected.adapter.report.warnings.clone()).collect();
    let failed = |source| Error::Write { path: out.into(), source };
    let mut changed = 0;
    if alone {
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
        let temporary = files::temporary(folder).map_err(failed)?;
        let to = |_: &Path| Ok(temporary.path().to_owned());
        changed += bake(Component::Transformer, &bundle.transformer, &names, &selected, &mut remarks, &to, told)?;
        tell(told, Stage::Finishing)?;
        files::finish(temporary, out, order.force)?;
    } else {
        let root = root.ok_or_else(|| Error::Combination {
            field: "base",
            problem: "is no folder in the diffusers layout".into(),
            hint: "give an output that ends in .safetensors, for the transformer alone".into(),
        })?;
        let temporary = files::temporary_folder(folder).map_err(failed)?;
        let parts = [(Component::Transformer, &bundle.transformer), (Component::T5, &bundle.t5), (Component::Clip, &bundle.clip)];
        for (component, files) in parts {
            if selected.iter().all(|s| s.adapter.updates.iter().all(|u| u.module.component != component)) {
                continue;
            }
            let to = |path: &Path| path.strip_prefix(&root).map(|inside| temporary.path().join(inside)).map_err(|_| unlike(path));
            changed += bake(component, files, &names, &selected, &mut remarks, &to, told)?;
        }
        copy_rest(&root, temporary.path(), told)?;
        tell(told, Stage::Finishing)?;
        replace(temporary, out, folder).map_err(failed)?;
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
    told: Told<'_>,
) -> Result<usize, Error> {
    let checkpoint = files.checkpoint()?;
    let refused = |source| Error::Lora { reference: names.into(), source: Box::new(source) };
    let baking = Baking::new(component, &checkpoint, selected).map_err(refused)?;
    remarks.extend(baking.notes.iter().cloned());
    for (i, path) in checkpoint.paths().into_iter().enumerate() {
        let to = place(path)?;
        let write = |source| Error::Write { path: to.clone(), source };
        fs::create_dir_all(files::folder_of(&to)).map_err(write)?;
        let file = File::create(&to).map_err(write)?;
        let mut writer = Watched::new(BufWriter::new(&file), told);
        let written = baking.write(i, &mut writer).and_then(|()| writer.flush()).and_then(|()| file.sync_all());
        written.map_err(|source| writer.cause(write(source)))?;
    }
    Ok(baking.changed)
}

/// The folder of a model in the diffusers layout: that above `transformer/`.
fn root(transformer: &Files) -> Option<PathBuf> {
    let Some(Blob::File(path)) = transformer.weights.first() else { return None };
    let folder = path.parent()?;
    (folder.file_name()? == "transformer").then(|| folder.parent().map(Path::to_owned)).flatten()
}

/// Gives the finished folder the name `out`, in `folder`. The model that had it is deleted last, so that a failure keeps it.
fn replace(finished: TempDir, out: &Path, folder: &Path) -> io::Result<()> {
    let aside = if out.exists() { Some(files::temporary_folder(folder)?) } else { None };
    if let Some(aside) = aside {
        let old = aside.path().join("old");
        fs::rename(out, &old)?;
        if let Err(error) = fs::rename(finished.path(), out) {
            if fs::rename(&old, out).is_err() {
                // It must not go with its folder.
                let kept = aside.keep().join("old");
                return Err(io::Error::other(format!("{error}; the model that was there is in {}", kept.display())));
            }
            return Err(error);
        }
    } else {
        fs::rename(finished.path(), out)?;
    }
    let _ = finished.keep();
    Ok(())
}

/// Every file of a folder that is not there yet, links followed, since a hub's cache is made of them.
fn copy_rest(from: &Path, to: &Path, told: Told<'_>) -> Result<(), Error> {
    let read = |source| Error::UnreadableFile { field: "base", path: from.into(), source };
    for entry in fs::read_dir(from).map_err(read)? {
        tell(told, Stage::Writing)?;
        let path = entry.map_err(read)?.path();
        let target = to.join(path.file_name().unwrap_or_default());
        let write = |source| Error::Write { path: target.clone(), source };
        if path.is_dir() {
            fs::create_dir_all(&target).map_err(write)?;
            copy_rest(&path, &target, told)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_that_is_not_replaced_stays() {
        let place = tempfile::tempdir().unwrap();
        let (out, entries) = (place.path().join("out"), || fs::read_dir(place.path()).unwrap().count());
        let finished = |content: &str| {
            let folder = files::temporary_folder(place.path()).unwrap();
            fs::write(folder.path().join("a"), content).unwrap();
            folder
        };
        replace(finished("old"), &out, place.path()).unwrap();
        let gone = finished("lost");
        fs::remove_dir_all(gone.path()).unwrap();
        assert!(replace(gone, &out, place.path()).is_err());
        assert_eq!((fs::read(out.join("a")).unwrap(), entries()), (b"old".to_vec(), 1));
        replace(finished("new"), &out, place.path()).unwrap();
        assert_eq!((fs::read(out.join("a")).unwrap(), entries()), (b"new".to_vec(), 1));
    }
}
