//! A file or folder that a verb writes.

use std::fs;
use std::path::{Path, PathBuf};

use ::models::bundle::{Blob, Bundle};
use ::models::weights::{Checkpoint, Component, names};

use super::Lora;
use crate::ops::{Error, files};

/// What a folder holds that is a model.
const MODEL: &str = "model_index.json";

/// The folder that `out` will be in, if it may be written there: before any work is done.
pub(super) fn check(out: &Path, force: bool) -> Result<&Path, Error> {
    if out.exists() && !force {
        return Err(Error::Exists { path: out.into() });
    }
    let folder = files::folder_of(out);
    files::check_folder("out", folder)?;
    Ok(folder)
}

/// As [`check`], for a model: a file if `alone`, else a folder, whose content goes if it is replaced. Folders that are no model's stay, as do
/// the base (`bundle`, in the folder `root` if it has one) and the LoRAs.
pub(super) fn check_model<'a>(
    out: &'a Path,
    force: bool,
    alone: bool,
    (bundle, root): (&Bundle, Option<&Path>),
    loras: &[Lora],
) -> Result<&'a Path, Error> {
    let another = "choose another name";
    let is = |what: &str, hint: &str| {
        let problem = format!("is {}, {what}", out.display());
        Err(Error::Combination { field: "out", problem, hint: hint.into() })
    };
    let scale = out.to_str().and_then(|text| text.rsplit_once('@')).map(|(_, scale)| scale.trim().parse::<f64>());
    if matches!(scale, Some(Ok(_))) {
        return is("which reads as a LoRA with its scale", "name what to write last: a .safetensors file or a folder");
    }
    let to = place(out);
    let parts = [&bundle.transformer, &bundle.t5, &bundle.clip, &bundle.vae].into_iter().flat_map(|part| &part.weights);
    let parts = parts.filter_map(|blob| match blob {
        Blob::File(path) => Some(place(path)),
        Blob::Embedded { .. } => None,
    });
    let root = root.map(place);
    if std::env::current_dir().is_ok_and(|here| place(&here).starts_with(&to)) {
        return is("the current folder or one that it is in", another);
    }
    if root.as_ref().is_some_and(|root| to != *root && to.starts_with(root)) {
        return is("inside the base", another);
    }
    if parts.chain(root).any(|part| part.starts_with(&to)) {
        return is("the base or a folder that it is in", another);
    }
    if loras.iter().any(|lora| fs::canonicalize(&lora.reference).is_ok_and(|lora| lora.starts_with(&to))) {
        return is("which is or holds a LoRA that is to be merged", another);
    }
    if alone && out.is_dir() {
        return is("a folder, but its name is that of a file", another);
    }
    if alone && holds_other_weights(out) {
        let hint = "name what to write last; remove that file first if it is meant";
        return is("which holds weights but no transformer of FLUX.1: perhaps a LoRA", hint);
    }
    if !alone && out.exists() && !out.join(MODEL).is_file() {
        return is(&format!("which is no model's folder (it has no {MODEL}) and is not replaced"), another);
    }
    check(out, force)
}

/// Whether a file is there that a merge would not write. A file that is none of weights may go if its user says so.
fn holds_other_weights(out: &Path) -> bool {
    let there = Checkpoint::open(&[out.to_owned()]);
    there.is_ok_and(|there| names::prefix_in(Component::Transformer, &there).is_none())
}

/// Where a path leads, through all links; if nothing is there, its name in its folder.
fn place(path: &Path) -> PathBuf {
    fs::canonicalize(path).unwrap_or_else(|_| {
        let folder = files::folder_of(path);
        fs::canonicalize(folder).unwrap_or_else(|_| folder.into()).join(path.file_name().unwrap_or_default())
    })
}
